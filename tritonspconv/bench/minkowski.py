"""Compare compat.minkowski with MinkowskiEngine, and with compat.spconv on the same engine.

Every case is checked before it is timed: outputs and the gradient of the input, in float32, against
another library with the same weights. Wrong results print FAIL instead of a time, and the exit
status is 1. Libraries that cannot be imported are left out. spconv's networks have the same layers,
with weights converted by compat.minkowski.checkpoint.

  python -m tritonspconv.bench.minkowski                                  # a GPU: MinkUNet34, 5 cm
  OMP_NUM_THREADS=1 python -m tritonspconv.bench.minkowski --device cpu --max-points 20000
"""

from __future__ import annotations

import argparse
import collections
import collections.abc
import contextlib
import importlib
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import tritonspconv
from tritonspconv.bench.cases import Case, Trial, measure_cases
from tritonspconv.bench.peers import OURS, first_line
from tritonspconv.bench.reference import relative_error
from tritonspconv.bench.report import Report, command_line
from tritonspconv.bench.scenes import Scene, SceneStore
from tritonspconv.bench.timing import CLOCKS, Meter, Run
from tritonspconv.models.minkowski import mink_unet, mink_unet_of_spconv

MODULES = {
    OURS: "compat.minkowski",
    "compat.spconv": "compat.spconv.pytorch",
    "MinkowskiEngine": "MinkowskiEngine",
}
# The other libraries are compared with the float32 result of the last installed one of this list.
JUDGES = (OURS, "compat.spconv", "MinkowskiEngine")
HEADER = ("network", "scene", "voxels", "dtype", "pass")
# ‖result - reference‖ / ‖reference‖ against the float32 result of another library. Rounding grows
# over some forty layers and flips ReLUs; a wrong layer gives errors near one.
OUT_TOLERANCE = {"float32": 2e-3, "float16": 5e-2}
GRADIENT_TOLERANCE = {"float32": 5e-2, "float16": 2e-1}
# The first scale of torch.amp.GradScaler: gradients of a mean over all rows vanish in float16.
LOSS_SCALE = 2.0**16


@dataclass(frozen=True)
class Library:
    """A library, with MinkowskiEngine's interface or with spconv's.

    Attributes:
        name: Key of ``MODULES``, and the head of its column.
        module: Its module.
        version: Its version.
    """

    name: str
    module: ModuleType
    version: str

    @property
    def is_spconv(self) -> bool:
        """True: the library has spconv's interface."""
        return self.name == "compat.spconv"

    def tensor(self, feats: Tensor, scene: Scene) -> Any:
        """Return a sparse tensor with nothing cached."""
        if self.is_spconv:
            shape = list(scene.spatial_shape)
            return self.module.SparseConvTensor(feats, scene.indices, shape, scene.batch_size)
        return self.module.SparseTensor(feats, coordinates=scene.indices)

    def rows(self, out: Any) -> tuple[Tensor, Tensor]:
        """Return the cells, in units of their stride, and the features of a sparse tensor."""
        if self.is_spconv:
            return out.indices, out.features
        return out.C // out.C.new_tensor([1, *out.tensor_stride]), out.F

    @contextlib.contextmanager
    def tf32(self, allowed: bool) -> Iterator[None]:
        """Do nothing: no case asks for TF32."""
        yield


@dataclass
class Subject:
    """A network on a scene, with the weights that every library gets.

    Attributes:
        name: Name of the network.
        build: Builds the network from MinkowskiEngine's layers.
        build_of_spconv: Builds the network from spconv's layers.
        scene: The voxels.
        channels: Number of channels of the input.
        libraries: The libraries to compare.
    """

    name: str
    build: Callable[[ModuleType], nn.Module]
    build_of_spconv: Callable[[ModuleType], nn.Module]
    scene: Scene
    channels: int
    libraries: Sequence[Library]
    _references: dict[bool, tuple[Tensor, ...]] = field(default_factory=dict)
    _state: dict[str, Tensor] | None = None

    def network(self, library: Library) -> nn.Module:
        """Return the network of a library, on the scene's device."""
        if library.is_spconv:
            made = self.build_of_spconv(library.module)
            checkpoint = importlib.import_module("compat.minkowski.checkpoint")
            ours = self.build(importlib.import_module(MODULES[OURS]))
            made.load_state_dict(checkpoint.to_spconv(self.state(), ours))
        else:
            made = self.build(library.module)
            made.load_state_dict(self.state())
        return made.to(self.scene.indices.device)

    def state(self) -> dict[str, Tensor]:
        """Initial weights, with statistics of this batch in the batch norms."""
        if self._state is None:
            torch.manual_seed(0)
            library = self.libraries[0]
            bench = Bench(self, library, self.build(library.module), "float32", training=True)
            bench.calibrate()
            self._state = {name: value.cpu() for name, value in bench.network.state_dict().items()}
        return self._state

    def errors(self, bench: Bench) -> dict[str, float]:
        """Compare with the float32 result of another library, the original if it is installed."""
        if bench.training not in self._references:
            other = max(self.libraries, key=lambda library: JUDGES.index(library.name))
            reference = Bench(self, other, self.network(other), "float32", bench.training)
            self._references[bench.training] = reference.result()
        expected, got = self._references[bench.training], bench.result()
        if not torch.equal(expected[0], got[0]):
            return {"sites": float("inf")}
        values = zip(("out", "grad"), expected[1:], got[1:], strict=False)
        return {"sites": 0.0} | {name: relative_error(b, a) for name, a, b in values}


