"""Neighbour tables: which row each row relates to through each tap (Triton).

A table has one column per row of its side, and the columns stand in an order that puts rows with
like masks side by side. Each column looks its taps up in the index of the other side: once for the
mask, by which columns are sorted, and once more, in that order, for the taps that are present. So
entries are written once, in contiguous runs.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.index import CellGrid, IndexKind, SiteIndex
from tritonspconv.kernels.table import NeighborTable
from tritonspconv.kernels.triton._blocks import num_blocks
from tritonspconv.kernels.triton._bounds import PADDING_KEY, real_rows
from tritonspconv.kernels.triton._column_order import has_order, sort_key, tap_groups
from tritonspconv.kernels.triton._grid import (
    IntTuple,
    Offsets,
    Taps,
    box_args,
    index_args,
    is_narrow,
    window_taps,
)
from tritonspconv.kernels.triton._index import (
    find_rows,
    moved_starts,
    row_keys,
    row_starts,
    tap_keys,
)
from tritonspconv.kernels.triton._launch import BoundKernel, bind

_BLOCK_N = 128


@triton.jit
def _finish_padding(sorted_ptr, order_ptr, key_ptr, offs_n, n, STAGE: tl.constexpr):
    """Write a block of padding columns: sort keys that come last, or the order."""
    if STAGE == "masks":
        tl.store(key_ptr + offs_n, tl.zeros_like(offs_n) + PADDING_KEY, mask=offs_n < n)
    elif STAGE == "ordered":
        row = tl.load(sorted_ptr + offs_n, mask=offs_n < n, other=0)
        tl.store(order_ptr + offs_n, row.to(tl.int32), mask=offs_n < n)


@triton.jit
def _taking_part(
    coords_ptr,
    own_table_ptr,
    own_rows_ptr,
    own_size,
    row,
    mask_n,
    box,
    batch_size,
    OWN_KIND: tl.constexpr,
    NDIM: tl.constexpr,
):
    """Whether each row lies in its grid, and its own index, if there is one, holds it."""
    own_key, inside = row_keys(coords_ptr, row, mask_n, box, batch_size, 2 * NDIM, NDIM)
    if OWN_KIND is not None:
        site, exists = find_rows(own_key, inside, own_table_ptr, own_rows_ptr, own_size, OWN_KIND)
        inside = exists & (site == row)
    return inside


@triton.jit(do_not_specialize=["n", "first", "batch_size", "size", "own_size"])
def lookup_kernel(
    coords_ptr,
    table_ptr,
    index_rows_ptr,
    size,
    own_table_ptr,
    own_rows_ptr,
    own_size,
    sorted_ptr,
    found_ptr,
    groups_ptr,
    rows_ptr,
    mask_ptr,
    order_ptr,
    key_ptr,
    count_ptr,
    n,
    first,
    batch_size,
    box,
    KIND: tl.constexpr,
    OWN_KIND: tl.constexpr,
    STAGE: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    NARROW: tl.constexpr,
    V: tl.constexpr,
    LINES: tl.constexpr,
    LINES_IN_PLANE: tl.constexpr,
    LINE_STEP: tl.constexpr,
    PLANE_STEP: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Look up LINES * V taps of each row, from tap ``first`` on, a multiple of 32.

    STAGE is ``"plain"``: write entries and masks, column c for row c. Or two launches take its
    place: ``"masks"`` writes masks and sort keys by row; ``"ordered"`` takes the rows in the order
    of their keys, and looks up the taps of their masks alone.

    The lines of taps are those of ``_grid.Taps``; a loop runs through them. A line of a window of
    more than 32 taps may lie in two words of the mask: bits wait in 64 bits until their word is
    complete. A row that takes no part meets nothing, except that a submanifold row sees itself
    through tap CENTER. Rows behind the count are padding: their columns stay unwritten, come last
    in the order, and no kernel reads them.

    Args:
        coords_ptr: int32 [n, 1 + NDIM], the rows' coordinates.
        table_ptr: int64, the other side's index (``SiteIndex.table``).
        index_rows_ptr: int32 or int64, its rows.
        size: Its size; see ``_grid.index_args``.
        own_table_ptr: int64, the rows' own index. Read if OWN_KIND is given.
        own_rows_ptr: int32 or int64, its rows.
        own_size: Its size.
        sorted_ptr: int64 [n], the rows in the order of their keys. Ordered only.
        found_ptr: int32 [n], the masks by row. Ordered only.
        groups_ptr: int32 [16], the groups of taps of the sort key. Masks only.
        rows_ptr: int32 [V of the window, n], the entries, written. Plain and ordered.
        mask_ptr: int32 [words, n], the masks, written.
        order_ptr: int32 [n], the row of each column, written. Ordered only.
        key_ptr: int16 [n], the sort keys, written. Masks only.
        count_ptr: int64 [1], the number of real rows; None: n.
        n: Number of rows.
        first: Number of the first tap.
        batch_size: Number of samples.
        box: Where the window lies; see ``_grid.box_args``.
        KIND: Kind of the other side's index.
        OWN_KIND: Kind of the rows' own index; None: no row repeats another.
        STAGE: See above.
        TAPS: The taps of a line; see ``_grid.Taps``.
        STRIDE: Fine cells per coarse cell.
        DIVIDE: The rows are fine.
        NDIM: Number of spatial axes.
        NARROW: An int32 holds every key; see ``_grid.is_narrow``.
        V: Number of taps of a line.
        LINES: Number of lines.
        LINES_IN_PLANE: Number of lines of a plane.
        LINE_STEP: Offset between lines.
        PLANE_STEP: Offset between planes.
        CENTER: The tap through which a row sees itself, counted from ``first``; -1: none.
        BLOCK_N: Rows of a program.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = real_rows(count_ptr, n)
    mask_n = offs_n < real
    if count_ptr is not None:  # noqa: SIM102 - Triton compiles one branch of an `if` only
        if tl.program_id(0) * BLOCK_N >= real:
            _finish_padding(sorted_ptr, order_ptr, key_ptr, offs_n, n, STAGE)
            return
    if STAGE == "ordered":
        # A mask already says which taps have an entry: no condition on the row is left.
        row = tl.load(sorted_ptr + offs_n, mask=offs_n < n, other=0).to(tl.int32)
        bits = tl.load(found_ptr + row, mask=mask_n, other=0)
        tl.store(order_ptr + offs_n, row, mask=offs_n < n)
        inside = mask_n
    else:
        row = offs_n
        bits = tl.zeros_like(row)
        inside = _taking_part(
            coords_ptr, own_table_ptr, own_rows_ptr, own_size, row, mask_n, box, batch_size,
            OWN_KIND, NDIM,
        )  # fmt: skip
    starts = row_starts(coords_ptr, row, inside, box, STRIDE, DIVIDE, NDIM, NARROW)
    MANY: tl.constexpr = LINES * V > 32
    if MANY:
        bits = bits.to(tl.int64)
    # 32 keys of 64 bits do not fit the registers at the same time.
    GROUP: tl.constexpr = V if NARROW else 16
    for line in range(LINES):
        plane = moved_starts(starts, line // LINES_IN_PLANE, PLANE_STEP, DIVIDE, NDIM)
        begin = moved_starts(plane, line % LINES_IN_PLANE, LINE_STEP, DIVIDE, NDIM)
        for start in tl.static_range(0, V, GROUP):
            entries = ()
            for v in tl.static_range(start, min(start + GROUP, V)):
                if LINES == 1 and v == CENTER:
                    other, found = row, mask_n
                else:
                    key, valid = tap_keys(begin, inside, box, v, TAPS, STRIDE, DIVIDE, NDIM, NARROW)
                    if STAGE == "ordered":
                        valid = mask_n & (((bits >> (line * V + v)) & 1) != 0)
                    if CENTER >= 0 and v == CENTER % V:
                        # A row outside the grid has no key, and yet sees itself: do not look it up.
                        at_center = mask_n & (line == CENTER // V)
                        valid = valid & (line != CENTER // V)
                    other, found = find_rows(key, valid, table_ptr, index_rows_ptr, size, KIND)
                    if CENTER >= 0 and v == CENTER % V:
                        other = tl.where(at_center, row, other)
                        found = at_center | found
                entries = entries + (tl.where(found, other, -1),)  # noqa: RUF005 - Triton has no *
                if STAGE != "ordered":
                    bit = found.to(bits.dtype)
                    bits = bits | (bit << (line * V % 32 + v if MANY else line * V + v))
            if STAGE != "masks":
                # Store after all loads of the group: no load moves up across a store.
                column = rows_ptr + (first + line * V + start).to(tl.int64) * n + offs_n
                for place in tl.static_range(min(GROUP, V - start)):
                    tl.store(column, entries[place], mask=mask_n)
                    column += n
        if MANY:
            # Store one word or none, by a mask: a branch has fewer loads in flight on sm_90.
            complete = tl.full([BLOCK_N], line * V % 32 + V, tl.int32) >= 32
            word = mask_ptr + ((first + line * V) // 32).to(tl.int64) * n + offs_n
            tl.store(word, bits.to(tl.int32), mask=mask_n & complete)
            bits = bits >> tl.where(complete, 32, 0)
    if not MANY or LINES * V % 32 != 0:
        last = first // 32 + (LINES * V - 1) // 32
        tl.store(mask_ptr + last.to(tl.int64) * n + offs_n, bits.to(tl.int32), mask=mask_n)
    if STAGE == "masks":
        key = tl.where(mask_n, sort_key(bits, groups_ptr), PADDING_KEY)
        tl.store(key_ptr + offs_n, key, mask=offs_n < n)


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

    :func:`lookup_kernel` describes the stages: ``"plain"``, or ``"masks"`` and ``"ordered"``.
    """
    n, volume, device = coords.shape[0], len(offsets), coords.device
    words = num_blocks(volume, 32)
    rows = torch.empty(volume, n, dtype=torch.int32, device=device)
    if n == 0:
        return NeighborTable(rows, rows.new_empty(words, 0), None, real_columns=count)
    own_kind = None if own_index is None else own_index.kind
    looked_at = index_args(index, coords)
    own = looked_at if own_index is None else index_args(own_index, coords)
    inputs = coords, *looked_at, *own
    blocks = (num_blocks(n, _BLOCK_N),)
    bound = functools.partial(
        _bind_lookup, offsets, stride, divide, center, index.kind, own_kind, grid, own_grid
    )
    mask = torch.empty(words, n, dtype=torch.int32, device=device)
    if not has_order(n, volume):
        kernels, place = bound("plain")
        for run, first in kernels:
            run(
                blocks, device,
                *inputs, None, None, None, rows, mask, None, None, count,
                n, first, *place,
            )  # fmt: skip
        return NeighborTable(rows, mask, None, real_columns=count)
    found = torch.empty(n, dtype=torch.int32, device=device)
    keys = torch.empty(n, dtype=torch.int16, device=device)
    groups = tap_groups(offsets, device)
    ((look, _),), place = bound("masks")
    look(blocks, device, *inputs, None, None, groups, None, found, None, keys, count, n, 0, *place)
    permutation = torch.sort(keys, stable=True)[1]
    order = torch.empty(n, dtype=torch.int32, device=device)
    ((fill, _),), _ = bound("ordered")
    fill(
        blocks, device,
        *inputs, permutation, found, None, rows, mask, order, None, count, n, 0, *place,
    )  # fmt: skip
    return NeighborTable(rows, mask, order, real_columns=count)


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
    stage: str,
) -> tuple[list[tuple[BoundKernel, int]], tuple[int, IntTuple]]:
    """Return the kernels of a lookup, with the first tap of each, and their last arguments."""
    narrow = is_narrow(grid, offsets, stride)
    kernels = _lookup_kernels(offsets, stride, divide, center, narrow, kind, own_kind, stage)
    return kernels, box_args(grid, own_grid, offsets)


@functools.lru_cache(maxsize=1024)
def _lookup_kernels(
    offsets: Offsets,
    stride: tuple[int, ...],
    divide: bool,
    center: int,
    narrow: bool,
    kind: IndexKind,
    own_kind: IndexKind | None,
    stage: str,
) -> list[tuple[BoundKernel, int]]:
    """Return the kernels that look a window up, and the first tap of each."""
    return [
        (
            bind(
                lookup_kernel, KIND=kind, OWN_KIND=own_kind, STAGE=stage, TAPS=taps.constants,
                STRIDE=stride, DIVIDE=divide, NDIM=len(stride), NARROW=narrow, V=taps.volume,
                LINES=taps.lines, LINES_IN_PLANE=taps.lines_in_plane, LINE_STEP=taps.line_step,
                PLANE_STEP=taps.plane_step, CENTER=_place(center, taps), BLOCK_N=_BLOCK_N,
            ),
            taps.first,
        )
        for taps in window_taps(offsets)
    ]  # fmt: skip


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
