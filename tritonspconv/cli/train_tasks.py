"""Experiments of the command: a task, a network for the task, and the network's library."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tritonspconv.bench.peers import ORIGINAL, load_peer
from tritonspconv.cli.errors import CommandError
from tritonspconv.models.detector import second_detector
from tritonspconv.models.lidar import sparse_unet
from tritonspconv.models.minkowski import mink_unet
from tritonspconv.points import VoxelGrid
from tritonspconv.training.box_scenes import KITTI_GRID, STREET_GRID, kitti_boxes, simulated_boxes
from tritonspconv.training.captured import CapturedNetwork
from tritonspconv.training.data import CHANNELS, Sample, ScanSet, Split, simulated_set
from tritonspconv.training.detection import Detection, run_detector
from tritonspconv.training.folders import kitti_set, scannet_set
from tritonspconv.training.loop import Task, follow_quickly
from tritonspconv.training.segmentation import Forward, Segmentation

# Network -> our module, and the original's module.
LIBRARIES = {
    "minkunet": ("compat.minkowski", "MinkowskiEngine"),
    "spunet": ("compat.spconv.pytorch", "spconv.pytorch"),
    "second": ("compat.spconv.pytorch", "spconv.pytorch"),
}
BACKENDS = ("ours", "original")


@dataclass(frozen=True)
class Experiment:
    """The experiment of one backend.

    Attributes:
        backend: ``"ours"`` or ``"original"``.
        library: The name of the library's module.
        network: The network.
        task: The task that the network learns.
    """

    backend: str
    library: str
    network: nn.Module
    task: Task


def experiments(args: argparse.Namespace, device: torch.device) -> list[Experiment]:
    """Return an experiment for each backend; their networks start from the same weights.

    Raises:
        CommandError: A library is missing, or the arguments do not go together.
    """
    if args.data not in (None, "rooms", "streets") and not Path(args.data).is_dir():
        raise CommandError(
            f"--data must be rooms, streets or a folder; there is no folder {args.data!r}"
        )
    build = _second if args.network == "second" else _segmentation
    made = []
    for backend in args.backend:
        library, algo = _library(args.network, backend, device)
        torch.manual_seed(args.seed)
        network, task = build(args, library, algo)
        if made:
            _same_start(made[0].network, network)
        follow_quickly(network)
        made.append(Experiment(backend, library.__name__, network.to(device), task))
    return made


def _second(
    args: argparse.Namespace, library: ModuleType, algo: Any
) -> tuple[nn.Module, Detection]:
    streets = args.data in (None, "streets")
    if args.data == "rooms":
        raise CommandError("--network second looks for cars, and rooms have none. --data streets")
    grid = STREET_GRID if streets else KITTI_GRID
    if args.voxel is not None:
        lower, upper = grid.point_range[:3], grid.point_range[3:]
        grid = VoxelGrid((*lower, *upper), (args.voxel, args.voxel, grid.voxel_size[2]))
    if streets:
        sets = (
            simulated_boxes("train", args.scans, grid),
            simulated_boxes("val", args.val_scans, grid),
        )
    else:
        sets = kitti_boxes(args.data, "train", grid), kitti_boxes(args.data, "val", grid)
    network = second_detector(
        library, grid.spatial_shape, CHANNELS, algo=algo, channel_divisor=args.narrow
    )
    return network, Detection(*sets, _in_graphs(args, library, run_detector))


def _segmentation(
    args: argparse.Namespace, library: ModuleType, algo: Any
) -> tuple[nn.Module, Segmentation]:
    train_set, val_set = (
        _scan_set(args, "train", args.scans),
        _scan_set(args, "val", args.val_scans),
    )
    classes = len(train_set.class_names)
    if args.network == "minkunet":
        network = mink_unet(library, CHANNELS, classes, depth=14, channel_divisor=args.narrow)
        forward = _forward_minkunet(_in_graphs(args, library, _run_minkunet(library)))
    else:
        network = sparse_unet(library, CHANNELS, classes, algo, args.narrow)
        forward = _forward_spunet(_in_graphs(args, library, _run_spunet(library)))
    return network, Segmentation(forward, train_set, val_set)


def _in_graphs(
    args: argparse.Namespace, library: ModuleType, run: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Return a function that runs a network, by CUDA graphs where the arguments ask for them."""
    return CapturedNetwork(run) if args.capture and library.__name__.startswith("compat") else run


def _scan_set(args: argparse.Namespace, split: Split, count: int) -> ScanSet:
    if args.data in (None, "rooms", "streets"):
        return simulated_set(args.data or "rooms", split, count, args.voxel)
    folder = Path(args.data)
    if any(folder.glob("**/scannetv2_*.txt")):
        return scannet_set(folder, split, args.voxel or 0.05)
    return kitti_set(folder, split, args.voxel or 0.1)


def _library(network: str, backend: str, device: torch.device) -> tuple[ModuleType, Any]:
    """Return the module and its algorithm; prepare an original for its device."""
    name = LIBRARIES[network][BACKENDS.index(backend)]
    algo = None
    if name == "MinkowskiEngine":
        # MinkowskiEngine uses names that Python 3.10 moved.
        import collections
        import collections.abc

        collections.Sequence = collections.abc.Sequence  # pyright: ignore
    try:
        module = importlib.import_module(name)
        if name == "spconv.pytorch" and device.type == "cpu":
            algo = load_peer(ORIGINAL, device).algo
    except ImportError as error:
        raise CommandError(
            f"--backend {backend} needs {name}, which is not installed: {error}"
        ) from error
    if backend == "original" and device.type == "cpu":
        # Both originals give wrong results with several threads on a CPU.
        torch.set_num_threads(1)
    return module, algo


def _same_start(first: nn.Module, second: nn.Module) -> None:
    """Copy the weights, whose layout is the same in both libraries."""
    second.load_state_dict(first.state_dict())


def _run_minkunet(library: ModuleType) -> Callable[..., Tensor]:
    def run(net: nn.Module, feats: Tensor, coords: Tensor) -> Tensor:
        return net(library.SparseTensor(feats, coordinates=coords)).F

    return run


def _forward_minkunet(run: Callable[..., Tensor]) -> Forward:
    return lambda net, batch: run(net, batch.feats, batch.coords)


def _run_spunet(library: ModuleType) -> Callable[..., Tensor]:
    def run(
        net: nn.Module, feats: Tensor, coords: Tensor, shape: Sequence[int], batch_size: int
    ) -> Tensor:
        out, _ = net(library.SparseConvTensor(feats, coords, list(shape), batch_size))
        return out.features

    return run


def _forward_spunet(run: Callable[..., Tensor]) -> Forward:
    """Run on a grid that holds the batch; the first one has half as much room again.

    The network halves the grid four times. Later grids are the first one where it is large enough,
    so that one CUDA graph serves all batches.
    """
    first: list[tuple[int, ...]] = []

    def forward(net: nn.Module, batch: Sample) -> Tensor:
        batch_size, *extents = (last + 1 for last in batch.coords.amax(dim=0).tolist())
        if not first:
            first.append(tuple(-(-3 * extent // 32) * 16 for extent in extents))
        shape = first[0]
        if any(extent > room for extent, room in zip(extents, shape, strict=True)):
            shape = tuple(-(-extent // 16) * 16 for extent in extents)
        return run(net, batch.feats, batch.coords, shape=shape, batch_size=batch_size)

    return forward
