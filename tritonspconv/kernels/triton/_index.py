"""Device functions shared by the map kernels: keys of taps, and lookup of keys in an index."""

from __future__ import annotations

import triton
import triton.language as tl

# An empty hash slot. No key is negative, and every ~row is larger, so atomic max sets the row.
EMPTY_SLOT: tl.constexpr = tl.constexpr(-(2**63))
# Words of a bitmap whose ranks are counted together.
BLOCK_WORDS: tl.constexpr = tl.constexpr(2048)
_HASH_MULTIPLIER: tl.constexpr = tl.constexpr(-7046029254386353131)


@triton.jit
def popcount(x):
    """Count the set bits of int64 values in portable integer arithmetic."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56).to(tl.int32) & 0x7F


@triton.jit
def _unseal(value):
    """Undo the sealing of ``_grid.box_args``."""
    return value >> 2


@triton.jit
def tap_cell(
    coords_ptr,
    offsets_ptr,
    offs_n,
    mask_n,
    offs_v,
    mask_v,
    d: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
):
    """Coordinate on axis d of the site that each tap relates to each row, and whether it exists.

    ``DIVIDE=False``: rows are coarse, ``fine = stride * coarse + offset``. ``DIVIDE=True``: rows
    are fine and the coarse site exists only where the division leaves no remainder.

    Returns:
        Rows' own coordinates int64 [BLOCK_N, 1], coordinates int64 and bool [BLOCK_N, BLOCK_V].
    """
    at = coords_ptr + offs_n.to(tl.int64) * (NDIM + 1) + (d + 1)
    own = tl.load(at, mask=mask_n, other=0).to(tl.int64)[:, None]
    offset = tl.load(offsets_ptr + offs_v * NDIM + d, mask=mask_v, other=0).to(tl.int64)[None, :]
    if DIVIDE:
        moved = own - offset
        # Only exact quotients are kept, so it does not matter that division truncates.
        cell = moved // STRIDE[d]
        exists = moved == cell * STRIDE[d]
    else:
        cell = own * STRIDE[d] + offset
        exists = mask_n[:, None] & mask_v[None, :]
    return own, cell, exists


@triton.jit
def tap_keys(
    coords_ptr,
    offsets_ptr,
    offs_n,
    mask_n,
    offs_v,
    mask_v,
    lower,
    shape,
    batch_size,
    own_lower,
    own_shape,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    HAS_OWN: tl.constexpr,
):
    """Key of the site that each tap relates to each row, and whether it is inside the grid.

    With ``HAS_OWN``, rows outside the box of ``own_lower`` and ``own_shape`` relate to nothing.
    The four tuples come from ``_grid.box_args``.

    Returns:
        int64 keys [BLOCK_N, BLOCK_V] and the matching bool validity.
    """
    batch_at = coords_ptr + offs_n.to(tl.int64) * (NDIM + 1)
    batch = tl.load(batch_at, mask=mask_n, other=-1).to(tl.int64)
    valid_n = mask_n & (batch >= 0) & (batch < batch_size)
    key = tl.where(valid_n, batch, 0)[:, None] + tl.zeros_like(offs_v).to(tl.int64)[None, :]
    valid = valid_n[:, None] & mask_v[None, :]
    for d in tl.static_range(NDIM):
        own, cell, exists = tap_cell(
            coords_ptr, offsets_ptr, offs_n, mask_n, offs_v, mask_v, d, STRIDE, DIVIDE, NDIM
        )
        if HAS_OWN:
            inside_own = own - _unseal(own_lower[d])
            valid = valid & (inside_own >= 0) & (inside_own < _unseal(own_shape[d]))
        inside = cell - _unseal(lower[d])
        extent = _unseal(shape[d])
        valid = valid & exists & (inside >= 0) & (inside < extent)
        key = key * extent + inside
    return tl.where(valid, key, 0), valid


@triton.jit
def hash_slot(key, log2_capacity):
    """Home slot of a key: the top bits of two multiply-xor rounds.

    One round is not enough: keys are linear in the coordinates, and a product alone keeps their
    lattice, which crowds the table.
    """
    mixed = key * _HASH_MULTIPLIER
    mixed = (mixed ^ (mixed >> 32)) * _HASH_MULTIPLIER
    return (mixed >> (64 - log2_capacity)) & ((1 << log2_capacity.to(tl.int64)) - 1)


@triton.jit
def find_ranks(key, valid, words_ptr, ranks_ptr, block_rank_ptr):
    """Rank of each valid key among the set bits of a bitmap, -1 where its bit is not set."""
    word_index = key >> 6
    word = tl.load(words_ptr + word_index, mask=valid, other=0)
    bit = key & 63
    found = valid & (((word >> bit) & 1) != 0)
    below = word & (((tl.zeros_like(bit) + 1) << bit) - 1)
    first = tl.load(ranks_ptr + word_index, mask=found, other=0)
    block = tl.load(block_rank_ptr + word_index // BLOCK_WORDS, mask=found, other=0).to(tl.int32)
    return tl.where(found, block + first + popcount(below), -1)


@triton.jit
def find_rows(
    key,
    valid,
    table_ptr,
    ranks_ptr,
    block_rank_ptr,
    row_of_rank_ptr,
    log2_capacity,
    BITMAP: tl.constexpr,
    HAS_ROW_OF_RANK: tl.constexpr,
):
    """Row of each valid key in the index, -1 where the key is absent or not valid."""
    if BITMAP:
        row = find_ranks(key, valid, table_ptr, ranks_ptr, block_rank_ptr)
        if HAS_ROW_OF_RANK:
            row = tl.load(row_of_rank_ptr + row, mask=row >= 0, other=-1)
        return row
    last = (1 << log2_capacity.to(tl.int64)) - 1
    slot = hash_slot(key, log2_capacity)
    active = valid
    found_slot = tl.zeros_like(key) - 1
    probes = 0
    while (tl.max(tl.max(active.to(tl.int32), axis=1), axis=0) > 0) & (probes <= last):
        stored = tl.load(table_ptr + slot * 2, mask=active, other=EMPTY_SLOT)
        found_slot = tl.where(active & (stored == key), slot, found_slot)
        active = active & (stored != key) & (stored != EMPTY_SLOT)
        slot = (slot + 1) & last
        probes += 1
    hit = found_slot >= 0
    return (~tl.load(table_ptr + found_slot * 2 + 1, mask=hit, other=0)).to(tl.int32)
