"""A search for the fine row of every coarse row, offset by offset (torch)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tritonspconv.kernels.eager.sites import find_rows, tap_keys
from tritonspconv.kernels.index import CellGrid, SiteIndex
from tritonspconv.kernels.keys import key_coords

IntTuple = tuple[int, ...]

# Sums and differences of keys below these bounds fit an int32 and an int64.
_MAX_SHORT, MAX_LONG = 2**29, 2**61


def sites_of(index: SiteIndex, grid: CellGrid) -> SiteIndex:
    """Return a sorted index without repeated rows and rows outside the grid."""
    assert index.rows is not None, "a sorted index has rows"
    # Rows outside the grid come last; of repeated rows the first is the site.
    is_site = index.table < grid.num_cells
    is_site[1:] &= index.table[1:] != index.table[:-1]
    if bool(is_site.all()):
        return index
    return SiteIndex("sorted", index.table[is_site], index.rows[is_site])


def found_rows(
    coarse: Tensor,
    coarse_grid: CellGrid,
    stride: IntTuple,
    offsets: tuple[IntTuple, ...],
    fine: SiteIndex,
    fine_grid: CellGrid,
    own_sites: bool = False,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Find the row of ``stride * coarse + offset`` for every coarse site.

    Args:
        coarse: int32 [M, 1 + D], all in ``coarse_grid``; the search is fastest in key order.
        coarse_grid: Grid of the coarse sites.
        stride: Fine cells per coarse cell.
        offsets: The offsets of V taps.
        fine: Sorted index of the fine sites, see :func:`sites_of`.
        fine_grid: Grid of the fine sites.
        own_sites: The coarse sites are the fine ones, in the order of the index, and the stride is
            1.

    Yields:
        A tap; the coarse sites that find a row through it, int64 [P], ascending; and the fine rows
        that they find, int32 [P]. A tap comes at most once, in any order. Taps that find nothing
        may be left out.

    The keys count cells of a larger grid, with room beside the fine one. There the key of a
    neighbour is the own key plus a constant, also for a neighbour outside the fine grid. Neighbours
    along the last axis follow each other among the sorted keys, so one binary search finds a run.
    """
    taps = range(len(offsets))
    if coarse.shape[0] * fine.table.shape[0] < len(offsets):
        # If there are more taps than pairs of sites, most taps find nothing.
        taps = _reachable_taps(coarse, stride, offsets, key_coords(fine.table, fine_grid))
    if not taps:
        return
    extents = roomy_extents(coarse_grid, stride, offsets, fine_grid)
    cells = max(coarse_grid.batch_size, fine_grid.batch_size) * math.prod(extents)
    units = [math.prod(extents[axis + 1 :]) for axis in range(len(extents))]
    steps = [sum(o * unit for o, unit in zip(offset, units, strict=True)) for offset in offsets]
    reach = max(map(abs, steps))
    if cells + reach > MAX_LONG:
        # The larger grid has more cells than an int64 can number: search offset by offset.
        for v in taps:
            found = find_rows(fine, tap_keys(coarse, offsets[v], stride, False, fine_grid))
            finder = torch.nonzero(found >= 0).squeeze(1)
            yield v, finder, found.index_select(0, finder).int()
        return
    dtype = torch.int32 if cells + reach < _MAX_SHORT else torch.int64
    own = _keys(coarse, stride, extents, fine_grid, dtype)
    if own_sites:
        keys = own
    elif extents == fine_grid.shape:
        keys = fine.table.to(dtype)
    else:
        coords = key_coords(fine.table, fine_grid)
        keys = _keys(coords, (1,) * len(stride), extents, fine_grid, dtype)
    # An additional last key that no search matches, so that every search ends at some key.
    table = torch.cat([keys, keys.new_full((1,), torch.iinfo(dtype).max)])
    assert fine.rows is not None, "a sorted index has rows"
    rows = fine.rows.int()
    before: IntTuple | None = None
    at = hit = own
    for v in sorted(taps, key=offsets.__getitem__):
        *line, place = offset = offsets[v]
        wanted = own + steps[v]
        if before == (*line, place - 1):
            # The wanted key, if it exists, follows the key that the previous offset found.
            at = at + hit
        elif before != offset:
            at = _before(own) if own_sites and steps[v] == -1 else _search(table, wanted)
        hit = table.index_select(0, at) == wanted
        before = offset
        finder = torch.nonzero(hit).squeeze(1)
        yield v, finder, rows.index_select(0, at.index_select(0, finder))


def _reachable_taps(
    coarse: Tensor, stride: IntTuple, offsets: tuple[IntTuple, ...], fine: Tensor
) -> list[int]:
    """Return the taps that lead from a coarse to a fine cell of any sample: [M, 1+D], [F, 1+D]."""
    steps = torch.tensor(stride, device=coarse.device)
    ways = fine[:, None, 1:].long() - coarse[None, :, 1:].long() * steps
    reachable = set(map(tuple, ways.flatten(0, 1).tolist()))
    return [v for v, offset in enumerate(offsets) if offset in reachable]


def _search(table: Tensor, wanted: Tensor) -> Tensor:
    return torch.searchsorted(table, wanted, out_int32=True)


def _before(keys: Tensor) -> Tensor:
    """Return ``_search(keys, keys - 1)`` for keys that ascend and are distinct."""
    at = torch.arange(keys.shape[0], dtype=torch.int32, device=keys.device)
    at[1:] -= (keys[1:] == keys[:-1] + 1).int()
    return at


def roomy_extents(
    coarse_grid: CellGrid, stride: IntTuple, offsets: tuple[IntTuple, ...], fine_grid: CellGrid
) -> IntTuple:
    """Return the extents of the larger grid: the fine grid's with room at the upper ends.

    The room serves both ends. A cell below the lower end has the key of a cell in the room of the
    line before it, where no site is.
    """
    extents = []
    for axis, step in enumerate(stride):
        lower, extent = fine_grid.lower[axis], fine_grid.shape[axis]
        first = coarse_grid.lower[axis] * step + min(offset[axis] for offset in offsets)
        last = (coarse_grid.lower[axis] + coarse_grid.shape[axis] - 1) * step
        last += max(offset[axis] for offset in offsets)
        room = max(lower - first, last - (lower + extent - 1), 0)
        extents.append(max(extent, 1) + room)
    return tuple(extents)


def _keys(
    coords: Tensor, stride: IntTuple, extents: IntTuple, grid: CellGrid, dtype: torch.dtype
) -> Tensor:
    """Return the keys of ``stride * coords`` in ``grid`` with other extents; nothing is checked."""
    batch, *cells = coords.to(dtype).unbind(1)
    key = batch
    for cell, step, extent, lower in zip(cells, stride, extents, grid.lower, strict=True):
        key = key * extent + (cell * step - lower)
    return key
