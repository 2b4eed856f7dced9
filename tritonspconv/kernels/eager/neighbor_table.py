"""Neighbour tables: which row each row relates to through each tap (vectorised torch)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels.eager.sites import coord_keys, find_rows, tap_keys, without_outsiders
from tritonspconv.kernels.index import CellGrid, SiteIndex

Table = tuple[Tensor, Tensor, Tensor | None]


def _with_mask(rows: Tensor) -> Table:
    """Add the mask words to ``rows`` [V, n]; columns stay in row order."""
    volume, n = rows.shape
    mask = torch.zeros(-(-volume // 32), n, dtype=torch.int32, device=rows.device)
    for v in range(volume):
        bit = 1 << (v % 32)
        mask[v // 32] |= (rows[v] >= 0).int() * (bit if bit < 2**31 else -(2**31))
    return rows, mask, None


def lookup_table(
    coords: Tensor,
    offsets: tuple[tuple[int, ...], ...],
    index: SiteIndex,
    grid: CellGrid,
) -> Table:
    """Build the table of a submanifold geometry: every row looks its own neighbours up.

    See :func:`tritonspconv.kernels.triton.neighbor_table.lookup_table` for the arguments.
    """
    n, ndim = coords.shape[0], coords.shape[1] - 1
    own = torch.arange(n, device=coords.device)
    zero, unit = (0,) * ndim, (1,) * ndim
    is_site = find_rows(index, coord_keys(coords, grid)) == own
    rows = torch.empty(len(offsets), n, dtype=torch.int32, device=coords.device)
    volume = len(offsets)
    for v, offset in enumerate(offsets):
        mirror = volume - 1 - v
        if offset == zero:
            rows[v] = own
        elif mirror < v and offsets[mirror] == tuple(-x for x in offset):
            # Who finds whom through the opposite tap is known already.
            finder = torch.nonzero(rows[mirror] >= 0).squeeze(1)
            found = rows[mirror].index_select(0, finder).long()
            rows[v].fill_(-1).index_copy_(0, found, finder.to(torch.int32))
        else:
            keys = tap_keys(coords, offset, unit, False, grid)
            rows[v] = torch.where(is_site, find_rows(index, keys), -1)
    return _with_mask(rows)


def reach_table(
    in_coords: Tensor,
    n_out: int,
    offsets: tuple[tuple[int, ...], ...],
    stride: tuple[int, ...],
    divide: bool,
    out_index: SiteIndex,
    grid: CellGrid,
    own_grid: CellGrid | None = None,
) -> Table:
    """Build the table of any geometry: every input looks up the outputs it reaches.

    See :func:`tritonspconv.kernels.triton.neighbor_table.reach_table` for the arguments.
    """
    if own_grid is not None:
        in_coords = without_outsiders(in_coords, own_grid)
    rows = torch.full((len(offsets), n_out), -1, dtype=torch.int32, device=in_coords.device)
    for v, offset in enumerate(offsets):
        keys = tap_keys(in_coords, offset, stride, divide, grid)
        _scatter_lowest(rows[v], find_rows(out_index, keys))
    return _with_mask(rows)


def _scatter_lowest(target: Tensor, at: Tensor) -> None:
    """Set ``target[at[i]] = i`` for every ``at[i] >= 0``; the lowest i wins."""
    source = torch.nonzero(at >= 0).squeeze(1)
    lowest = torch.full_like(target, 2**31 - 1)
    lowest.scatter_reduce_(0, at[source], source.to(target.dtype), "amin")
    torch.where(lowest < 2**31 - 1, lowest, target, out=target)


def invert_table(
    rows: Tensor, order: Tensor | None, n_other: int, offsets: tuple[tuple[int, ...], ...]
) -> Table:
    """Build the table of the other side: rows [V, n] of entries below ``n_other`` -> [V, n_other].

    ``offsets`` steer nothing here.
    """
    inverse = torch.full((rows.shape[0], n_other), -1, dtype=torch.int32, device=rows.device)
    own = torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device)
    own = own if order is None else order
    for v in range(rows.shape[0]):
        present = rows[v] >= 0
        inverse[v, rows[v][present].long()] = own[present]
    return _with_mask(inverse)
