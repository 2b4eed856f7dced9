"""Cases of whole networks: inference, and forward and backward of a training step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tritonspconv import Captured, CapturedStep, capture, capture_step, fuse, optimize, save_memory
from tritonspconv.bench.cases import Case, Trial
from tritonspconv.bench.peers import OURS, Peer, first_line
from tritonspconv.bench.reference import keys_of, relative_error
from tritonspconv.bench.scenes import Scene, SceneStore
from tritonspconv.models.lidar import residual_encoder, second_encoder, sparse_unet

HEADER = ("network", "scene", "voxels", "dtype", "pass")
# Inference only: ours after tritonspconv.fuse, other libraries unchanged.
FUSED = "SECOND encoder, ours fused"
# Ours after tritonspconv.optimize, other libraries unchanged.
OPTIMISED = {
    "residual encoder, ours optimised": "residual encoder",
    "SpUNet-34, ours optimised": "SpUNet-34",
}
# Training only: ours under tritonspconv.save_memory; other libraries unchanged.
SAVING = {
    "SpUNet-34, ours saving memory": "SpUNet-34",
    "SpUNet-34, ours captured, saving memory": "SpUNet-34, ours captured",
}
# Ours as CUDA graphs, with new coordinates and new maps at every call; other libraries unchanged.
CAPTURED = {
    "SECOND encoder, ours captured": "SECOND encoder",
    "residual encoder, ours captured": "residual encoder",
    "SpUNet-34, ours captured": "SpUNet-34",
    "SpUNet-34, ours captured, saving memory": "SpUNet-34",
}
BUILDERS = {
    "SECOND encoder": second_encoder,
    FUSED: second_encoder,
    "residual encoder": residual_encoder,
    "SpUNet-34": sparse_unet,
}
# Largest ‖result - reference‖ / ‖reference‖ of a network's output; the reference is one library's
# result in float32. Rounding grows over some forty layers and flips ReLUs; a wrong layer gives
# errors near one.
NETWORK_TOLERANCE = {"float32": 2e-3, "float16": 5e-2}
# All gradients of the parameters together. If the last level has few voxels, one ReLU that
# rounding flips moves them by a percent.
GRADIENT_TOLERANCE = {"float32": 5e-2, "float16": 2e-1}


def network_cases(scenes: SceneStore, peers: Sequence[Peer], on_gpu: bool) -> list[Case]:
    """Return the cases of the section ``networks``."""
    subjects = [
        _Subject("SECOND encoder", scenes["kitti"], peers),
        _Subject("SECOND encoder", scenes["kitti_b4"], peers),
        _Subject("residual encoder", scenes["kitti_b4"], peers),
        _Subject("residual encoder, ours optimised", scenes["kitti_b4"], peers),
        _Subject("SpUNet-34", scenes["waymo_unet"], peers),
        _Subject("SpUNet-34, ours optimised", scenes["waymo_unet"], peers),
        *_captured_subjects(scenes, peers, on_gpu),
    ]
    modes = [
        (dtype, training)
        for training in (False, True)
        for dtype in (("float16", "float32") if on_gpu else ("float32",))
    ]
    cases = [_case(subject, dtype, training) for subject in subjects for dtype, training in modes]
    fused = [_Subject(FUSED, scenes[name], peers) for name in ("kitti", "kitti_b4")]
    return cases + [
        _case(subject, dtype, False)
        for subject in fused
        for dtype, training in modes
        if not training
    ]


def footprint_cases(scenes: SceneStore, peers: Sequence[Peer]) -> list[Case]:
    """Return networks, eager and captured, with room for 1.5 times the voxels; GPU only."""
    captured = _captured_subjects(scenes, peers, on_gpu=True)
    plain = [_Subject(CAPTURED[each.network], each.scene, peers) for each in captured]
    return [
        _case(subject, "float16", training, room=1.5)
        for pair in zip(plain, captured, strict=True)
        for training in (False, True)
        for subject in pair
    ]


def saving_cases(scenes: SceneStore, peers: Sequence[Peer], *, captured: bool) -> list[Case]:
    """Return training steps of networks as they are and under ``save_memory``; GPU only.

    Args:
        scenes: The scenes.
        peers: The libraries.
        captured: The steps are CUDA graphs, or they are eager.
    """
    return [
        _case(_Subject(name, scenes["waymo_unet"], peers), dtype, True)
        for dtype in ("float16", "float32")
        for pair in SAVING.items()
        if (pair[0] in CAPTURED) == captured
        for name in reversed(pair)
    ]


def _captured_subjects(scenes: SceneStore, peers: Sequence[Peer], on_gpu: bool) -> list[_Subject]:
    """Return the cases of CUDA graphs; none on a CPU."""
    if not on_gpu:
        return []
    second, encoder, unet, _ = CAPTURED
    places = (
        (second, "kitti"), (second, "kitti_b4"), (encoder, "kitti_b4"), (unet, "rooms_b4"),
        (unet, "waymo_unet"),
    )  # fmt: skip
    return [_Subject(name, scenes[scene], peers) for name, scene in places]


def _case(subject: _Subject, dtype: str, training: bool, room: float = 1.25) -> Case:
    scene = subject.scene
    shown = "float16 autocast" if training and dtype == "float16" else dtype
    labels = (subject.network, scene.name, f"{len(scene.indices):,}", shown)
    with_optimizer = training and subject.network in CAPTURED
    passed = "train step, SGD" if with_optimizer else "train step" if training else "infer"
    limits = {"sites": 0.0, "out": NETWORK_TOLERANCE[dtype], "grads": GRADIENT_TOLERANCE[dtype]}

    def prepare(peer: Peer) -> Trial:
        bench = NetworkBench(subject.network, scene, peer, dtype, training, subject.state, room)
        run = bench.infer
        if training:
            run = bench.step_with_optimizer if with_optimizer else bench.step
        return Trial({passed: run}, lambda: subject.errors(bench))

    return Case(labels, (passed,), prepare, limits)


class NetworkBench:
    """One network of one library on one batch.

    Args:
        name: Key of ``BUILDERS``, ``OPTIMISED``, ``SAVING`` or ``CAPTURED``.
        scene: The voxels.
        peer: The library.
        dtype: ``"float32"`` or ``"float16"``: weights and features in inference, autocast in
            training.
        training: Train, or infer.
        state: Parameters and statistics; None keeps the initial ones.
        room: Rows of a captured network, in proportion to those of the batch.
    """

    def __init__(
        self,
        name: str,
        scene: Scene,
        peer: Peer,
        dtype: str,
        training: bool,
        state: dict[str, Tensor] | None = None,
        room: float = 1.25,
    ) -> None:
        self.scene, self.peer, self.training = scene, peer, training
        self._capacities = [math.ceil(room * len(scene.indices))]
        torch.manual_seed(0)
        builder = BUILDERS[{**OPTIMISED, **SAVING, **CAPTURED}.get(name, name)]
        self.network = builder(peer.module, algo=peer.algo)
        if state is not None:
            self.network.load_state_dict(state)
        self.network.to(scene.indices.device).train(training)
        self.half = dtype == "float16"
        self.feats = scene.feats(4, torch.float32)
        if name == FUSED and peer.name == OURS and not training:
            self.network = fuse(self.network)
        if name in OPTIMISED and peer.name == OURS:
            optimize(self.network)
        if self.half and not training:
            self.network.half()
            self.feats = self.feats.half()
        if name in SAVING and peer.name == OURS and training:
            with self._autocast():
                save_memory(self.network, self._tensor())
        self._grad: Tensor | None = None
        self._is_captured = name in CAPTURED and peer.name == OURS
        self._captured: Captured | None = None
        self._optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-9)
        self._captured_step: CapturedStep | None = None

    def _tensor(self) -> Any:
        """Return a new tensor: nothing is cached from before."""
        return self.peer.tensor(self.feats, self.scene)

    def _run(self, x: Any) -> Any:
        return self.network(x)[0]

    def forward(self) -> Any:
        """Return the network's output for a new tensor; by CUDA graphs, if that is measured."""
        if not self._is_captured:
            return self._run(self._tensor())
        if self._captured is None:
            self._captured = capture(
                self._run, self._tensor(), modules=[self.network],
                capacities=self._capacities, on_overflow="raise",
            )  # fmt: skip
        return self._captured(self._tensor())

    def _loss(self, x: Any) -> Tensor:
        feats = self._run(x).features.float()
        return nn.functional.mse_loss(feats, torch.zeros_like(feats))

    def step_with_optimizer(self) -> None:
        """Run a step of training: forward, loss, backward, SGD."""
        with self._autocast():
            if self._is_captured:
                if self._captured_step is None:
                    self._captured_step = capture_step(
                        self._loss, self._optimizer, self._tensor(), modules=[self.network],
                        capacities=self._capacities, on_overflow="raise",
                    )  # fmt: skip
                self._captured_step(self._tensor())
                return
            self._optimizer.zero_grad(set_to_none=True)
            loss = self._loss(self._tensor())
        loss.backward()
        self._optimizer.step()

    def infer(self) -> None:
        """Run inference."""
        with torch.no_grad():
            self.forward()

    def step(self) -> None:
        """Run forward and backward, without an optimiser."""
        with self._autocast():
            out = self.forward().features
        if self._grad is None or self._grad.shape != out.shape:
            self._grad = torch.randn_like(out) * len(out) ** -0.5
        out.backward(self._grad)
        # Drop the gradients after the step, so that they count as memory that the step adds.
        self.network.zero_grad(set_to_none=True)

    def result(self) -> _Result:
        """Return the output in the order of the voxels' keys and, of training, the gradients."""
        with self._autocast(), torch.set_grad_enabled(self.training):
            out = self.forward()
        shape = list(out.spatial_shape)
        keys, order = keys_of(out.indices, shape).sort()
        grads: list[Tensor] = []
        if self.training:
            out.features.backward(_gradient_of(out.indices, out.features))
            grads = [parameter.grad.flatten() for parameter in self.network.parameters()]
            self.network.zero_grad(set_to_none=True)
        feats = out.features.detach()[order].float()
        return _Result(keys, feats, torch.cat(grads) if grads else None)

    def calibrate(self) -> None:
        """Set the running statistics of all batch norms to those of this batch."""
        norms = [part for part in self.network.modules() if isinstance(part, nn.BatchNorm1d)]
        before = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            self._run(self._tensor())
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.training and self.half:
            return torch.autocast(self.feats.device.type, torch.float16)
        return contextlib.nullcontext()


