"""Index of given sites, and the sorted unique set of generated ones (numba)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels.eager import sites as eager
from tritonspconv.kernels.index import CellGrid, ReachedSites, SiteIndex
from tritonspconv.kernels.numba._reach import coords_of, reached_keys, window_steps
from tritonspconv.kernels.numba._sorted_keys import sorted_keys
from tritonspconv.kernels.window import IntTuple, Window


def build_index(coords: Tensor, grid: CellGrid) -> SiteIndex:
    """Sort keys by radix; where key and row do not fit one word, torch sorts."""
    found = sorted_keys(coords.contiguous().numpy(), grid)
    if found is None:
        return eager.build_index(coords, grid)
    keys, rows = found
    return SiteIndex("sorted", torch.from_numpy(keys), torch.from_numpy(rows))


def reached_sites(
    coords: Tensor,
    offsets: Window,
    stride: IntTuple,
    divide: bool,
    grid: CellGrid,
    own_grid: CellGrid,
    flag: Tensor | None = None,
    capacity: int | None = None,
    overflow: Tensor | None = None,
) -> ReachedSites:
    """Collect the keys of all cells that are reached, in a bitmap or a sorted list."""
    steps = window_steps(offsets, stride, divide)
    found = reached_keys(coords.contiguous().numpy(), own_grid, steps, stride, divide, grid)
    if found is None:
        return eager.reached_sites(
            coords, offsets, stride, divide, grid, own_grid, flag, capacity, overflow
        )
    keys = found.keys
    reached = None
    if capacity is None and found.reached is not None:
        reached = torch.from_numpy(found.reached)
    if overflow is not None and capacity is not None:
        overflow.fill_(len(keys) > capacity)
        keys = keys[:capacity]
    made = torch.from_numpy(coords_of(keys, grid, len(keys) if capacity is None else capacity))
    index = SiteIndex(
        "sorted", torch.from_numpy(keys), torch.arange(len(keys), device=coords.device)
    )
    count = None if capacity is None else torch.tensor(len(keys), device=coords.device)
    return ReachedSites(made, index, None if flag is None else bool(flag), count, reached)
