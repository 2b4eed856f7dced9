"""Index of given sites, and the sorted unique set of generated ones (Triton).

Both mark cells in a bitmap and rank its set bits. Given sites, which keep their rows, mark blocks
of cells and store their rows by slot: few bits to clear and rank where sites are few. Generated
sites mark the cells themselves, so that ranks ascend by key and are the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.eager import sites as eager_sites
from tritonspconv.kernels.index import CellGrid, SiteIndex
from tritonspconv.kernels.triton._blocks import num_blocks
from tritonspconv.kernels.triton._grid import (
    box_args,
    device_steps,
    device_taps,
    is_narrow,
    tap_grid,
)
from tritonspconv.kernels.triton._index import (
    BLOCK_WORDS,
    LAST_ROW,
    find_slots,
    popcount,
    row_keys,
    slot_entries,
    tap_cell,
    tap_keys,
    unseal,
)
from tritonspconv.kernels.triton._launch import launch

_BLOCK_N = 32
# Of generated sites: words of 128 MiB.
_MAX_BITMAP_CELLS = 2**29
# Of given sites: words and rows of this much, and as much again as a table of 16 taps.
_MAX_INDEX_BYTES = 2**28


@triton.jit(do_not_specialize=["n", "batch_size", "shift", "n_words"])
def mark_kernel(
    coords_ptr,
    taps_ptr,
    words_ptr,
    n,
    batch_size,
    lower,
    shape,
    own_lower,
    own_shape,
    shift,
    n_words,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    NARROW: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Set the bit of every site that a row reaches, and count the bits of each block of words."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    _own, inside = row_keys(coords_ptr, rows, rows < n, own_lower, own_shape, batch_size, NDIM)
    key, valid = tap_keys(
        coords_ptr, taps_ptr, rows, inside, offs_v, offs_v < V, lower, shape,
        STRIDE, DIVIDE, NDIM, NARROW,
    )  # fmt: skip
    block = (key >> shift).to(tl.int64)
    word = block >> 5
    bit = block & 31
    one = tl.zeros_like(bit) + 1
    before = tl.atomic_or(words_ptr + word, one << bit, mask=valid, sem="relaxed")
    # Of all who set a bit, one finds it unset.
    is_new = valid & (((before >> bit) & 1) == 0)
    tl.atomic_add(words_ptr + n_words + word // BLOCK_WORDS, one, mask=is_new, sem="relaxed")


@triton.jit(do_not_specialize=["n_words"])
def rank_kernel(words_ptr, n_words, BLOCK: tl.constexpr):
    """Write the rank of each word's first set bit to its upper half, and the total at the end."""
    pid = tl.program_id(0)
    last = tl.num_programs(0) - 1
    counts_ptr = words_ptr + n_words
    own = tl.load(counts_ptr + pid)
    if (own > 0) | (pid == last):
        lane = tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, pid, BLOCK):
            sums += tl.load(counts_ptr + start + lane, mask=start + lane < pid, other=0)
        before = tl.sum(sums, axis=0)
        if pid == last:
            tl.store(counts_ptr + last + 1, before + own)
        offs = pid.to(tl.int64) * BLOCK + lane
        word = tl.load(words_ptr + offs, mask=offs < n_words, other=0)
        count = popcount(word.to(tl.int32))
        rank = before + (tl.cumsum(count, axis=0) - count)
        tl.store(words_ptr + offs, word | (rank << 32), mask=count > 0)