class Bench:
    """Benchmark of a network of one library on one batch.

    Args:
        subject: The network and the scene.
        library: The library.
        network: The network, built and with its weights.
        dtype: ``"float32"`` or ``"float16"``: weights and features in inference, autocast in
            training.
        training: Train, or infer.
    """

    def __init__(
        self, subject: Subject, library: Library, network: nn.Module, dtype: str, training: bool
    ) -> None:
        self.subject, self.library, self.training = subject, library, training
        self.network = network.to(subject.scene.indices.device).train(training)
        self.half = dtype == "float16"
        self.feats = subject.scene.feats(subject.channels, torch.float32)
        if self.half and not training:
            self.network.half()
            self.feats = self.feats.half()
        self._input = library.tensor(self.feats, subject.scene)

    def forward(self, feats: Tensor) -> Any:
        """Run the network on a new tensor: nothing is cached from before."""
        return self.network(self.library.tensor(feats, self.subject.scene))

    def infer(self) -> None:
        """Run inference."""
        with torch.no_grad():
            self.forward(self.feats)

    def again(self) -> None:
        """Run inference on a tensor whose kernel maps are made."""
        with torch.no_grad():
            self.network(self._input)

    def step(self) -> None:
        """Run forward and backward, without an optimiser."""
        with self._autocast():
            _, feats = self.library.rows(self.forward(self.feats))
        _loss(feats.float()).backward()
        self.network.zero_grad(set_to_none=True)

    def result(self) -> tuple[Tensor, ...]:
        """Return sorted cells, output rows, and of training the gradient of the input."""
        feats = self.feats.clone().requires_grad_(self.training)
        with self._autocast(), torch.set_grad_enabled(self.training):
            cells, out = self.library.rows(self.forward(feats))
        cells, order = _sorted(cells, self.subject.scene)
        rows = out[order].float()
        if not self.training:
            return cells, rows.detach()
        _loss(rows).backward()
        self.network.zero_grad(set_to_none=True)
        assert feats.grad is not None
        return cells, rows.detach(), feats.grad

    def calibrate(self) -> None:
        """Set the running statistics of all batch norms to the statistics of this batch."""
        norms = [part for part in self.network.modules() if isinstance(part, nn.BatchNorm1d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            self.forward(self.feats)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        enabled = self.half and self.training
        return torch.autocast(self.feats.device.type, torch.float16, enabled=enabled)


def _loss(rows: Tensor) -> Tensor:
    return rows.square().mean() * LOSS_SCALE


def _sorted(cells: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
    key = cells[:, 0].long()
    for axis, extent in enumerate(scene.spatial_shape, start=1):
        key = key * extent + cells[:, axis]
    return key.sort()


def _layer(kind: str, channels: int) -> tuple[Any, Any]:
    """Return the builders of one layer, of either library."""

    def build(ME: ModuleType) -> nn.Module:
        conv, up = ME.MinkowskiConvolution, ME.MinkowskiConvolutionTranspose
        if kind == "conv 3^3":
            return conv(channels, channels, kernel_size=3, dimension=3)
        down = conv(channels, channels, kernel_size=2, stride=2, dimension=3)
        if kind == "conv 2^3 /2":
            return down
        return nn.Sequential(down, up(channels, channels, kernel_size=2, stride=2, dimension=3))

    def build_of_spconv(spconv: ModuleType) -> nn.Module:
        if kind == "conv 3^3":
            return spconv.SubMConv3d(channels, channels, 3, bias=False)
        down = spconv.SparseConv3d(channels, channels, 2, 2, bias=False, indice_key="down")
        if kind == "conv 2^3 /2":
            return down
        up = spconv.SparseInverseConv3d(channels, channels, 2, "down", bias=False)
        return nn.Sequential(down, up)

    return build, build_of_spconv


def _subjects(scenes: SceneStore, on_gpu: bool, libraries: Sequence[Library]) -> list[Subject]:
    sphere, sweep = scenes["sphere"], scenes["waymo_5cm_b4" if on_gpu else "waymo_unet"]
    subjects = [
        Subject(f"{kind}, 32 channels", *_layer(kind, 32), sphere, 32, libraries)
        for kind in ("conv 3^3", "conv 2^3 /2", "conv, transposed 2^3 /2")
    ]
    for depth in (14, 34):
        subjects.append(
            Subject(
                f"MinkUNet{depth}",
                partial(mink_unet, depth=depth),
                partial(mink_unet_of_spconv, depth=depth),
                sweep,
                4,
                libraries,
            )
        )
    return subjects


def _case(subject: Subject, dtype: str, training: bool) -> Case:
    scene = subject.scene
    shown = "float16 autocast" if training and dtype == "float16" else dtype
    labels = (subject.name, scene.name, f"{len(scene.indices):,}", shown)
    passes = ("train step",) if training else ("infer", "infer, maps cached")
    limits = {"sites": 0.0, "out": OUT_TOLERANCE[dtype], "grad": GRADIENT_TOLERANCE[dtype]}

    def prepare(library: Any) -> Trial:
        bench = Bench(subject, library, subject.network(library), dtype, training)
        runs: dict[str, Run] = {"train step": bench.step} if training else {"infer": bench.infer}
        if not training and not library.is_spconv:
            runs["infer, maps cached"] = bench.again
        return Trial(runs, lambda: subject.errors(bench))

    return Case(labels, passes, prepare, limits)


def _libraries(wanted: Sequence[str]) -> list[Library]:
    # The original takes ``Sequence`` from where Python 3.9 had it.
    setattr(collections, "Sequence", collections.abc.Sequence)  # noqa: B010
    found = []
    for name in wanted:
        try:
            module = importlib.import_module(MODULES[name])
        except Exception as error:  # a broken installation may raise anything
            print(f"without {name}: {first_line(error)}", flush=True)
            continue
        root = module if name == "MinkowskiEngine" else tritonspconv
        found.append(Library(name, module, root.__version__))
    return found


def main() -> int:
    """Run the benchmark; return the exit status."""
    args = _parse_args()
    device = torch.device(args.device)
    libraries = _libraries(args.libraries)
    on_gpu = device.type == "cuda"
    about = {
        "command": command_line(),
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "versions": {library.name: library.version for library in libraries}
        | {"torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }
    report = Report([library.name for library in libraries], about)
    print(f"{about['device']}; {about['versions']}; {about['threads']} threads", flush=True)
    scenes = SceneStore(device, args.scan, None, args.sphere_radius, args.max_points)
    subjects = [
        subject
        for subject in _subjects(scenes, on_gpu, libraries)
        if not args.only or args.only in subject.name
    ]
    dtypes = ("float16", "float32") if on_gpu else ("float32",)
    cases = [
        _case(subject, dtype, training)
        for subject in subjects
        for training in (False, True)
        for dtype in dtypes
    ]
    meter = Meter(device, args.quick, args.clock)
    title = f"{CLOCKS[args.clock]}, ms; new kernel maps at every call unless cached"
    if args.memory:
        title = "peak memory that a call adds, MiB; new kernel maps at every call unless cached"
    metric = meter.peak if args.memory else meter.wall
    measure_cases("minkowski", title, HEADER, cases, libraries, meter, report, metric)
    if args.json is not None:
        report.save_json(args.json)
    if args.markdown is not None:
        report.save_markdown(args.markdown)
    if report.failures:
        print(f"FAIL: {len(report.failures)} results are wrong or missing")
    return int(bool(report.failures))


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu"
    )
    parser.add_argument(
        "--libraries", nargs="+", choices=MODULES, default=list(MODULES), help="default: all"
    )
    parser.add_argument("--only", metavar="TEXT", help="networks with TEXT in their name")
    parser.add_argument("--scan", type=Path, help="point cloud; a simulated sweep if left out")
    parser.add_argument("--max-points", type=int, help="use only so many points of it")
    parser.add_argument("--sphere-radius", type=int, default=40, help="in voxels (default 40)")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time; for busy machines"
    )
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
