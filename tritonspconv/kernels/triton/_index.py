"""Device functions shared by the map kernels: keys of taps, and lookup of keys in an index."""

from __future__ import annotations

import triton
import triton.language as tl

# Words of a bitmap whose set bits are counted together.
BLOCK_WORDS: tl.constexpr = tl.constexpr(1024)
# An index holds row r as r ^ LAST_ROW, so that zero is "none" and the lowest row is the maximum.
LAST_ROW: tl.constexpr = tl.constexpr(2**31 - 1)
# No key is larger.
_LAST_KEY: tl.constexpr = tl.constexpr(2**63 - 1)
# Beyond any cell of a narrow grid plus any of its offsets, and their sum still fits an int32.
_FAR: tl.constexpr = tl.constexpr(3 * 2**29 - 1)


@triton.jit
def popcount(x):
    """Count the set bits of int32 values in portable integer arithmetic."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def unseal(value):
    """Undo the sealing of ``_grid.box_args``."""
    return value >> 2


@triton.jit
def row_keys(coords_ptr, rows, mask_n, lower, shape, batch_size, NDIM: tl.constexpr):
    """Key of each row's own site, int64 [BLOCK_N], and whether the row is inside the grid."""
    at = coords_ptr + rows.to(tl.int64) * (NDIM + 1)
    key = tl.load(at, mask=mask_n, other=-1).to(tl.int64)
    inside = mask_n & (key >= 0) & (key < batch_size)
    for d in tl.static_range(NDIM):
        cell = tl.load(at + (d + 1), mask=mask_n, other=0).to(tl.int64) - unseal(lower[d])
        extent = unseal(shape[d])
        inside = inside & (cell >= 0) & (cell < extent)
        key = key * extent + cell
    return tl.where(inside, key, 0), inside


@triton.jit
def tap_cell(
    coords_ptr,
    taps_ptr,
    rows,
    mask_n,
    offs_v,
    mask_v,
    lower,
    d: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Cell on axis d, from the grid's corner on, of the site that each tap relates to each row.

    ``DIVIDE=False``: rows are coarse, ``fine = stride * coarse + offset``. ``DIVIDE=True``: rows
    are fine and the coarse site exists where the division leaves a remainder below the tap's limit.
    ``taps_ptr`` comes from ``_grid.Taps``.

    Returns:
        [BLOCK_N, BLOCK_V], int32 in a narrow grid, else int64; negative where there is no site.
    """
    at = coords_ptr + rows.to(tl.int64) * (NDIM + 1) + (d + 1)
    start = tl.load(at, mask=mask_n, other=0).to(tl.int64)
    corner = unseal(lower[d])
    start = start - corner * STRIDE[d] if DIVIDE else start * STRIDE[d] - corner
    tap = taps_ptr + offs_v * (2 * NDIM) + d
    offset = tl.load(tap, mask=mask_v, other=0)
    if NARROW:
        start = tl.minimum(tl.maximum(start, -_FAR), _FAR).to(tl.int32)
    else:
        offset = offset.to(tl.int64)
    if not DIVIDE:
        return start[:, None] + offset[None, :]
    moved = start[:, None] - offset[None, :]
    cell = moved // STRIDE[d]
    limit = tl.load(tap + NDIM, mask=mask_v, other=0)
    return tl.where((moved >= 0) & (moved - cell * STRIDE[d] < limit[None, :]), cell, -1)


@triton.jit
def tap_keys(
    coords_ptr,
    taps_ptr,
    rows,
    mask_n,
    offs_v,
    mask_v,
    lower,
    shape,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Key of the site that each tap relates to each row, and whether it is inside the grid.

    ``mask_n`` must leave out rows whose sample the grid does not have. ``NARROW``: keys fit an
    int32.

    Returns:
        Keys [BLOCK_N, BLOCK_V], int32 or int64, and the matching bool validity.
    """
    batch = tl.load(coords_ptr + rows.to(tl.int64) * (NDIM + 1), mask=mask_n, other=0)
    key = batch[:, None] + tl.zeros_like(offs_v)[None, :]
    if not NARROW:
        key = key.to(tl.int64)
    valid = mask_n[:, None] & mask_v[None, :]
    for d in tl.static_range(NDIM):
        cell = tap_cell(
            coords_ptr, taps_ptr, rows, mask_n, offs_v, mask_v, lower,
            d, STRIDE, DIVIDE, NDIM, NARROW,
        )  # fmt: skip
        extent = unseal(shape[d])
        if NARROW:
            extent = extent.to(tl.int32)
        valid = valid & (cell >= 0) & (cell < extent)
        key = key * extent + cell
    return tl.where(valid, key, 0), valid


@triton.jit
def find_slots(key, valid, words_ptr, shift):
    """Rank of each valid key's block of cells among the marked ones, -1 where it is not marked."""
    block = key >> shift
    pair = tl.load(words_ptr + (block >> 5), mask=valid, other=0)
    bit = (block & 31).to(tl.int32)
    word = pair.to(tl.int32)
    below = word & (((tl.zeros_like(bit) + 1) << bit) - 1)
    found = ((word >> bit) & 1) != 0
    return tl.where(found, (pair >> 32).to(tl.int32) + popcount(below), -1)


@triton.jit
def slot_entries(slot, key, shift):
    """Where in ``SiteIndex.rows`` the row of a key in a slot stands, int64."""
    low = key & (((tl.zeros_like(key) + 1) << shift) - 1)
    return (slot.to(tl.int64) << shift) + low


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
    return tl.load(rows_ptr + first, mask=hit, other=-1).to(tl.int32)


@triton.jit
def find_rows(
    key,
    valid,
    table_ptr,
    rows_ptr,
    size,
    BITMAP: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    """Row of each valid key in the index, -1 where the key is absent or not valid.

    The three arguments after ``valid`` come from ``_grid.index_args``.
    """
    if BITMAP:
        row = find_slots(key, valid, table_ptr, size)
        if HAS_ROWS:
            at = rows_ptr + slot_entries(row, key, size)
            stored = tl.load(at, mask=row >= 0, other=0)
            row = tl.where(stored > 0, stored ^ LAST_ROW, -1)
    else:
        row = _search(key, valid, table_ptr, rows_ptr, size)
    return row
