"""Keys of cells: int64 numbers that ascend with (batch, coordinates), in torch on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels.index import CellGrid


def cell_keys(batch: Tensor, cells: list[Tensor], grid: CellGrid) -> Tensor:
    """Return int64 keys of (batch, spatial coordinates), ascending with them; -1 outside the grid.

    Args:
        batch: int [N].
        cells: int [N] for each spatial axis.
        grid: The grid.
    """
    valid = (batch >= 0) & (batch < grid.batch_size)
    key = batch.long()
    for cell, lower, extent in zip(cells, grid.lower, grid.shape, strict=True):
        inside = cell.long() - lower
        valid &= (inside >= 0) & (inside < extent)
        key = key * extent + inside
    return torch.where(valid, key, -1)


def key_coords(keys: Tensor, grid: CellGrid) -> Tensor:
    """Return int32 coordinates [N, 1 + D] of ``keys`` [N]; the inverse of :func:`cell_keys`."""
    ndim = len(grid.shape)
    coords = torch.empty(keys.shape[0], 1 + ndim, dtype=torch.int32, device=keys.device)
    for axis in range(ndim, 0, -1):
        extent = max(grid.shape[axis - 1], 1)
        quotient = torch.div(keys, extent, rounding_mode="floor")
        coords[:, axis] = keys - quotient * extent + grid.lower[axis - 1]
        keys = quotient
    coords[:, 0] = keys
    return coords


def coord_keys(coords: Tensor, grid: CellGrid) -> Tensor:
    """Return int64 keys [N] of ``coords`` [N, 1 + D]; -1 outside the grid."""
    return cell_keys(coords[:, 0], list(coords[:, 1:].unbind(1)), grid)
