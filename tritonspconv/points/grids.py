"""Voxel grids: three usual grids for LiDAR, and a choice of grid for a scan."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class VoxelGrid:
    """A box of equal voxels.

    Attributes:
        point_range: Lower x, y, z, then upper x, y, z, in metres.
        voxel_size: Metres along x, y, z.

    Example:
        >>> VoxelGrid((0, -40, -3, 70.4, 40, 1), (0.05, 0.05, 0.1)).spatial_shape
        [40, 1600, 1408]
    """

    point_range: tuple[float, float, float, float, float, float]
    voxel_size: tuple[float, float, float]

    @property
    def spatial_shape(self) -> list[int]:
        """Number of voxels along z, y, x."""
        lower, upper = self.point_range[:3], self.point_range[3:]
        axes = zip(lower, upper, self.voxel_size, strict=True)
        return [round((high - low) / size) for low, high, size in axes][::-1]


FRONT_CROP = VoxelGrid((0.0, -40.0, -3.0, 70.4, 40.0, 1.0), (0.05, 0.05, 0.1))
SURROUND = VoxelGrid((-76.8, -76.8, -2.0, 76.8, 76.8, 6.0), (0.1, 0.1, 0.15))
FINE = VoxelGrid((-76.8, -76.8, -2.0, 76.8, 76.8, 6.0), (0.05, 0.05, 0.05))


def voxel_range(points: Tensor) -> VoxelGrid:
    """Choose a voxel grid for a scan.

    A scan that is cropped to the front camera gets KITTI's usual grid. A scan around a vehicle gets
    a box of 153.6 m. Any other scan (a room, a tile of a map) gets a box around 99.8 % of its
    points with at most 1,500 voxels a side and voxels of at least 2 cm.

    Args:
        points: ``[N, F]`` with x, y, z first, in metres; N >= 1.

    Example:
        >>> import torch
        >>> voxel_range(torch.tensor([[1.0, 2.0, 3.0]])).spatial_shape
        [32, 32, 32]
    """
    ordered = points[:, :3].double().sort(dim=0).values
    trim = len(points) // 1000
    lower, upper = ordered[trim], ordered[-1 - trim]
    extent = upper - lower
    if bool(ordered[0, 0] >= 0) and _share(points, FRONT_CROP) > 0.9 and extent[0] > 20:
        return FRONT_CROP
    if _share(points, SURROUND) > 0.95 and extent[:2].amin() > 20:
        return SURROUND
    size = max(0.02, float(extent.amax()) / 1500)
    # A flat cloud still gets 32 voxels a side: the networks halve the grid up to four times.
    cells = [max(32, int(value / size) + 4) for value in extent.tolist()]
    middle = (0.5 * (lower + upper)).tolist()
    low = [
        size * math.floor(at / size - count / 2) for at, count in zip(middle, cells, strict=True)
    ]
    high = [start + size * count for start, count in zip(low, cells, strict=True)]
    return VoxelGrid((low[0], low[1], low[2], high[0], high[1], high[2]), (size, size, size))


def _share(points: Tensor, grid: VoxelGrid) -> float:
    """Return the share of the points that lies inside the grid."""
    bounds = points.new_tensor(grid.point_range)
    inside = (points[:, :3] >= bounds[:3]) & (points[:, :3] < bounds[3:])
    return float(inside.all(dim=1).float().mean())
