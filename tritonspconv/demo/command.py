"""Run two LiDAR networks on one scan: a table of their layers, a check and a picture.

Without arguments the scan is simulated; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import compat.spconv.pytorch as spconv
from tritonspconv.demo.layer_check import CheckResult, check_layers
from tritonspconv.demo.layer_profile import LayerProfiler, LayerRecord, print_columns, print_table
from tritonspconv.demo.level_picture import Level, draw_levels
from tritonspconv.demo.scenes import (
    DTYPES,
    add_scan_arguments,
    at_least_one,
    autocast,
    choose_device,
    describe,
    read_scans,
    second_shape,
    unet_shape,
    voxelize,
)
from tritonspconv.kernels import has_numba
from tritonspconv.models.lidar import second_encoder, sparse_unet
from tritonspconv.points import VoxelGrid, voxel_range

# If a scan has fewer voxels, a level of a network may hold a single one.
FEW_VOXELS = 1000
# Levels of the SECOND encoder: stride, and the input voxel (z, y, x) that voxel 0 is centred on.
SECOND_LEVELS = {
    "conv1": (1, (0, 0, 0)),
    "conv2": (2, (0, 0, 0)),
    "conv3": (4, (0, 0, 0)),
    "conv4": (8, (4, 0, 0)),
}


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Run the demonstration; return the exit status and the report."""
    dtype = DTYPES[args.dtype]
    device = choose_device(args.device)
    _say(f"tritonspconv demo on {describe(device)}, {args.dtype}, torch {torch.__version__}")
    if device.type == "cpu" and not has_numba(device):
        _say("numba is not installed: layers take several times as long without it")
        _say("  to install it: pip install 'tritonspconv[cpu]'")
    scans = read_scans(args, args.batch_size)

    grid = voxel_range(scans[0])
    feats, indices = voxelize(scans, grid, device)
    z, y, x = grid.spatial_shape
    sizes = " x ".join(f"{100 * size:.3g}" for size in grid.voxel_size)
    _say(f"{len(feats):,} voxels of {sizes} cm in a grid of {x} x {y} x {z} (x, y, z)")

    _say("checking one layer of each kind against the reference in float64")
    checks = check_layers(spconv, indices, device, dtype)
    passed = _report(checks)

    stages, second_layers = _run_second(feats, indices, grid, args.batch_size, dtype)
    picture = args.out / "levels.png" if importlib.util.find_spec("matplotlib") else None
    source = args.scan.name if args.scan else f"simulated street, seed {args.seed}"
    levels = [
        Level(name, (stride, stride, stride), stages[name].indices, centre)
        for name, (stride, centre) in SECOND_LEVELS.items()
    ]
    if picture is None:
        _say("no picture: matplotlib is not installed (pip install 'tritonspconv[demo]')")
    else:
        draw_levels(picture, grid, levels, f"Active voxels in the SECOND encoder: {source}")
        _say(f"wrote {picture}")
    _, unet_layers = _run_unet(feats, indices, grid, args.batch_size, dtype)
    if not passed:
        _say("FAIL: a layer differs from the reference")
    report = {
        "device": describe(device),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "voxels": len(feats),
        "picture": picture,
        "passed": passed,
        "checks": [asdict(check) | {"passed": check.passed} for check in checks],
        "SECOND encoder": [asdict(layer) for layer in second_layers],
        "sparse U-Net": [asdict(layer) for layer in unet_layers],
    }
    return int(not passed), report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_scan_arguments(parser)
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_out"), help="folder of the picture (demo_out)"
    )
    parser.add_argument(
        "--batch-size",
        type=at_least_one,
        default=1,
        help="simulated streets, or copies of the scan, in the batch (default 1)",
    )


# The stages of a network, and the measurements of its layers.
Run = tuple[dict[str, Any], list[LayerRecord]]


def _say(text: str) -> None:
    print(text, flush=True)


def _run_second(
    feats: Tensor, indices: Tensor, grid: VoxelGrid, batch_size: int, dtype: torch.dtype
) -> Run:
    torch.manual_seed(0)
    network = second_encoder(spconv).to(feats.device)
    shape = second_shape(grid)
    return _run("SECOND encoder", network, feats, indices, shape, batch_size, dtype)


def _run_unet(
    feats: Tensor, indices: Tensor, grid: VoxelGrid, batch_size: int, dtype: torch.dtype
) -> Run:
    torch.manual_seed(0)
    network = sparse_unet(spconv).to(feats.device)
    return _run("sparse U-Net", network, feats, indices, unet_shape(grid), batch_size, dtype)


def _run(
    title: str,
    network: nn.Module,
    feats: Tensor,
    indices: Tensor,
    shape: list[int],
    batch_size: int,
    dtype: torch.dtype,
) -> Run:
    """Train ``network`` for a step, print the table of its layers, and return stages and layers."""
    weights = sum(parameter.numel() for parameter in network.parameters())
    _say(f"\n{title}: {weights / 1e6:.1f} M weights; forward and backward")
    on_gpu = feats.device.type == "cuda"
    if len(feats) < FEW_VOXELS:
        normalise_lone_voxels(network)
    profiler = LayerProfiler(spconv, network, feats.device)
    stages: dict[str, Any] = {}
    # On a GPU the first pass compiles the kernels; the median of three more is shown.
    for number in range(4 if on_gpu else 1):
        start = time.perf_counter()
        with autocast(feats.device, dtype):
            out, stages = network(spconv.SparseConvTensor(feats, indices, shape, batch_size))
            # No voxel reaches the output of a network for a scan of a few points.
            loss = out.features.float().square().sum() / max(1, out.features.numel())
        network.zero_grad()
        loss.backward()
        value = loss.item()
        seconds = time.perf_counter() - start
        warm_up = on_gpu and number == 0
        _say(f"  {'warm-up' if warm_up else 'pass'}: {1e3 * seconds:,.0f} ms, loss {value:.4f}")
        if warm_up:
            profiler.forget()
    print_table(profiler.records)
    _say("  (the first layer on a set of voxels also builds the kernel map that the others reuse)")
    return stages, profiler.records


def normalise_lone_voxels(network: nn.Module) -> None:
    """Let batch norms use their running statistics where fewer than two voxels reach them.

    A single value has no variance, so torch refuses to normalise one row in training.
    """

    def choose_statistics(module: nn.Module, inputs: tuple[Tensor]) -> None:
        module.train(len(inputs[0]) > 1)

    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.register_forward_pre_hook(choose_statistics)


def _report(results: list[CheckResult]) -> bool:
    """Print the results of the check; return whether all are right."""
    rows = [
        (
            result.layer,
            "ok" if result.passed else "FAIL",
            f"{result.rows:,}",
            *("-" if error is None else f"{error:.1e}" for error in result.errors),
        )
        for result in results
    ]
    header = ("layer", "", "voxels out", "output", "grad features", "grad weight")
    print_columns(header, rows, left=2)
    return all(result.passed for result in results)
