"""Device functions shared by the map kernels: keys of taps, and lookup of keys in an index.

A thread holds one row and runs through taps that are compile-time constants. The compiler computes
common parts of taps once, such as the checks of one axis.

``box`` is the tuple of ``_grid.box_args``: sealed numbers, NDIM of each kind, that place a window.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonspconv.kernels.triton._bits import popcount

# An index holds row r as r ^ LAST_ROW: zero then means "none", and the lowest row is the maximum.
LAST_ROW: tl.constexpr = tl.constexpr(2**31 - 1)
# No key is larger.
_LAST_KEY: tl.constexpr = tl.constexpr(2**63 - 1)
# Larger than any fine cell of a narrow grid plus any extent of a window; the sum fits an int32.
_FAR: tl.constexpr = tl.constexpr(3 * 2**29 - 1)


@triton.jit
def unseal(value):
    """Undo the sealing of ``_grid.seal_grid``."""
    return value >> 2


@triton.jit
def row_keys(coords_ptr, rows, mask_n, box, batch_size, AT: tl.constexpr, NDIM: tl.constexpr):
    """Key of each row's own site, int64 [BLOCK_N], and whether the row is inside its grid.

    The grid's lower corner stands in ``box`` from AT on, and its shape behind that.
    """
    at = coords_ptr + rows.to(tl.int64) * (NDIM + 1)
    key = tl.load(at, mask=mask_n, other=-1).to(tl.int64)
    inside = mask_n & (key >= 0) & (key < batch_size)
    for d in tl.static_range(NDIM):
        cell = tl.load(at + (d + 1), mask=mask_n, other=0).to(tl.int64) - unseal(box[AT + d])
        extent = unseal(box[AT + NDIM + d])
        inside = inside & (cell >= 0) & (cell < extent)
        key = key * extent + cell
    return key, inside


@triton.jit
def _row_start(
    coords_ptr,
    rows,
    mask_n,
    box,
    d: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    NARROW: tl.constexpr,
):
    own = tl.load(coords_ptr + rows.to(tl.int64) * (NDIM + 1) + (d + 1), mask=mask_n, other=0)
    lower = unseal(box[d])
    corner = unseal(box[4 * NDIM + d])
    if DIVIDE:
        start = own.to(tl.int64) - lower * STRIDE[d] - corner
    else:
        start = own.to(tl.int64) * STRIDE[d] - lower + corner
    if NARROW:
        start = tl.minimum(tl.maximum(start, -_FAR), _FAR).to(tl.int32)
    return start


@triton.jit
def row_starts(
    coords_ptr,
    rows,
    mask_n,
    box,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Return the start of each row's window in the grid of its taps: batch, then four axes.

    Axes beyond NDIM repeat the last one. Starts count fine cells from the grid's corner. Each is
    [BLOCK_N], int32 in a narrow grid (whose keys fit an int32), else int64. ``mask_n`` must leave
    out rows of samples that the grid does not have.
    """
    batch = tl.load(coords_ptr + rows.to(tl.int64) * (NDIM + 1), mask=mask_n, other=0)
    if not NARROW:
        batch = batch.to(tl.int64)
    last: tl.constexpr = NDIM - 1
    return (
        batch,
        _row_start(coords_ptr, rows, mask_n, box, 0, STRIDE, DIVIDE, NDIM, NARROW),
        _row_start(coords_ptr, rows, mask_n, box, min(1, last), STRIDE, DIVIDE, NDIM, NARROW),
        _row_start(coords_ptr, rows, mask_n, box, min(2, last), STRIDE, DIVIDE, NDIM, NARROW),
        _row_start(coords_ptr, rows, mask_n, box, min(3, last), STRIDE, DIVIDE, NDIM, NARROW),
    )


@triton.jit
def moved_starts(starts, count, STEP: tl.constexpr, DIVIDE: tl.constexpr, NDIM: tl.constexpr):
    """Move the starts that :func:`row_starts` returned by ``count`` steps."""
    far = -count if DIVIDE else count
    last: tl.constexpr = NDIM - 1
    return (
        starts[0],
        starts[1] + far * STEP[0],
        starts[2] + far * STEP[min(1, last)],
        starts[3] + far * STEP[min(2, last)],
        starts[4] + far * STEP[min(3, last)],
    )


