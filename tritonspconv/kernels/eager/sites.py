"""Index of given sites, and the sorted unique set of generated ones (vectorised torch)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels.eager._stable_sort import distinct, stable_sort
from tritonspconv.kernels.index import CellGrid, ReachedSites, SiteIndex
from tritonspconv.kernels.keys import cell_keys, coord_keys, key_coords
from tritonspconv.kernels.window import Window, reach_steps

_INT32_LAST, _SORTED_LAST = 2**31 - 1, 2**63 - 1


def without_outsiders(coords: Tensor, grid: CellGrid) -> Tensor:
    """Return a copy of ``coords`` in which rows outside ``grid`` have batch index -1."""
    coords = coords.clone()
    coords[:, 0] = coords[:, 0].where(coord_keys(coords, grid) >= 0, -1)
    return coords


def tap_keys(
    coords: Tensor,
    offset: tuple[int, ...],
    stride: tuple[int, ...],
    divide: bool,
    grid: CellGrid,
    limit: tuple[int, ...] | None = None,
) -> Tensor:
    """Return the key of the site that a tap relates to each row; -1 if there is none.

    ``divide=False``: ``fine = stride * coarse + offset``. ``divide=True``: rows are fine and the
    coarse site exists only where the division leaves a remainder below ``limit``; None: no
    remainder.
    """
    cells = []
    exists = None
    limits = limit or (1,) * len(stride)
    for axis, (off, step, most) in enumerate(zip(offset, stride, limits, strict=True), start=1):
        cell = coords[:, axis].long()
        if not divide:
            cells.append(cell * step + off)
            continue
        moved = cell - off
        quotient = torch.div(moved, step, rounding_mode="floor")
        if most < step:
            fits = moved - quotient * step < most
            exists = fits if exists is None else exists & fits
        cells.append(quotient)
    keys = cell_keys(coords[:, 0], cells, grid)
    return keys if exists is None else torch.where(exists, keys, -1)


def build_index(coords: Tensor, grid: CellGrid) -> SiteIndex:
    """Index ``coords`` [N, 1 + D] by key; rows outside the grid are left out.

    A stable sort puts the lowest of repeated rows first, and a left-sided search finds it.
    """
    keys = coord_keys(coords, grid)
    keys = torch.where(keys < 0, _SORTED_LAST, keys)
    if keys.device.type == "cpu" and bool((keys[1:] >= keys[:-1]).all()):
        return SiteIndex("sorted", keys, torch.arange(keys.shape[0], device=keys.device))
    if grid.num_cells <= _INT32_LAST:
        keys = keys.clamp(max=_INT32_LAST).int()
    keys, rows = stable_sort(keys)
    return SiteIndex("sorted", keys.long(), rows)


def find_rows(index: SiteIndex, keys: Tensor) -> Tensor:
    """Return the int64 row of each key, -1 where it is negative or not in the index."""
    if index.table.shape[0] == 0:
        return torch.full_like(keys, -1)
    at = torch.searchsorted(index.table, keys).clamp_(max=index.table.shape[0] - 1)
    assert index.rows is not None, "a sorted index has rows"
    return torch.where((index.table[at] == keys) & (keys >= 0), index.rows[at], -1)


def reached_sites(
    coords: Tensor,
    offsets: Window,
    stride: tuple[int, ...],
    divide: bool,
    grid: CellGrid,
    own_grid: CellGrid,
    flag: Tensor | None = None,
    capacity: int | None = None,
    overflow: Tensor | None = None,
) -> ReachedSites:
    """Sort the keys of all cells that are reached."""
    batch, *cells = _insiders(coords, own_grid).long().unbind(1)
    # Steps share the part of the key that an axis gives, and whether it exists.
    axes: list[dict[tuple[int, int], tuple[Tensor, Tensor]]] = [{} for _ in cells]
    in_batch = batch < grid.batch_size
    reached = []
    for offset, limit in reach_steps(offsets, stride, divide):
        key, exists = batch, in_batch
        for axis, step in enumerate(zip(offset, limit, strict=True)):
            if step not in axes[axis]:
                axes[axis][step] = _reached_along(
                    cells[axis], *step, stride[axis], divide, grid, axis
                )
            part, fits = axes[axis][step]
            key, exists = key * grid.shape[axis] + part, exists & fits
        reached.append(key[exists])
    found = torch.cat(reached)
    # int32 keys take two thirds of the time to sort.
    keys = distinct(found.int() if grid.num_cells <= _INT32_LAST else found).long()
    if overflow is not None and capacity is not None:
        overflow.fill_(keys.shape[0] > capacity)
        keys = keys[:capacity]
    coords = key_coords(keys, grid)
    index = SiteIndex("sorted", keys, torch.arange(keys.shape[0], device=keys.device))
    is_set = None if flag is None else bool(flag)
    if capacity is None:
        return ReachedSites(coords, index, is_set)
    missing = coords.new_full((capacity - len(coords), coords.shape[1]), -1)
    count = torch.tensor(len(coords), device=coords.device)
    return ReachedSites(torch.cat([coords, missing]), index, is_set, count)


def _reached_along(
    cell: Tensor, offset: int, limit: int, stride: int, divide: bool, grid: CellGrid, axis: int
) -> tuple[Tensor, Tensor]:
    """Return the cell that a step leads to along one axis, and whether the grid has it."""
    moved = cell - offset if divide else cell * stride + offset
    target = torch.div(moved, stride, rounding_mode="floor") if divide else moved
    inside = target - grid.lower[axis]
    fits = (inside >= 0) & (inside < grid.shape[axis])
    if divide and limit < stride:
        fits &= moved - target * stride < limit
    return inside, fits


def _insiders(coords: Tensor, grid: CellGrid) -> Tensor:
    """Return the rows of ``coords`` in ``grid``; ``coords`` itself if these are all."""
    if coords.shape[0] == 0:
        return coords
    first, last = torch.stack(torch.aminmax(coords, dim=0)).tolist()
    lower = (0, *grid.lower)
    upper = [lo + extent for lo, extent in zip(lower, (grid.batch_size, *grid.shape), strict=True)]
    axes = zip(first, last, lower, upper, strict=True)
    if all(lo <= low and high < up for low, high, lo, up in axes):
        return coords
    return coords[coord_keys(coords, grid) >= 0]