@triton.jit(do_not_specialize=["n", "batch_size", "shift"])
def store_rows_kernel(
    coords_ptr,
    words_ptr,
    rows_ptr,
    n,
    batch_size,
    lower,
    shape,
    shift,
    NDIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store every row in its block's slot; the lowest of those that repeat a site stays."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    key, inside = row_keys(coords_ptr, rows, rows < n, lower, shape, batch_size, NDIM)
    slot = find_slots(key, inside, words_ptr, shift)
    entry = slot_entries(slot, key, shift)
    tl.atomic_max(rows_ptr + entry, rows ^ LAST_ROW, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["n", "batch_size"])
def write_sites_kernel(
    coords_ptr,
    taps_ptr,
    words_ptr,
    out_ptr,
    n,
    batch_size,
    lower,
    shape,
    own_lower,
    own_shape,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    NARROW: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the coordinates of every reached site at its rank; all who reach it write the same."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    _own, inside = row_keys(coords_ptr, rows, rows < n, own_lower, own_shape, batch_size, NDIM)
    key, valid = tap_keys(
        coords_ptr, taps_ptr, rows, inside, offs_v, mask_v, lower, shape,
        STRIDE, DIVIDE, NDIM, NARROW,
    )  # fmt: skip
    slot = find_slots(key, valid, words_ptr, 0)
    out = out_ptr + slot.to(tl.int64) * (NDIM + 1)
    batch = tl.load(coords_ptr + rows.to(tl.int64) * (NDIM + 1), mask=inside, other=0)
    tl.store(out, batch[:, None] + tl.zeros_like(slot), mask=valid)
    for d in tl.static_range(NDIM):
        cell = tap_cell(
            coords_ptr, taps_ptr, rows, inside, offs_v, mask_v, lower,
            d, STRIDE, DIVIDE, NDIM, NARROW,
        )  # fmt: skip
        corner = unseal(lower[d])
        tl.store(out + (d + 1), (cell + corner).to(tl.int32), mask=valid)


def _empty_words(n_bits: int, extra: int, device: torch.device) -> tuple[Tensor, int]:
    """Return zeroed words for ``n_bits``, their counters and ``extra`` words; number of words.

    Behind the words come a counter for each block of them, and one for the total.
    """
    n_words = num_blocks(n_bits, 32)
    counters = num_blocks(n_words, BLOCK_WORDS.value) + 1
    return torch.zeros(n_words + counters + extra, dtype=torch.int64, device=device), n_words


def _rank(words: Tensor, n_words: int) -> None:
    block = BLOCK_WORDS.value
    launch(rank_kernel, (num_blocks(n_words, block),), words.device, words, n_words, BLOCK=block)


def _choose_shift(n: int, cells: int) -> int | None:
    """Return log2 of the cells in a block for ``n`` sites, or None where a bitmap is too large.

    Of all sizes this one takes the least memory, words and rows together.
    """
    shift = (cells // (16 * max(n, 1))).bit_length() // 2
    size = (cells >> shift) // 4 + (4 * n << shift)
    return shift if size <= _MAX_INDEX_BYTES + 64 * n else None


def build_index(coords: Tensor, grid: CellGrid) -> SiteIndex:
    """Index ``coords`` [N, 1 + D] by key; rows outside the grid are left out.

    Where cells are so many that a bitmap would take too much memory, the index is sorted keys.
    """
    n, ndim, device = coords.shape[0], coords.shape[1] - 1, coords.device
    cells = grid.num_cells
    shift = _choose_shift(n, cells)
    if shift is None:
        return eager_sites.build_index(coords, grid)
    memory, n_words = _empty_words(num_blocks(cells, 2**shift), num_blocks(n << shift, 2), device)
    rows = memory[memory.shape[0] - num_blocks(n << shift, 2) :].view(torch.int32)
    if n and cells:
        taps = device_taps(((0,) * ndim,), device)
        box, block = box_args(grid), 4 * _BLOCK_N
        launch(
            mark_kernel, (num_blocks(n, block), 1), device,
            coords, taps.table, memory, n, grid.batch_size, *box, *box, shift, n_words,
            STRIDE=(1,) * ndim, DIVIDE=False, NDIM=ndim, NARROW=is_narrow(grid, taps), V=1,
            BLOCK_N=block, BLOCK_V=1,
        )  # fmt: skip
        _rank(memory, n_words)
        launch(
            store_rows_kernel, (num_blocks(n, block),), device,
            coords, memory, rows, n, grid.batch_size, *box, shift, NDIM=ndim, BLOCK_N=block,
        )  # fmt: skip
    return SiteIndex("bitmap", memory, rows, shift)


def reached_sites(
    coords: Tensor,
    offsets: tuple[tuple[int, ...], ...],
    stride: tuple[int, ...],
    divide: bool,
    grid: CellGrid,
    own_grid: CellGrid,
) -> tuple[Tensor, SiteIndex]:
    """Find every site of ``grid`` that some row of ``coords`` reaches through a tap.

    Args:
        coords: int32 [N, 1 + D].
        offsets: V tap offsets, ``fine - stride * coarse``.
        stride: Fine sites per coarse site.
        divide: True when ``coords`` are fine and the target is coarse.
        grid: The target grid.
        own_grid: The grid of ``coords``; rows outside it reach nothing.

    Returns:
        int32 coordinates [M, 1 + D] in ascending key order, and their index. Waits for the device
        once, for M.
    """
    ndim, n, device = len(stride), coords.shape[0], coords.device
    cells = grid.num_cells
    if n == 0 or cells == 0:
        return coords.new_empty(0, ndim + 1), build_index(coords[:0], grid)
    if cells > _MAX_BITMAP_CELLS:
        out, index = eager_sites.reached_sites(coords, offsets, stride, divide, grid, own_grid)
        return out, index
    words, n_words = _empty_words(cells, 0, device)
    taps = device_steps(offsets, stride, divide, device)
    blocks, block_v = tap_grid(n, taps.volume, _BLOCK_N)
    batch_size = min(grid.batch_size, own_grid.batch_size)
    box = n, batch_size, *box_args(grid), *box_args(own_grid)
    meta = {
        "STRIDE": stride, "DIVIDE": divide, "NDIM": ndim, "NARROW": is_narrow(grid, taps),
        "V": taps.volume, "BLOCK_N": _BLOCK_N, "BLOCK_V": block_v, "num_warps": 4,
    }  # fmt: skip
    launch(mark_kernel, blocks, device, coords, taps.table, words, *box, 0, n_words, **meta)
    _rank(words, n_words)
    out = torch.empty(int(words[-1]), ndim + 1, dtype=torch.int32, device=device)
    launch(write_sites_kernel, blocks, device, coords, taps.table, words, out, *box, **meta)
    return out, SiteIndex("bitmap", words, None)
