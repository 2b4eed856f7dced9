"""The table of a map whose inputs feed one output at most: each input writes itself (numba)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tritonspconv.kernels.eager import scatter_table as eager
from tritonspconv.kernels.index import CellGrid, SiteIndex
from tritonspconv.kernels.numba._compile import compiled
from tritonspconv.kernels.numba.invert_table import table_of
from tritonspconv.kernels.table import NeighborTable
from tritonspconv.kernels.window import IntTuple, tap_steps, window_corner


def scatter_table(
    in_coords: Tensor,
    offsets: tuple[IntTuple, ...],
    stride: IntTuple,
    divide: bool,
    out_index: SiteIndex,
    in_grid: CellGrid,
    out_grid: CellGrid,
    n_out: int,
    *,
    count: Tensor | None = None,
    reached: Tensor | None = None,
) -> tuple[NeighborTable, Tensor]:
    """Write each row to the output that it reaches; where that is not known, torch looks it up."""
    if reached is None:
        return eager.scatter_table(
            in_coords, offsets, stride, divide, out_index, in_grid, out_grid, n_out, count=count
        )
    rows = in_coords.new_full((len(offsets), n_out), -1)
    repeats = _scatter(
        in_coords.contiguous().numpy(),
        reached.numpy(),
        np.array(window_corner(offsets)),
        np.array([max(axis) - min(axis) + 1 for axis in zip(*offsets, strict=True)]),
        # An input that does not divide has one tap.
        np.array(stride if divide else (1,) * len(stride)),
        np.array(tap_steps(offsets)),
        rows.numpy(),
    )
    return table_of(rows, count), torch.tensor([int(repeats)], dtype=torch.int32)


@compiled
def _scatter(coords, reached, corner, widths, stride, steps, rows):
    """Write rows to their tap and output, the lowest of those that repeat; return if any does."""
    repeats = False
    for row in range(coords.shape[0]):
        site = reached[row]
        if site < 0:
            continue
        tap, inside = np.int64(0), True
        for axis in range(stride.shape[0]):
            step = stride[axis]
            moved = coords[row, 1 + axis] - corner[axis]
            # A division takes as long as all the rest.
            place = moved & (step - 1) if step & (step - 1) == 0 else moved % step
            inside &= place < widths[axis]
            tap += place * steps[axis]
        if not inside:
            continue
        if rows[tap, site] < 0:
            rows[tap, site] = row
        else:
            repeats = True
    return repeats
