"""Neighbour tables: which row each row relates to through each tap (vectorised torch)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels.eager.sites import coord_keys, find_rows, tap_keys
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
    own_keys = coord_keys(out_coords, out_grid)
    is_site = own_keys >= 0
    if out_index is not None:
        own = torch.arange(out_coords.shape[0], device=out_coords.device)
        is_site = find_rows(out_index, own_keys) == own
    rows = torch.empty(len(offsets), len(out_coords), dtype=torch.int32, device=out_coords.device)
    for v, offset in enumerate(offsets):
        keys = tap_keys(out_coords, offset, stride, not divide, in_grid)
        rows[v] = torch.where(is_site, find_rows(in_index, keys), -1)
    return _with_mask(rows)


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
