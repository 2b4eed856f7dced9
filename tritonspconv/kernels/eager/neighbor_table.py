"""Neighbour tables: which row each row relates to through each tap (vectorised torch)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tritonspconv.kernels.eager._row_search import found_rows, sites_of
from tritonspconv.kernels.eager.invert_table import invert_table, table_of
from tritonspconv.kernels.eager.pairs import TapPairs
from tritonspconv.kernels.eager.sites import build_index
from tritonspconv.kernels.index import CellGrid, SiteIndex
from tritonspconv.kernels.keys import key_coords
from tritonspconv.kernels.table import NeighborTable


def lookup_table(
    coords: Tensor,
    offsets: tuple[tuple[int, ...], ...],
    index: SiteIndex,
    grid: CellGrid,
    *,
    distinct: bool = False,
    count: Tensor | None = None,
) -> NeighborTable:
    """Search half of the taps: the other half are the same pairs, swapped."""
    n, volume, ndim = coords.shape[0], len(offsets), coords.shape[1] - 1
    zero = (0,) * ndim
    # Search one of two opposite taps: the other has the same pairs, swapped.
    opposite = {
        v: volume - 1 - v
        for v, offset in enumerate(offsets)
        if offset > zero and offsets[volume - 1 - v] == tuple(-x for x in offset)
    }
    searched = [v for v, offset in enumerate(offsets) if v not in opposite and offset != zero]
    wanted = tuple(offsets[v] for v in searched)
    sites = sites_of(index, grid)
    assert sites.rows is not None, "a sorted index has rows"
    by_key = coords.index_select(0, sites.rows)
    none = coords.new_empty(0)
    taps = [(none, none)] * volume
    centres = [v for v, offset in enumerate(offsets) if offset == zero]
    own = torch.arange(n, dtype=torch.int32, device=coords.device)
    if count is not None:
        own = own[: int(count)]
    # The centre need not be listed if it pairs all rows.
    identity = centres[0] if centres and count is None else None
    for v in centres:
        if v != identity:
            taps[v] = own, own
    for place, finder, found in found_rows(
        by_key, grid, (1,) * ndim, wanted, sites, grid, own_sites=True
    ):
        taps[searched[place]] = sites.rows.index_select(0, finder), found
    for v, mirror in opposite.items():
        finder, found = taps[mirror]
        taps[v] = found, finder
    return table_of(TapPairs.joined(taps, identity), n, count)


def reach_table(
    out_coords: Tensor,
    offsets: tuple[tuple[int, ...], ...],
    stride: tuple[int, ...],
    divide: bool,
    in_index: SiteIndex,
    in_grid: CellGrid,
    out_grid: CellGrid,
    out_index: SiteIndex | None = None,
    *,
    count: Tensor | None = None,
) -> NeighborTable:
    """Search from the coarse side. The coarse side may be the inputs or the outputs."""
    out_index = out_index or build_index(out_coords, out_grid)
    out_sites, in_sites = sites_of(out_index, out_grid), sites_of(in_index, in_grid)
    assert out_sites.rows is not None, "a sorted index has rows"
    assert in_sites.rows is not None, "a sorted index has rows"
    none = out_coords.new_empty(0)
    taps = [(none, none)] * len(offsets)
    # Coarse sites look for fine ones. The coarse sites may be inputs or outputs.
    if divide:
        coarse = out_coords.index_select(0, out_sites.rows)
        for v, finder, found in found_rows(coarse, out_grid, stride, offsets, in_sites, in_grid):
            taps[v] = out_sites.rows.index_select(0, finder), found
    else:
        coarse = key_coords(in_sites.table, in_grid)
        for v, finder, found in found_rows(coarse, in_grid, stride, offsets, out_sites, out_grid):
            taps[v] = found, in_sites.rows.index_select(0, finder)
    return table_of(TapPairs.joined(taps), out_coords.shape[0], count)


def reverse_table(
    rows: Tensor,
    in_coords: Tensor,
    offsets: tuple[tuple[int, ...], ...],
    stride: tuple[int, ...],
    divide: bool,
    in_index: SiteIndex | None,
    out_index: SiteIndex,
    in_grid: CellGrid,
    out_grid: CellGrid,
    order: Tensor | None = None,
    *,
    count: Tensor | None = None,
    in_count: Tensor | None = None,
    invert: Callable[..., NeighborTable] = invert_table,
) -> NeighborTable:
    """Invert the table of the outputs by ``invert``, without looking up."""
    n_in = in_coords.shape[0]
    return invert(rows, order, n_in, offsets, count=count, other_count=in_count)
