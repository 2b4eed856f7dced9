"""Kernels that look up a window of taps for a block of rows: entries and masks of a table.

``lookup_kernel`` writes a whole table. ``lookup_masks_kernel`` and ``lookup_ordered_kernel`` take
its place where columns stand in the order of their masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonspconv.kernels.triton._bounds import PADDING_KEY, real_rows
from tritonspconv.kernels.triton._column_order import sort_key
from tritonspconv.kernels.triton._index import (
    find_rows,
    moved_starts,
    row_keys,
    row_starts,
    tap_keys,
)


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
    """Return whether each row lies in its grid and, if it has an index of its own, is in it."""
    own_key, inside = row_keys(coords_ptr, row, mask_n, box, batch_size, 2 * NDIM, NDIM)
    if OWN_KIND is not None:
        site, exists = find_rows(own_key, inside, own_table_ptr, own_rows_ptr, own_size, OWN_KIND)
        inside = exists & (site == row)
    return inside


@triton.jit
def _find_tap(
    begin,
    inside,
    row,
    mask_n,
    bits,
    box,
    table_ptr,
    index_rows_ptr,
    size,
    line,
    v: tl.constexpr,
    KIND: tl.constexpr,
    KNOWN: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    NARROW: tl.constexpr,
    CENTER: tl.constexpr,
):
    """Return the row that each row meets through tap ``v`` of a line, and whether there is one."""
    TAPS: tl.constexpr = WINDOW[0]
    V: tl.constexpr = WINDOW[1]
    if WINDOW[2] == 1 and v == CENTER:
        other, found = row, mask_n
    else:
        key, valid = tap_keys(begin, inside, box, v, TAPS, STRIDE, DIVIDE, NDIM, NARROW)
        if KNOWN:
            valid = mask_n & (((bits >> (line * V + v)) & 1) != 0)
        if CENTER >= 0 and v == CENTER % V:
            # A row outside the grid has no key, and yet sees itself: do not look it up.
            at_center = mask_n & (line == CENTER // V)
            valid = valid & (line != CENTER // V)
        other, found = find_rows(key, valid, table_ptr, index_rows_ptr, size, KIND)
        if CENTER >= 0 and v == CENTER % V:
            other = tl.where(at_center, row, other)
            found = at_center | found
    return other, found


@triton.jit
def _look_up(
    coords_ptr,
    table_ptr,
    index_rows_ptr,
    size,
    rows_ptr,
    mask_ptr,
    row,
    inside,
    mask_n,
    bits,
    n,
    first,
    box,
    KIND: tl.constexpr,
    KNOWN: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    NARROW: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Look up the taps of a block of rows, write their entries and masks, and return the last mask.

    A loop runs through the lines of taps. A line of a window of more than 32 taps may lie in two
    words of the mask: bits wait in 64 bits until their word is complete.

    ``row`` is the row of each column of the block. ``inside`` marks the rows that take part, and
    ``mask_n`` marks the columns that are real rows. ``bits`` are the masks of the rows if KNOWN is
    true: then only the taps of these masks are looked up. Otherwise ``bits`` are zeros. If
    ``rows_ptr`` is None, no entries are written. The other arguments are the arguments of
    :func:`lookup_kernel`.
    """
    V: tl.constexpr = WINDOW[1]
    LINES: tl.constexpr = WINDOW[2]
    LINES_IN_PLANE: tl.constexpr = WINDOW[3]
    # Triton 3.6 refuses `WINDOW[4]` as an argument.
    LINE_STEP: tl.constexpr = WINDOW[4]
    PLANE_STEP: tl.constexpr = WINDOW[5]
    MANY: tl.constexpr = LINES * V > 32
    # 32 keys of 64 bits do not fit the registers at the same time.
    GROUP: tl.constexpr = V if NARROW else 16
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    starts = row_starts(coords_ptr, row, inside, box, STRIDE, DIVIDE, NDIM, NARROW)
    if MANY:
        bits = bits.to(tl.int64)
    for line in range(LINES):
        plane = moved_starts(starts, line // LINES_IN_PLANE, PLANE_STEP, DIVIDE, NDIM)
        begin = moved_starts(plane, line % LINES_IN_PLANE, LINE_STEP, DIVIDE, NDIM)
        for start in tl.static_range(0, V, GROUP):
            entries = ()
            for v in tl.static_range(start, min(start + GROUP, V)):
                other, found = _find_tap(
                    begin, inside, row, mask_n, bits, box, table_ptr, index_rows_ptr, size, line,
                    v, KIND, KNOWN, WINDOW, STRIDE, DIVIDE, NDIM, NARROW, CENTER,
                )  # fmt: skip
                entries = entries + (tl.where(found, other, -1),)  # noqa: RUF005 - Triton has no *
                if not KNOWN:
                    bit = found.to(bits.dtype)
                    bits = bits | (bit << (line * V % 32 + v if MANY else line * V + v))
            if rows_ptr is not None:
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
    return bits


@triton.jit(do_not_specialize=["n", "first", "batch_size", "size", "own_size"])
def lookup_kernel(
    coords_ptr,
    table_ptr,
    index_rows_ptr,
    size,
    own_table_ptr,
    own_rows_ptr,
    own_size,
    rows_ptr,
    mask_ptr,
    count_ptr,
    n,
    first,
    batch_size,
    box,
    KIND: tl.constexpr,
    OWN_KIND: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    NARROW: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Look up the taps of WINDOW of each row: entries and masks, column c for row c.

    A row that takes no part meets nothing, except that a submanifold row sees itself through tap
    CENTER. Rows behind the count are padding: their columns stay unwritten, and no kernel reads
    them.

    Args:
        coords_ptr: int32 [n, 1 + NDIM], the rows' coordinates.
        table_ptr: int64, the other side's index (``SiteIndex.table``).
        index_rows_ptr: int32 or int64, its rows.
        size: Its size; see ``_grid.index_args``.
        own_table_ptr: int64, the rows' own index. Read if OWN_KIND is given.
        own_rows_ptr: int32 or int64, its rows.
        own_size: Its size.
        rows_ptr: int32 [V of the window, n], the entries, written.
        mask_ptr: int32 [words, n], the masks, written.
        count_ptr: int64 [1], the number of real rows; None: n.
        n: Number of rows.
        first: Number of the first tap, a multiple of 32.
        batch_size: Number of samples.
        box: The place of the window; see ``_grid.box_args``.
        KIND: Kind of the other side's index.
        OWN_KIND: Kind of the rows' own index; None: no row repeats another.
        WINDOW: The taps, and the lines that they stand in; see ``_grid.Taps``.
        STRIDE: Fine cells per coarse cell.
        DIVIDE: The rows are fine.
        NDIM: Number of spatial axes.
        NARROW: An int32 holds every key; see ``_grid.is_narrow``.
        CENTER: The tap through which a row sees itself, counted from ``first``; -1: none.
        BLOCK_N: Rows of a program.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = real_rows(count_ptr, n)
    mask_n = row < real
    if count_ptr is not None:  # noqa: SIM102 - Triton compiles one branch of an `if` only
        if tl.program_id(0) * BLOCK_N >= real:
            return
    inside = _taking_part(
        coords_ptr, own_table_ptr, own_rows_ptr, own_size, row, mask_n, box, batch_size, OWN_KIND,
        NDIM,
    )  # fmt: skip
    _look_up(
        coords_ptr, table_ptr, index_rows_ptr, size, rows_ptr, mask_ptr, row, inside, mask_n,
        tl.zeros_like(row), n, first, box,
        KIND, False, WINDOW, STRIDE, DIVIDE, NDIM, NARROW, CENTER, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n", "first", "batch_size", "size", "own_size"])
def lookup_masks_kernel(
    coords_ptr,
    table_ptr,
    index_rows_ptr,
    size,
    own_table_ptr,
    own_rows_ptr,
    own_size,
    found_ptr,
    key_ptr,
    groups_ptr,
    count_ptr,
    n,
    first,
    batch_size,
    box,
    KIND: tl.constexpr,
    OWN_KIND: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    NARROW: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the mask of each row, and the key by which rows are sorted; padding comes last.

    The masks go to ``found_ptr``, int32 [n], and the sort keys to ``key_ptr``, int16 [n].
    ``groups_ptr``, int32 [16], holds the groups of taps of the sort key. The other arguments are
    those of :func:`lookup_kernel`.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = real_rows(count_ptr, n)
    mask_n = row < real
    if count_ptr is not None:  # noqa: SIM102 - Triton compiles one branch of an `if` only
        if tl.program_id(0) * BLOCK_N >= real:
            tl.store(key_ptr + row, tl.zeros_like(row) + PADDING_KEY, mask=row < n)
            return
    inside = _taking_part(
        coords_ptr, own_table_ptr, own_rows_ptr, own_size, row, mask_n, box, batch_size, OWN_KIND,
        NDIM,
    )  # fmt: skip
    bits = _look_up(
        coords_ptr, table_ptr, index_rows_ptr, size, None, found_ptr, row, inside, mask_n,
        tl.zeros_like(row), n, first, box,
        KIND, False, WINDOW, STRIDE, DIVIDE, NDIM, NARROW, CENTER, BLOCK_N,
    )  # fmt: skip
    key = tl.where(mask_n, sort_key(bits, groups_ptr), PADDING_KEY)
    tl.store(key_ptr + row, key, mask=row < n)


@triton.jit(do_not_specialize=["n", "first", "size"])
def lookup_ordered_kernel(
    coords_ptr,
    table_ptr,
    index_rows_ptr,
    size,
    sorted_ptr,
    found_ptr,
    rows_ptr,
    mask_ptr,
    order_ptr,
    count_ptr,
    n,
    first,
    box,
    KIND: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    NARROW: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Look up the taps of known masks, with the rows in the order of their sort keys.

    ``sorted_ptr``, int64 [n], holds the rows in that order, and ``found_ptr``, int32 [n], the masks
    by row. The row of each column goes to ``order_ptr``, int32 [n]. The other arguments are those
    of :func:`lookup_kernel`.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = real_rows(count_ptr, n)
    row = tl.load(sorted_ptr + offs_n, mask=offs_n < n, other=0).to(tl.int32)
    tl.store(order_ptr + offs_n, row, mask=offs_n < n)
    if count_ptr is not None:  # noqa: SIM102 - Triton compiles one branch of an `if` only
        if tl.program_id(0) * BLOCK_N >= real:
            return
    mask_n = offs_n < real
    bits = tl.load(found_ptr + row, mask=mask_n, other=0)
    # A mask already says which taps have an entry: no condition on the row is left.
    _look_up(
        coords_ptr, table_ptr, index_rows_ptr, size, rows_ptr, mask_ptr, row, mask_n, mask_n, bits,
        n, first, box,
        KIND, True, WINDOW, STRIDE, DIVIDE, NDIM, NARROW, CENTER, BLOCK_N,
    )  # fmt: skip