@triton.jit
def tap_cell(
    starts,
    v: tl.constexpr,
    d: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
):
    """Cell on axis d, from the grid's corner on, of the site that tap v relates to each row.

    ``DIVIDE=False``: rows are coarse, ``fine = stride * coarse + offset``. ``DIVIDE=True``: rows
    are fine and the coarse site exists where the division leaves a remainder below the tap's limit.
    ``TAPS`` holds for each tap its offset from the window's corner and its limit on every axis; see
    ``_grid.Taps``.

    Returns:
        int [BLOCK_N], and bool: False where there is no site.
    """
    moved = starts[d + 1] + TAPS[2 * NDIM * v + d] * (-1 if DIVIDE else 1)
    cell = moved
    exists = moved >= 0
    if DIVIDE:
        cell = moved // STRIDE[d]
        exists = exists & (moved - cell * STRIDE[d] < TAPS[2 * NDIM * v + NDIM + d])
    return cell, exists


@triton.jit
def tap_keys(
    starts,
    inside,
    box,
    v: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Key of the site that tap v relates to each row, int [BLOCK_N], and whether it is inside."""
    key = starts[0]
    for d in tl.static_range(NDIM):
        cell, exists = tap_cell(starts, v, d, TAPS, STRIDE, DIVIDE, NDIM)
        extent = unseal(box[NDIM + d])
        if NARROW:
            extent = extent.to(tl.int32)
        inside = inside & exists & (cell < extent)
        key = key * extent + cell
    return key, inside


@triton.jit
def find_ranks(key, valid, words_ptr):
    """Rank of each valid key among the set bits of a bitmap, and whether its bit is set."""
    word = tl.load(words_ptr + (key >> 5), mask=valid, other=0)
    bit = (key & 31).to(tl.uint32)
    bits = word.to(tl.uint32)
    below = bits & ((tl.full(bit.shape, 1, tl.uint32) << bit) - 1)
    return (word >> 32).to(tl.int32) + popcount(below), ((bits >> bit) & 1) != 0


@triton.jit
def slot_entries(slot, key, shift):
    """Place of a key's row in ``SiteIndex.rows``, int32."""
    low = key & ((tl.full(key.shape, 1, key.dtype) << shift) - 1)
    return (slot << shift) + low.to(tl.int32)


@triton.jit
def _search(key, valid, keys_ptr, rows_ptr, size):
    """Row of each valid key among ``size`` sorted ones, the first of equal ones; -1: absent."""
    # Halve the span of keys in which the first one not below ``key`` lies.
    first = tl.zeros_like(key)
    span = size
    while span > 0:
        half = (span + 1) // 2
        probe = first + (half - 1)
        stored = tl.load(keys_ptr + probe, mask=valid & (probe < size), other=_LAST_KEY)
        first = tl.where(stored < key, first + half, first)
        span -= half
    hit = valid & (first < size)
    hit = hit & (tl.load(keys_ptr + first, mask=hit, other=-1) == key)
    return tl.load(rows_ptr + first, mask=hit, other=-1).to(tl.int32), hit


@triton.jit
def find_rows(key, valid, table_ptr, rows_ptr, size, KIND: tl.constexpr):
    """Row of each valid key in the index, and whether it is there.

    The three arguments after ``valid`` come from ``_grid.index_args``.
    """
    if KIND == "bitmap":
        row, found = find_ranks(key, valid, table_ptr)
    elif KIND == "pages":
        slot, occupied = find_ranks(key >> size, valid, table_ptr)
        stored = tl.load(rows_ptr + slot_entries(slot, key, size), mask=occupied, other=0)
        row, found = stored ^ LAST_ROW, stored > 0
    else:
        row, found = _search(key, valid, table_ptr, rows_ptr, size)
    return row, found
