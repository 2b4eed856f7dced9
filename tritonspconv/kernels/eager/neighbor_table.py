"""Neighbour tables: which row each row relates to through each tap (vectorised torch)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tritonspconv.kernels.eager._row_search import found_rows, sites_of
from tritonspconv.kernels.eager.invert_table import Table, invert_table, with_mask
from tritonspconv.kernels.eager.sites import build_index, key_coords
from tritonspconv.kernels.index import CellGrid, SiteIndex


def lookup_table(
    coords: Tensor,
    offsets: tuple[tuple[int, ...], ...],
    index: SiteIndex,
    grid: CellGrid,
) -> Table:
    """Build the table of a submanifold geometry: every row looks its own neighbours up.

    See :func:`tritonspconv.kernels.triton.neighbor_table.lookup_table` for the arguments.
    """
    n, volume, ndim = coords.shape[0], len(offsets), coords.shape[1] - 1
    rows = torch.full((volume, n), -1, dtype=torch.int32, device=coords.device)
    own = torch.arange(n, device=coords.device)
    zero = (0,) * ndim
    # Of opposite taps one is searched: who finds whom through the other is known then.
    opposite = {
        v: volume - 1 - v
        for v, offset in enumerate(offsets)
        if offset > zero and offsets[volume - 1 - v] == tuple(-x for x in offset)
    }
    searched = [v for v, offset in enumerate(offsets) if v not in opposite and offset != zero]
    wanted = tuple(offsets[v] for v in searched)
    sites = sites_of(index, grid)
    for place, found in _found_by_row(coords, sites, grid, (1,) * ndim, wanted, sites, grid):
        rows[searched[place]] = found
    for v, mirror in opposite.items():
        finder = torch.nonzero(rows[mirror] >= 0).squeeze(1)
        found = rows[mirror].index_select(0, finder).long()
        rows[v].index_copy_(0, found, finder.int())
    for v, offset in enumerate(offsets):
        if offset == zero:
            rows[v] = own
    return with_mask(rows)


def reach_table(
    out_coords: Tensor,
    offsets: tuple[tuple[int, ...], ...],
    stride: tuple[int, ...],
    divide: bool,
    in_index: SiteIndex,
    in_grid: CellGrid,
    out_grid: CellGrid,
    out_index: SiteIndex | None = None,
) -> Table:
    """Build the table of any geometry: every output looks up the inputs that reach it.

    See :func:`tritonspconv.kernels.triton.neighbor_table.reach_table` for the arguments.
    """
    rows = torch.full(
        (len(offsets), len(out_coords)), -1, dtype=torch.int32, device=out_coords.device
    )
    out_index = out_index or build_index(out_coords, out_grid)
    out_sites, in_sites = sites_of(out_index, out_grid), sites_of(in_index, in_grid)
    if divide:
        search = _found_by_row(out_coords, out_sites, out_grid, stride, offsets, in_sites, in_grid)
        for v, found in search:
            rows[v] = found
        return with_mask(rows)
    # The inputs are coarse, and find the outputs.
    assert in_sites.rows is not None, "a sorted index has rows"
    in_coords = key_coords(in_sites.table, in_grid)
    for v, found in found_rows(in_coords, in_grid, stride, offsets, out_sites, out_grid):
        finder = torch.nonzero(found >= 0).squeeze(1)
        targets = found.index_select(0, finder).long()
        rows[v].index_copy_(0, targets, in_sites.rows.index_select(0, finder).int())
    return with_mask(rows)


def _found_by_row(
    coords: Tensor,
    sites: SiteIndex,
    grid: CellGrid,
    stride: tuple[int, ...],
    offsets: tuple[tuple[int, ...], ...],
    fine: SiteIndex,
    fine_grid: CellGrid,
) -> Iterator[tuple[int, Tensor]]:
    """Yield what :func:`found_rows` does for the rows of ``coords``; -1 for a row that is no site.

    ``sites`` is the index of those that are.
    """
    order = sites.rows
    assert order is not None, "a sorted index has rows"
    own = torch.arange(coords.shape[0], device=coords.device)
    if torch.equal(order, own):
        yield from found_rows(coords, grid, stride, offsets, fine, fine_grid)
        return
    by_key = coords.index_select(0, order)
    for v, found in found_rows(by_key, grid, stride, offsets, fine, fine_grid):
        yield v, found.new_full(own.shape, -1).index_copy_(0, order, found)


def reverse_table(
    rows: Tensor,
    in_coords: Tensor,
    offsets: tuple[tuple[int, ...], ...],
    stride: tuple[int, ...],
    divide: bool,
    in_index: SiteIndex,
    out_index: SiteIndex,
    in_grid: CellGrid,
    out_grid: CellGrid,
    order: Tensor | None = None,
) -> Table:
    """Build the table of a map's inputs; from that of the outputs, without looking up.

    See :func:`tritonspconv.kernels.triton.neighbor_table.reverse_table` for the arguments.
    """
    return invert_table(rows, order, in_coords.shape[0], offsets)
