"""Tables by lookup (Triton): every row looks up the rows of the other side, tap by tap.

A table has one column for each row of its side. The columns of large tables are sorted, so that
rows with similar masks are side by side. Each column then looks up its taps twice. The first
look-up finds the mask, from which the sort key is made. The second look-up goes through the columns
in order and finds the rows of the taps that are present. So each entry is written only once, in
contiguous runs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from tritonspconv.kernels.index import CellGrid, IndexKind, SiteIndex
from tritonspconv.kernels.table import NeighborTable
from tritonspconv.kernels.triton._blocks import num_blocks
from tritonspconv.kernels.triton._column_order import has_order, tap_groups
from tritonspconv.kernels.triton._grid import (
    IntTuple,
    Offsets,
    Taps,
    box_args,
    index_args,
    is_narrow,
    window_taps,
)
from tritonspconv.kernels.triton._launch import BoundKernel, bind
from tritonspconv.kernels.triton._lookup import (
    lookup_kernel,
    lookup_masks_kernel,
    lookup_ordered_kernel,
)

_BLOCK_N = 128


def _lookup(
    coords: Tensor,
    offsets: Offsets,
    stride: tuple[int, ...],
    divide: bool,
    index: SiteIndex,
    grid: CellGrid,
    own_grid: CellGrid,
    own_index: SiteIndex | None,
    center: int,
    count: Tensor | None,
) -> NeighborTable:
    """Build the table whose columns are the rows of ``coords``, from the other side's ``index``.

    One kernel writes a plain table. Two kernels write an ordered table: one writes masks and sort
    keys, and after a sort the other writes the table in the order of the keys.
    """
    n, volume, device = coords.shape[0], len(offsets), coords.device
    words = num_blocks(volume, 32)
    rows = torch.empty(volume, n, dtype=torch.int32, device=device)
    if n == 0:
        return NeighborTable(rows, rows.new_empty(words, 0), None, real_columns=count)
    own_kind = None if own_index is None else own_index.kind
    looked_at = index_args(index, coords)
    own = looked_at if own_index is None else index_args(own_index, coords)
    blocks = (num_blocks(n, _BLOCK_N),)
    mask = torch.empty(words, n, dtype=torch.int32, device=device)
    is_ordered = has_order(n, volume)
    lookup = _bind_lookup(
        offsets, stride, divide, center, index.kind, own_kind, grid, own_grid, is_ordered
    )
    if not is_ordered:
        for run, first in zip(lookup.kernels, lookup.firsts, strict=True):
            run(
                blocks, device,
                coords, *looked_at, *own, rows, mask, count,
                n, first, lookup.batch_size, lookup.box,
            )  # fmt: skip
        return NeighborTable(rows, mask, None, real_columns=count)
    find_masks, fill = lookup.kernels
    found = torch.empty(n, dtype=torch.int32, device=device)
    keys = torch.empty(n, dtype=torch.int16, device=device)
    find_masks(
        blocks, device,
        coords, *looked_at, *own, found, keys, tap_groups(offsets, device), count,
        n, 0, lookup.batch_size, lookup.box,
    )  # fmt: skip
    permutation = torch.sort(keys, stable=True)[1]
    order = torch.empty(n, dtype=torch.int32, device=device)
    fill(
        blocks, device,
        coords, *looked_at, permutation, found, rows, mask, order, count, n, 0, lookup.box,
    )  # fmt: skip
    return NeighborTable(rows, mask, order, real_columns=count)


class _Lookup(NamedTuple):
    """The kernels that look up a window, and the numbers that place the window.

    Attributes:
        kernels: For a plain table, a kernel for each 32 taps or for each window in lines. For an
            ordered table, the kernel that finds masks and the kernel that fills in entries.
        firsts: The number of the first tap of each kernel of a plain table.
        batch_size, box: See ``_grid.box_args``.
    """

    kernels: list[BoundKernel]
    firsts: list[int]
    batch_size: int
    box: IntTuple


@functools.lru_cache(maxsize=1024)
def _bind_lookup(
    offsets: Offsets,
    stride: tuple[int, ...],
    divide: bool,
    center: int,
    kind: IndexKind,
    own_kind: IndexKind | None,
    grid: CellGrid,
    own_grid: CellGrid,
    is_ordered: bool,
) -> _Lookup:
    narrow = is_narrow(grid, offsets, stride)
    kernels = _lookup_kernels(offsets, stride, divide, center, narrow, kind, own_kind, is_ordered)
    firsts = [taps.first for taps in window_taps(offsets)]
    return _Lookup(kernels, firsts, *box_args(grid, own_grid, offsets))


@functools.lru_cache(maxsize=1024)
def _lookup_kernels(
    offsets: Offsets,
    stride: tuple[int, ...],
    divide: bool,
    center: int,
    narrow: bool,
    kind: IndexKind,
    own_kind: IndexKind | None,
    is_ordered: bool,
) -> list[BoundKernel]:
    kernels: list[BoundKernel] = []
    for taps in window_taps(offsets):
        last = {
            "WINDOW": taps.window, "STRIDE": stride, "DIVIDE": divide, "NDIM": len(stride),
            "NARROW": narrow, "CENTER": _place(center, taps), "BLOCK_N": _BLOCK_N,
        }  # fmt: skip
        if is_ordered:
            kernels.append(bind(lookup_masks_kernel, KIND=kind, OWN_KIND=own_kind, **last))
            kernels.append(bind(lookup_ordered_kernel, KIND=kind, **last))
        else:
            kernels.append(bind(lookup_kernel, KIND=kind, OWN_KIND=own_kind, **last))
    return kernels


def _place(tap: int, taps: Taps) -> int:
    """Return the number of a tap among ``taps``; -1 if it is not one of them."""
    place = tap - taps.first
    return place if 0 <= place < taps.volume * taps.lines else -1


def lookup_table(
    coords: Tensor,
    offsets: Offsets,
    index: SiteIndex,
    grid: CellGrid,
    *,
    distinct: bool = False,
    count: Tensor | None = None,
) -> NeighborTable:
    """Look up the neighbours of a block of rows in each program."""
    ndim = coords.shape[1] - 1
    center = offsets.index((0,) * ndim)
    own_index = None if distinct else index
    return _lookup(coords, offsets, (1,) * ndim, False, index, grid, grid, own_index, center, count)


def reach_table(
    out_coords: Tensor,
    offsets: Offsets,
    stride: tuple[int, ...],
    divide: bool,
    in_index: SiteIndex,
    in_grid: CellGrid,
    out_grid: CellGrid,
    out_index: SiteIndex | None = None,
    *,
    count: Tensor | None = None,
) -> NeighborTable:
    """Look up the inputs of a block of output rows in each program."""
    return _lookup(
        out_coords, offsets, stride, not divide, in_index, in_grid, out_grid, out_index, -1, count
    )


def reverse_table(
    rows: Tensor,
    in_coords: Tensor,
    offsets: Offsets,
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
) -> NeighborTable:
    """Look up the outputs of a block of input rows in each program."""
    return _lookup(
        in_coords, offsets, stride, divide, out_index, out_grid, in_grid, in_index, -1, in_count
    )
