"""Scenes for the scripts: scans, the voxels made of them, and the networks' grids."""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compat.spconv.pytorch.utils import PointToVoxel
from tritonspconv.points import Scan, VoxelGrid, parse_columns, read_scan
from tritonspconv.testing.lidar import simulate_sweep

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_device(name: str | None) -> torch.device:
    """Return the device called ``name``; None: a GPU where there is one.

    Raises:
        ValueError: The name is no GPU or CPU, or this machine has no such GPU.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N; got {name!r}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device must be available; got {name}, and torch {torch.__version__} finds no GPU. "
            "Use --device cpu to run on the CPU."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device must be available; got {name}, and the GPUs of this machine are cuda:0 to "
            f"cuda:{torch.cuda.device_count() - 1}."
        )
    return device


def describe(device: torch.device) -> str:
    """Return the name of the GPU, or ``CPU``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def at_least_one(text: str) -> int:
    """Return a number of an argument.

    Raises:
        ArgumentTypeError: It is no whole number, or less than one.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return number


def add_scan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a scan and say how to read it."""
    parser.add_argument(
        "scan",
        nargs="?",
        type=Path,
        help=".bin .npy .npz .pcd .ply .las .laz .e57 .txt .xyz .csv; simulated if left out",
    )
    parser.add_argument(
        "--columns",
        type=_columns,
        metavar="x,y,z,...",
        help="the columns of the file; _ skips one (default: as the file names them, or assumed)",
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="metres in a unit of the file (default 1)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the simulated street and of weights (default 0)"
    )


def _columns(text: str) -> tuple[str, ...]:
    try:
        return parse_columns(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_scans(args: argparse.Namespace, batch_size: int) -> list[Tensor]:
    """Return the point clouds of a batch, each float32 ``[N, 4]``: x, y, z, intensity.

    Args:
        args: Parsed arguments of `add_scan_arguments`. A scan is repeated; without one, streets are
            simulated.
        batch_size: Number of clouds.
    """
    start = time.perf_counter()
    if args.scan is None:
        scans = [simulate_sweep(args.seed + number).points for number in range(batch_size)]
        count = sum(map(len, scans))
        print(f"simulated {count:,} points in {time.perf_counter() - start:.2f} s", flush=True)
        return scans
    scan = read_scan(args.scan, args.columns, scale=args.scale)
    print(*scan.describe(), sep="\n", flush=True)
    return [with_intensity(scan)] * batch_size


def with_intensity(scan: Scan) -> Tensor:
    """Return x, y, z and the intensity, or zeros where the scan has none; float32 ``[N, 4]``."""
    if "intensity" in scan.columns:
        number = scan.columns.index("intensity")
        return scan.points[:, [0, 1, 2, number]]
    return torch.nn.functional.pad(scan.points[:, :3], (0, 1))


def voxelize(scans: list[Tensor], grid: VoxelGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean features float32 ``[N, 4]`` and indices int32 ``[N, 4]`` of the whole batch."""
    most = max(map(len, scans))
    to_voxel = PointToVoxel(list(grid.voxel_size), list(grid.point_range), 4, most, 10, device)
    feats, indices = [], []
    for number, points in enumerate(scans):
        voxels, cells, counts = to_voxel(points.to(device))
        feats.append(voxels.sum(dim=1) / counts[:, None])
        indices.append(nn.functional.pad(cells, (1, 0), value=number))
    return torch.cat(feats), torch.cat(indices)


def second_shape(grid: VoxelGrid) -> list[int]:
    """Return the spatial shape that the SECOND encoder expects: one voxel more along z."""
    z, y, x = grid.spatial_shape
    return [z + 1, y, x]


def unet_shape(grid: VoxelGrid) -> list[int]:
    """Return a spatial shape for the U-Net's four halvings.

    Other extents would lose the voxels of the last, odd slice.
    """
    return [-(-extent // 16) * 16 for extent in grid.spatial_shape]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Return autocast to ``dtype``; nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)