@dataclass(frozen=True)
class _Result:
    keys: Tensor
    feats: Tensor
    grads: Tensor | None


@dataclass
class _Subject:
    """A network on a scene: the weights that every library gets, and the results to agree on."""

    network: str
    scene: Scene
    peers: Sequence[Peer]
    _state: dict[str, Tensor] | None = None
    _references: dict[bool, _Result] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, Tensor]:
        """Initial weights, and fitting statistics of batch norms, so that halves do not vanish."""
        if self._state is None:
            self._state = self._first(self._calibrated)
        assert self._state is not None
        return self._state

    def errors(self, bench: NetworkBench) -> dict[str, float]:
        """Compare with the float32 result of the first library that gives one."""
        if bench.training not in self._references:
            self._references[bench.training] = self._first(
                lambda peer: self._bench(peer, bench.training, self.state).result()
            )
        reference = self._references[bench.training]
        result = bench.result()
        errors = {
            "sites": 0.0 if torch.equal(result.keys, reference.keys) else float("inf"),
            "out": relative_error(result.feats, reference.feats),
        }
        if result.grads is not None and reference.grads is not None:
            errors["grads"] = relative_error(result.grads, reference.grads)
        return errors

    def _calibrated(self, peer: Peer) -> dict[str, Tensor]:
        bench = self._bench(peer, True, None)
        bench.calibrate()
        return {name: value.cpu() for name, value in bench.network.state_dict().items()}

    def _bench(self, peer: Peer, training: bool, state: dict[str, Tensor] | None) -> NetworkBench:
        return NetworkBench(self.network, self.scene, peer, "float32", training, state)

    def _first(self, get: Callable[[Peer], Any]) -> Any:
        """Ask the libraries in turn, ours last, so that ours is judged by another's result."""
        reasons = []
        for peer in sorted(self.peers, key=lambda peer: (peer.name == OURS, peer.name)):
            try:
                return get(peer)
            except Exception as error:  # a library may raise anything
                reasons.append(f"{peer.name}: {first_line(error)}")
        raise RuntimeError(f"no library gives a float32 reference ({'; '.join(reasons)})")


def _gradient_of(indices: Tensor, feats: Tensor) -> Tensor:
    """Return an output gradient that depends on the voxel, not on the order of the rows."""
    direction = torch.tensor([1.9, 0.61, 0.83, 0.47], device=feats.device)
    channels = torch.arange(feats.shape[1], device=feats.device)
    phase = (indices.float() * direction).sum(dim=1, keepdim=True) + 1.7 * channels
    return (phase.cos() * len(feats) ** -0.5).to(feats.dtype)
