"""What the scripts run on: scans, the voxels made of them, and the networks' grids."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compat.spconv.pytorch.utils import PointToVoxel
from tritonspconv.points import VoxelGrid, load_points
from tritonspconv.testing.lidar import simulate_sweep

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_device(name: str | None) -> torch.device:
    """Return the device called ``name``; None: a GPU where there is one.

    Raises:
        ValueError: A GPU is asked for, and there is none.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device must be available; got {name}, and torch {torch.__version__} finds no GPU. "
            "Use --device cpu to run on the CPU."
        )
    return device


def describe(device: torch.device) -> str:
    """Return the name of the GPU, or ``CPU``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def read_scans(path: Path | None, seed: int, batch_size: int) -> list[Tensor]:
    """Return the point clouds of a batch, each float32 ``[N, 4]``: x, y, z, intensity.

    Args:
        path: A file of one scan, which is repeated; None: streets are simulated.
        seed: Of the first street.
        batch_size: Number of clouds.
    """
    start = time.perf_counter()
    if path is None:
        scans = [simulate_sweep(seed + number).points for number in range(batch_size)]
        origin = "simulated"
    else:
        points = load_points(path)[:, :4]
        if points.shape[1] < 4:
            points = torch.cat([points, torch.zeros(len(points), 1)], dim=1)
        scans = [points] * batch_size
        origin = f"read {path}:"
    count = sum(map(len, scans))
    print(f"{origin} {count:,} points in {time.perf_counter() - start:.2f} s", flush=True)
    return scans


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
