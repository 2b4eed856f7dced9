"""Neighbour tables: which row each row relates to through each tap (numba)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tritonspconv.kernels.eager import neighbor_table as eager
from tritonspconv.kernels.index import CellGrid, SiteIndex
from tritonspconv.kernels.numba._row_search import (
    mirrored_runs,
    plain_runs,
    roomy_grid,
    search,
    sites_in,
)
from tritonspconv.kernels.numba.invert_table import invert_table, table_of
from tritonspconv.kernels.numba.sites import build_index
from tritonspconv.kernels.table import NeighborTable
from tritonspconv.kernels.window import IntTuple


def lookup_table(
    coords: Tensor,
    offsets: tuple[IntTuple, ...],
    index: SiteIndex,
    grid: CellGrid,
    *,
    distinct: bool = False,
    count: Tensor | None = None,
) -> NeighborTable:
    """Search half of the taps; in grids that an int64 cannot number, torch searches."""
    unit, zero = (1,) * len(grid.shape), (0,) * len(grid.shape)
    roomy = roomy_grid(grid, unit, offsets, grid)
    if roomy is None:
        return eager.lookup_table(coords, offsets, index, grid, distinct=distinct, count=count)
    rows = coords.new_full((len(offsets), coords.shape[0]), -1, dtype=torch.int32)
    sites = sites_in(roomy, index, grid, unit)
    search(sites, sites, roomy, mirrored_runs(offsets), rows.numpy())
    # Every row sees itself, whether it is a site or not.
    real = coords.shape[0] if count is None else int(count)
    for own in (rows[v, :real] for v, offset in enumerate(offsets) if offset == zero):
        torch.arange(real, dtype=torch.int32, device=own.device, out=own)
    return table_of(rows, count)


def reach_table(
    out_coords: Tensor,
    offsets: tuple[IntTuple, ...],
    stride: IntTuple,
    divide: bool,
    in_index: SiteIndex,
    in_grid: CellGrid,
    out_grid: CellGrid,
    out_index: SiteIndex | None = None,
    *,
    count: Tensor | None = None,
) -> NeighborTable:
    """Search from the coarse side; in grids that an int64 cannot number, torch searches."""
    out_index = out_index or build_index(out_coords, out_grid)
    coarse, coarse_grid, fine, fine_grid = in_index, in_grid, out_index, out_grid
    if divide:
        coarse, coarse_grid, fine, fine_grid = fine, fine_grid, coarse, coarse_grid
    roomy = roomy_grid(coarse_grid, stride, offsets, fine_grid)
    if roomy is None:
        return eager.reach_table(
            out_coords, offsets, stride, divide, in_index, in_grid, out_grid, out_index, count=count
        )
    rows = out_coords.new_full((len(offsets), out_coords.shape[0]), -1, dtype=torch.int32)
    finders = sites_in(roomy, coarse, coarse_grid, stride)
    found = sites_in(roomy, fine, fine_grid, (1,) * len(stride))
    search(finders, found, roomy, plain_runs(offsets, divide), rows.numpy())
    return table_of(rows, count)


# Torch's launcher, by the inversion that numba compiles.
reverse_table = functools.partial(eager.reverse_table, invert=invert_table)
