"""Cases of single layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tritonspconv.bench.cases import Case, Trial
from tritonspconv.bench.peers import OURS, Peer
from tritonspconv.bench.reference import (
    GRADIENT_SLACK,
    LAYER_TOLERANCE,
    Window,
    cells_of,
    convolve,
    keys_of,
    reached_keys,
    relative_error,
)
from tritonspconv.bench.scenes import Scene, SceneStore, normal
from tritonspconv.bench.timing import Run

HEADER = ("scene", "voxels", "layer", "channels", "dtype", "pass")
CACHED = ("fwd", "fwd+bwd")
WITH_MAP = ("map+fwd", "map+fwd+bwd")
KEY = "bench"

SUBM = Window(3, 1, 1)
DOWN3 = Window(3, 2, 1)
DOWN2 = Window(2, 2, 0)
UP3 = Window(3, 2, 1, to_fine=True)
SMALL_CHANNELS = (1, 3, 4, 5, 20, 33, 64)
SMALL_ROWS = (1_000, 5_000, 20_000)


def layer_cases(scenes: SceneStore, quick: bool, on_gpu: bool) -> list[Case]:
    """Return the cases of the section ``layers``."""
    cases = []
    for name in ("waymo_b4", "sphere", "kitti"):
        for channels, dtype in _channels(name, quick, on_gpu):
            cases.append(_case("SubM 3^3", scenes[name], channels, dtype, CACHED + WITH_MAP[:1]))
    dtype = "float16" if on_gpu else "float32"
    for kind in ("conv 3^3 /2", "conv 2^3 /2", "transposed 3^3 /2"):
        cases.append(_case(kind, scenes["waymo_b4"], 64, dtype, CACHED + WITH_MAP))
    cases.append(_case("inverse 3^3 /2", scenes["waymo_b4"], 64, dtype, CACHED))
    return cases


def tf32_cases(scenes: SceneStore) -> list[Case]:
    """Return the cases of the section ``tf32``, which has a process of its own.

    spconv's tuner keeps its first choice for a shape and dtype. It does not ask for
    ``SPCONV_ALLOW_TF32`` again, so a process that measured float32 has no TF32 numbers.
    """
    return [
        _case("SubM 3^3", scenes[name], channels, "tf32", CACHED + WITH_MAP[:1])
        for name in ("waymo_b4", "sphere", "kitti")
        for channels in (32, 64, 128)
    ]


def small_cases(scenes: SceneStore, quick: bool, on_gpu: bool) -> list[Case]:
    """Return the cases of the section ``small``: few voxels, awkward channels."""
    dtype = "float16" if on_gpu else "float32"
    rows = SMALL_ROWS[1:2] if quick else SMALL_ROWS
    return [
        _case("SubM 3^3", scenes["waymo_b4"].first(count), channels, dtype, CACHED)
        for count in rows
        for channels in SMALL_CHANNELS
    ]


def memory_cases(scenes: SceneStore, quick: bool, on_gpu: bool) -> list[Case]:
    """Return the cases of the layers in the section ``memory``."""
    dtype = "float16" if on_gpu else "float32"
    channels = (64,) if quick else (16, 64, 128, 256)
    kinds = ("conv 3^3 /2", "conv 2^3 /2", "transposed 3^3 /2")
    scene = scenes["waymo_b4"]
    cases = [_case("SubM 3^3", scene, count, dtype, WITH_MAP) for count in channels]
    return cases + [_case(kind, scene, 64, dtype, WITH_MAP) for kind in kinds]


def _channels(scene: str, quick: bool, on_gpu: bool) -> list[tuple[int, str]]:
    """Return channels and dtype of the submanifold cases."""
    if not on_gpu:
        return [(16, "float32"), (32, "float32")]
    if quick and scene != "waymo_b4":
        return [(count, "float16") for count in ((16, 64) if scene == "kitti" else (64, 128))]
    half = [(count, "float16") for count in (16, 32, 64, 128, 256)]
    brain = [(count, "bfloat16") for count in ((64,) if quick else (16, 32, 64, 128, 256))]
    single = [(count, "float32") for count in (32, 64, 128)]
    return half + brain + single


def _case(kind: str, scene: Scene, channels: int, dtype: str, passes: tuple[str, ...]) -> Case:
    sites, window = _input_sites(kind, scene)
    labels = (scene.name, f"{len(sites.indices):,}", kind, str(channels), dtype)
    limit = LAYER_TOLERANCE[dtype]
    limits: dict[str, float] = dict.fromkeys(("sites", "out", "out in eval"), limit)
    limits |= dict.fromkeys(("grad feats", "grad weight"), GRADIENT_SLACK * limit)
    storage = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    bench = partial(_LayerBench, kind, scene, sites, window, channels, storage)
    return Case(labels, passes, lambda peer: bench(peer).trial(), limits, tf32=dtype == "tf32")


def _input_sites(kind: str, scene: Scene) -> tuple[Scene, Window]:
    """Return the voxels that a layer reads, and its geometry.

    A transposed layer reads the voxels that a 2^3 /2 layer would leave.
    """
    if not kind.startswith("transposed"):
        inverse = kind.startswith("inverse")
        window = UP3 if inverse else DOWN3 if "3^3 /2" in kind else DOWN2
        return scene, SUBM if kind.startswith("SubM") else window
    z, y, x = (extent // 2 for extent in scene.spatial_shape)
    keys = reached_keys(scene.indices, DOWN2, (z, y, x))
    return Scene(scene.name, cells_of(keys, (z, y, x)), (z, y, x), scene.batch_size), UP3


class _LayerBench:
    """Benchmark of a layer of one library on one set of voxels.

    Args:
        kind: Label of the layer.
        scene: The voxels of the scene.
        sites: The voxels that the layer reads; for an inverse layer, those it writes.
        window: The geometry.
        channels: Channels of input and output.
        dtype: Dtype of features and weights.
        peer: The library.
    """

    def __init__(
        self,
        kind: str,
        scene: Scene,
        sites: Scene,
        window: Window,
        channels: int,
        dtype: torch.dtype,
        peer: Peer,
    ) -> None:
        self.kind, self.scene, self.sites, self.window = kind, scene, sites, window
        self.channels, self.dtype, self.peer = channels, dtype, peer
        self.device = sites.indices.device
        self.train = self._layer().train()
        self.infer = self._layer().eval()
        self.weight = self.train.weight
        # The tensor whose dictionary holds the kernel map, if the library lets a layer reuse the
        # map.
        base = peer.tensor(sites.feats(channels, dtype), sites)
        if kind.startswith("SubM"):
            base = self.train(base)
        elif kind.startswith("inverse"):
            down = self._conv(peer.module.SparseConv3d, 3, stride=2, padding=1).train()
            base = down(base)
        rows = base.indices.shape[0]
        feats = normal(rows, channels, self.device, dtype)
        self.feats = feats.clone().requires_grad_()
        self.cached = base.replace_feature(feats)
        self.cached_train = base.replace_feature(self.feats)
        self.grad = torch.empty(0)

    def trial(self) -> Trial:
        """Return the functions to measure; passes that the library cannot do are left out."""
        runs: dict[str, Run] = {
            "fwd": lambda: self._forward(self.cached),
            "fwd+bwd": lambda: self._backward(self.cached_train),
            "map+fwd": lambda: self._forward(self._fresh(self.cached.features)),
            "map+fwd+bwd": lambda: self._backward(self._fresh(self.feats)),
        }
        reuses = self.kind.startswith(("SubM", "inverse"))
        if not reuses and self.peer.name != OURS:
            # Other libraries build the map of such a layer at every call.
            del runs["fwd"], runs["fwd+bwd"]
        with torch.no_grad():
            self.grad = torch.randn_like(self.train(self.cached).features)
        return Trial(runs, self.check)

    def check(self) -> dict[str, float]:
        """Compare output voxels, outputs and gradients with the reference."""
        out = self.train(self.cached_train)
        with torch.no_grad():
            out_eval = self.infer(self.cached)
        grads = torch.autograd.grad(out.features, [self.feats, self.weight], self.grad)

        feats = self.feats.detach().float().requires_grad_()
        weight = self.weight.detach().float().requires_grad_()
        source = self.cached
        args = (source.indices, source.spatial_shape)
        expected = convolve(feats, weight, *args, out.indices, self.window)
        expected_grads = torch.autograd.grad(expected, [feats, weight], self.grad.float())
        errors = {
            "sites": 0.0 if self._sites_agree(out) else float("inf"),
            "out": relative_error(out.features, expected),
            "grad feats": relative_error(grads[0], expected_grads[0]),
            "grad weight": relative_error(grads[1], expected_grads[1]),
        }
        del expected_grads, expected
        if not torch.equal(out.indices, out_eval.indices):
            with torch.no_grad():
                expected = convolve(feats, weight, *args, out_eval.indices, self.window)
                errors["out in eval"] = relative_error(out_eval.features, expected)
        else:
            # Both ran on the same rows, so the output of training serves as the reference.
            errors["out in eval"] = relative_error(out_eval.features, out.features)
        return errors

    def _sites_agree(self, out: Any) -> bool:
        """Return whether the output voxels are the right ones; rows may come in any order."""
        if self.kind.startswith(("SubM", "inverse")):
            return torch.equal(out.indices.int(), self.sites.indices)
        shape = list(out.spatial_shape)
        expected = reached_keys(self.sites.indices, self.window, shape)
        return torch.equal(keys_of(out.indices, shape).sort().values, expected)

    def _layer(self) -> Any:
        module, window = self.peer.module, self.window
        if self.kind.startswith("SubM"):
            return self._conv(module.SubMConv3d, window.size, padding=window.padding)
        if self.kind.startswith("inverse"):
            return self._conv(module.SparseInverseConv3d, window.size)
        transposed = self.kind.startswith("transposed")
        kind = module.SparseConvTranspose3d if transposed else module.SparseConv3d
        return self._conv(kind, window.size, stride=window.stride, padding=window.padding)

    def _conv(self, kind: Callable[..., Any], size: int, **geometry: int) -> Any:
        """Return a layer with the weights that every library gets."""
        channels = self.channels
        layer = kind(
            channels,
            channels,
            size,
            **geometry,
            bias=False,
            indice_key=KEY,
            algo=self.peer.algo,
        ).to(self.device, self.dtype)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(layer.weight.shape, generator=generator)
        with torch.no_grad():
            layer.weight.copy_(weight * (channels * size**3) ** -0.5)
        return layer

    def _fresh(self, feats: Tensor) -> Any:
        return self.peer.tensor(feats, self.sites)

    def _forward(self, x: Any) -> None:
        with torch.no_grad():
            self.infer(x)

    def _backward(self, x: Any) -> None:
        self.train(x).features.backward(self.grad)
        # Drop the gradients after the step, so that they count as memory that the step adds.
        self.feats.grad = None
        self.weight.grad = None
