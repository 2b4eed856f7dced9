"""Index of given sites, and the sorted unique set of generated ones (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.eager import sites as eager_sites
from tritonspconv.kernels.index import CellGrid, SiteIndex
from tritonspconv.kernels.triton._blocks import num_blocks
from tritonspconv.kernels.triton._grid import box_args, flatten_offsets, tap_grid
from tritonspconv.kernels.triton._index import (
    BLOCK_WORDS,
    EMPTY_SLOT,
    find_ranks,
    hash_slot,
    popcount,
    tap_cell,
    tap_keys,
)
from tritonspconv.kernels.triton._launch import launch

_BLOCK_N = 32
# A bitmap of 2**29 cells is 64 MiB of words and 32 MiB of ranks.
_MAX_BITMAP_CELLS = 2**29
_MIN_BITMAP_ROWS = 65536


@triton.jit(do_not_specialize=["n", "batch_size", "log2_capacity"])
def hash_insert_kernel(
    coords_ptr,
    offsets_ptr,
    table_ptr,
    n,
    lower,
    shape,
    batch_size,
    log2_capacity,
    NDIM: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Insert the key of every row; where rows repeat a key, the lowest row stays."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    offs_v = tl.arange(0, 1)
    # [BLOCK_N, 1]
    key, active = tap_keys(
        coords_ptr, offsets_ptr, offs_n, mask_n, offs_v, offs_v < 1, lower, shape, batch_size,
        lower, shape, STRIDE, False, NDIM, False,
    )  # fmt: skip
    not_row = ~(offs_n.to(tl.int64))[:, None]
    capacity = 1 << log2_capacity.to(tl.int64)
    slot = hash_slot(key, log2_capacity)
    probes = 0
    while (tl.max(tl.max(active.to(tl.int32), axis=1), axis=0) > 0) & (probes < capacity):
        # Compare-and-swap takes no mask: idle lanes stay at their slot and expect a value that no
        # slot holds.
        target = table_ptr + slot * 2
        expected = tl.where(active, EMPTY_SLOT, -1)
        stored = tl.atomic_cas(target, expected, key, sem="relaxed")
        placed = active & ((stored == EMPTY_SLOT) | (stored == key))
        tl.atomic_max(target + 1, not_row, mask=placed, sem="relaxed")
        active = active & (placed == 0)
        slot = tl.where(active, (slot + 1) & (capacity - 1), slot)
        probes += 1


def _build_hash(coords: Tensor, grid: CellGrid) -> SiteIndex:
    """Index ``coords`` by key in a hash table that is at most a quarter full."""
    n, ndim = coords.shape[0], coords.shape[1] - 1
    bits = max(4 * n - 1, 1).bit_length()
    table = torch.full((2**bits, 2), -(2**63), dtype=torch.int64, device=coords.device)
    if n:
        launch(
            hash_insert_kernel, (num_blocks(n, _BLOCK_N),), coords.device,
            coords, flatten_offsets(((0,) * ndim,), coords.device), table,
            n, *box_args(grid), grid.batch_size, bits,
            NDIM=ndim, STRIDE=(1,) * ndim, BLOCK_N=_BLOCK_N, num_warps=1,
        )  # fmt: skip
    return SiteIndex("hash", table, None)


@triton.jit(do_not_specialize=["n", "batch_size"])
def mark_sites_kernel(
    coords_ptr,
    offsets_ptr,
    words_ptr,
    n,
    lower,
    shape,
    batch_size,
    own_lower,
    own_shape,
    NDIM: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    HAS_OWN: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Set the bit of every site that an input reaches through some tap."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    key, valid = tap_keys(
        coords_ptr, offsets_ptr, offs_n, offs_n < n, offs_v, offs_v < V, lower, shape, batch_size,
        own_lower, own_shape, STRIDE, DIVIDE, NDIM, HAS_OWN,
    )  # fmt: skip
    bit = (tl.zeros_like(key) + 1) << (key & 63)
    tl.atomic_or(words_ptr + (key >> 6), bit, mask=valid, sem="relaxed")


@triton.jit(do_not_specialize=["n_words"])
def rank_words_kernel(words_ptr, ranks_ptr, counts_ptr, n_words, BLOCK: tl.constexpr):
    """Rank each word's first set bit within its block, and count the block's set bits."""
    pid = tl.program_id(0)
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_words
    count = popcount(tl.load(words_ptr + offs, mask=mask, other=0))
    tl.store(ranks_ptr + offs, tl.cumsum(count, axis=0) - count, mask=mask)
    tl.store(counts_ptr + pid + 1, tl.sum(count, axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["n", "batch_size"])
def row_of_rank_kernel(
    coords_ptr,
    offsets_ptr,
    words_ptr,
    ranks_ptr,
    block_rank_ptr,
    row_of_rank_ptr,
    n,
    lower,
    shape,
    batch_size,
    NDIM: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``row_of_rank[rank of the row's site]`` = the row; the lowest of repeated rows."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = tl.arange(0, 1)
    key, valid = tap_keys(
        coords_ptr, offsets_ptr, offs_n, offs_n < n, offs_v, offs_v < 1, lower, shape, batch_size,
        lower, shape, STRIDE, False, NDIM, False,
    )  # fmt: skip
    rank = find_ranks(key, valid, words_ptr, ranks_ptr, block_rank_ptr)
    tl.atomic_min(row_of_rank_ptr + rank, offs_n[:, None], mask=rank >= 0, sem="relaxed")


@triton.jit(
    do_not_specialize=["n", "batch_size"]
)  # fmt: skip
def write_sites_kernel(
    coords_ptr,
    offsets_ptr,
    words_ptr,
    ranks_ptr,
    block_rank_ptr,
    out_ptr,
    n,
    lower,
    shape,
    batch_size,
    own_lower,
    own_shape,
    NDIM: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    HAS_OWN: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the coordinates of every reached site at its rank; all who reach it write the same."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_n = offs_n < n
    mask_v = offs_v < V
    key, valid = tap_keys(
        coords_ptr, offsets_ptr, offs_n, mask_n, offs_v, mask_v, lower, shape, batch_size,
        own_lower, own_shape, STRIDE, DIVIDE, NDIM, HAS_OWN,
    )  # fmt: skip
    rank = find_ranks(key, valid, words_ptr, ranks_ptr, block_rank_ptr)
    out = out_ptr + rank.to(tl.int64) * (NDIM + 1)
    batch = tl.load(coords_ptr + offs_n.to(tl.int64) * (NDIM + 1), mask=mask_n, other=0)
    tl.store(out, batch[:, None] + tl.zeros_like(rank), mask=valid)
    for d in tl.static_range(NDIM):
        _own, cell, _exists = tap_cell(
            coords_ptr, offsets_ptr, offs_n, mask_n, offs_v, mask_v, d, STRIDE, DIVIDE, NDIM
        )
        tl.store(out + (d + 1), cell.to(tl.int32), mask=valid)


def _empty_bitmap(cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the words of a bitmap and a counter per block behind one more, all zero."""
    n_words = -(-cells // 64)
    blocks = num_blocks(n_words, BLOCK_WORDS.value)
    zeros = torch.zeros(n_words + blocks + 1, dtype=torch.int64, device=device)
    return zeros[:n_words], zeros[n_words:]


def _rank_bitmap(words: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rank of each word's first set bit in its block, and of each block's first."""
    n_words, block = words.shape[0], BLOCK_WORDS.value
    ranks = torch.empty(n_words, dtype=torch.int32, device=words.device)
    launch(
        rank_words_kernel, (num_blocks(n_words, block),), words.device,
        words, ranks, counts, n_words, BLOCK=block,
    )  # fmt: skip
    return ranks, torch.cumsum(counts, dim=0)


def build_index(coords: Tensor, grid: CellGrid) -> SiteIndex:
    """Index ``coords`` [N, 1 + D] by key; rows outside the grid are left out.

    Many rows in a grid of moderate size: a bitmap, where a row's neighbours lie in few words. Else
    a hash table, which takes fewer launches and no memory per cell.
    """
    n, ndim = coords.shape[0], coords.shape[1] - 1
    if n < _MIN_BITMAP_ROWS or grid.num_cells > _MAX_BITMAP_CELLS:
        return _build_hash(coords, grid)
    zero, unit = flatten_offsets(((0,) * ndim,), coords.device), (1,) * ndim
    words, counts = _empty_bitmap(grid.num_cells, coords.device)
    box, blocks = box_args(grid), num_blocks(n, 4 * _BLOCK_N)
    launch(
        mark_sites_kernel, (blocks, 1), coords.device,
        coords, zero, words, n, *box, grid.batch_size, *box,
        NDIM=ndim, STRIDE=unit, DIVIDE=False, HAS_OWN=False, V=1,
        BLOCK_N=4 * _BLOCK_N, BLOCK_V=1,
    )  # fmt: skip
    ranks, block_rank = _rank_bitmap(words, counts)
    row_of_rank = torch.full((n,), 2**31 - 1, dtype=torch.int32, device=coords.device)
    launch(
        row_of_rank_kernel, (blocks,), coords.device,
        coords, zero, words, ranks, block_rank, row_of_rank, n, *box, grid.batch_size,
        NDIM=ndim, STRIDE=unit, BLOCK_N=4 * _BLOCK_N,
    )  # fmt: skip
    return SiteIndex("bitmap", words, ranks, block_rank, row_of_rank)


def reached_sites(
    coords: Tensor,
    offsets: tuple[tuple[int, ...], ...],
    stride: tuple[int, ...],
    divide: bool,
    grid: CellGrid,
    own_grid: CellGrid | None = None,
) -> tuple[Tensor, SiteIndex]:
    """Find every site of ``grid`` that some row of ``coords`` reaches through a tap.

    Args:
        coords: int32 [N, 1 + D].
        offsets: V tap offsets, ``fine - stride * coarse``.
        stride: Fine sites per coarse site.
        divide: True when ``coords`` are fine and the target is coarse.
        grid: The target grid.
        own_grid: The grid of ``coords``, of as many samples; rows outside it reach nothing. None:
            every row is known to be inside.

    Returns:
        int32 coordinates [M, 1 + D] in ascending key order, and their index. Waits for the device
        once, for M.
    """
    ndim, n, volume = len(stride), coords.shape[0], len(offsets)
    device = coords.device
    if n == 0 or grid.num_cells == 0:
        return coords.new_empty(0, ndim + 1), _build_hash(coords[:0], grid)
    if grid.num_cells > _MAX_BITMAP_CELLS:
        out, _ = eager_sites.reached_sites(coords, offsets, stride, divide, grid, own_grid)
        return out, _build_hash(out, grid)
    words, counts = _empty_bitmap(grid.num_cells, device)
    blocks, block_v = tap_grid(n, volume, _BLOCK_N)
    inputs = coords, flatten_offsets(offsets, device)
    boxes = n, *box_args(grid), grid.batch_size, *box_args(own_grid or grid)
    meta = {
        "NDIM": ndim, "STRIDE": stride, "DIVIDE": divide, "HAS_OWN": own_grid is not None,
        "V": volume, "BLOCK_N": _BLOCK_N, "BLOCK_V": block_v, "num_warps": 4,
    }  # fmt: skip
    launch(mark_sites_kernel, blocks, device, *inputs, words, *boxes, **meta)
    ranks, block_rank = _rank_bitmap(words, counts)
    out = torch.empty(int(block_rank[-1]), ndim + 1, dtype=torch.int32, device=device)
    index = words, ranks, block_rank
    launch(write_sites_kernel, blocks, device, *inputs, *index, out, *boxes, **meta)
    return out, SiteIndex("bitmap", *index)
