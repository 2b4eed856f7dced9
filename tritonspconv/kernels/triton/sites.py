"""Index of given sites, and the sorted unique set of generated ones (Triton)."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.eager import sites as eager_sites
from tritonspconv.kernels.index import CellGrid, ReachedSites, SiteIndex
from tritonspconv.kernels.triton._bits import popcount
from tritonspconv.kernels.triton._blocks import num_blocks
from tritonspconv.kernels.triton._grid import (
    IntTuple,
    box_args,
    is_narrow,
    seal_grid,
    window_steps,
)
from tritonspconv.kernels.triton._index import (
    LAST_ROW,
    find_ranks,
    row_keys,
    row_starts,
    slot_entries,
    tap_cell,
    tap_keys,
    unseal,
)
from tritonspconv.kernels.triton._launch import BoundKernel, bind
from tritonspconv.kernels.window import Window

_BLOCK_N = 128
_BLOCK_WORDS, _BLOCK_ALLOTTED = 2048, 1024
_FLAG_BIT: tl.constexpr = tl.constexpr(62)
# The most memory of an index: this many bytes, plus the bytes of a row in a table of 64 taps.
_MAX_INDEX_BYTES, _MAX_ROW_BYTES = 2**28, 256


@triton.jit(do_not_specialize=["n", "batch_size", "shift"])
def mark_pages_kernel(
    coords_ptr,
    words_ptr,
    n,
    batch_size,
    box,
    shift,
    NDIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Set the bit of every page that a row lies in."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    key, inside = row_keys(coords_ptr, rows, rows < n, box, batch_size, 0, NDIM)
    page = key >> shift
    word = tl.load(words_ptr + (page >> 5), mask=inside, other=-1)
    unset = ((word >> (page & 31)) & 1) == 0
    bit = tl.full(page.shape, 1, tl.int64) << (page & 31)
    tl.atomic_or(words_ptr + (page >> 5), bit, mask=unset, sem="relaxed")


@triton.jit(do_not_specialize=["n", "n_table", "batch_size", "shift"])
def insert_kernel(
    coords_ptr,
    words_ptr,
    slots_ptr,
    n,
    n_table,
    batch_size,
    box,
    shift,
    NDIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store every row in its page's slot. If several rows repeat a site, the lowest stays.

    If any row repeats a site, set the table's last entry.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    key, inside = row_keys(coords_ptr, rows, rows < n, box, batch_size, 0, NDIM)
    slot, occupied = find_ranks(key >> shift, inside, words_ptr)
    entry = slots_ptr + slot_entries(slot, key, shift)
    other = tl.atomic_max(entry, rows ^ LAST_ROW, mask=occupied, sem="relaxed")
    repeated = words_ptr + (n_table - 1) + tl.zeros_like(rows)
    tl.store(repeated, 1, mask=occupied & (other != 0))


@triton.jit(do_not_specialize=["n", "batch_size"])
def mark_kernel(
    coords_ptr,
    words_ptr,
    firsts_ptr,
    n,
    batch_size,
    box,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    NARROW: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Set the bit of every site that a row reaches.

    Bit v of ``firsts[row]`` says that this row set step v's bit first. Any winner will do.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    _own, inside = row_keys(coords_ptr, rows, rows < n, box, batch_size, 2 * NDIM, NDIM)
    starts = row_starts(coords_ptr, rows, inside, box, STRIDE, DIVIDE, NDIM, NARROW)
    keys = ()
    unset = ()
    for v in tl.static_range(V):
        key, valid = tap_keys(starts, inside, box, v, TAPS, STRIDE, DIVIDE, NDIM, NARROW)
        # Several rows reach a site. Load the word first: that is cheaper than a needless atomic.
        word = tl.load(words_ptr + (key >> 5), mask=valid, other=-1)
        keys = keys + (key,)  # noqa: RUF005 - Triton has no *
        unset = unset + (((word >> (key & 31)) & 1) == 0,)  # noqa: RUF005
    firsts = tl.zeros_like(rows)
    for v in tl.static_range(V):
        bit = tl.full(keys[v].shape, 1, tl.int64) << (keys[v] & 31)
        word = tl.atomic_or(words_ptr + (keys[v] >> 5), bit, mask=unset[v], sem="relaxed")
        firsts |= (unset[v] & ((word & bit) == 0)).to(tl.int32) << v
    tl.store(firsts_ptr + rows, firsts, mask=rows < n)


@triton.jit(do_not_specialize=["n_words"])
def allot_kernel(words_ptr, n_words, BLOCK: tl.constexpr):
    """Write the number of each word's first slot to its upper half.

    The entry behind the words counts the slots that are taken. A block of words takes the next free
    slots: no result depends on which, so no block waits for the blocks before it.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words_ptr + offs, mask=offs < n_words, other=0)
    count = popcount(word.to(tl.uint32))
    own = tl.sum(count, axis=0).to(tl.int64)
    first = tl.atomic_add(words_ptr + n_words, own, sem="relaxed")
    slot = first + (tl.cumsum(count, axis=0) - count)
    tl.store(words_ptr + offs, word | (slot << 32), mask=count > 0)


@triton.jit(do_not_specialize=["n_words", "capacity"])
def rank_kernel(
    words_ptr, flag_ptr, count_ptr, overflow_ptr, n_words, capacity, BLOCK: tl.constexpr
):
    """Write the rank of each word's first set bit to its upper half, and the total at the end.

    Bit ``_FLAG_BIT`` of the total says whether the flag is set, if there is a flag. Behind the
    words stand one sum for each block of words, a ticket counter, and the total. A program takes a
    ticket, which is the number of its block, publishes the block's sum, and adds up the sums before
    it. So it waits only for programs that have started. With ``count_ptr`` only ``capacity`` sites
    may be: words that hold later ones are cleared, the count is at most the capacity, and the
    overflow flag says whether words were cleared.
    """
    last = tl.num_programs(0) - 1
    sums_ptr = words_ptr + n_words
    block = tl.atomic_add(sums_ptr + last + 1, 1, sem="relaxed")
    lane = tl.arange(0, BLOCK)
    offs = block * BLOCK + lane
    word = tl.load(words_ptr + offs, mask=offs < n_words, other=0)
    count = popcount(word.to(tl.uint32))
    own = tl.sum(count, axis=0).to(tl.int64)
    # Zero means that a sum is not published yet, so publish sum + 1.
    tl.atomic_xchg(sums_ptr + block, own + 1, sem="relaxed")
    before = block * 0
    for start in range(0, block.to(tl.int32), BLOCK):
        wanted = start + lane < block
        sums = tl.load(sums_ptr + start + lane, mask=wanted, other=1, volatile=True)
        while tl.min(sums, axis=0) == 0:
            sums = tl.load(sums_ptr + start + lane, mask=wanted, other=1, volatile=True)
        before += tl.sum(sums - 1, axis=0)
    upto = tl.cumsum(count, axis=0)
    tl.store(words_ptr + offs, word | ((before + (upto - count)) << 32), mask=count > 0)
    if count_ptr is not None:  # noqa: SIM102 - Triton compiles one branch of an `if` only
        if before + own > capacity:
            room = (capacity - before).to(tl.int32)
            tl.store(words_ptr + offs, tl.zeros_like(word), mask=(count > 0) & (upto > room))
    if block == last:
        total = before + own
        if count_ptr is not None:
            tl.store(overflow_ptr, (total > capacity).to(tl.int32))
            tl.store(count_ptr, tl.minimum(total, capacity))
        if flag_ptr is not None:
            total |= (tl.load(flag_ptr) != 0).to(tl.int64) << _FLAG_BIT
        tl.store(sums_ptr + last + 2, total)


@triton.jit(do_not_specialize=["n"])
def write_sites_kernel(
    coords_ptr,
    words_ptr,
    firsts_ptr,
    out_ptr,
    n,
    box,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    NARROW: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the coordinates of every site at its rank, from the row that reached it first."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    firsts = tl.load(firsts_ptr + rows, mask=rows < n, other=0)
    starts = row_starts(coords_ptr, rows, firsts != 0, box, STRIDE, DIVIDE, NDIM, NARROW)
    ranks = ()
    for v in tl.static_range(V):
        first = ((firsts >> v) & 1) != 0
        key, inside = tap_keys(starts, first, box, v, TAPS, STRIDE, DIVIDE, NDIM, NARROW)
        rank, found = find_ranks(key, inside, words_ptr)
        ranks = ranks + (tl.where(found, rank, -1),)  # noqa: RUF005 - Triton has no *
    for v in tl.static_range(V):
        out = out_ptr + ranks[v].to(tl.int64) * (NDIM + 1)
        tl.store(out, starts[0].to(tl.int32), mask=ranks[v] >= 0)
        for d in tl.static_range(NDIM):
            cell, _exists = tap_cell(starts, v, d, TAPS, STRIDE, DIVIDE, NDIM)
            tl.store(out + (d + 1), (cell + unseal(box[d])).to(tl.int32), mask=ranks[v] >= 0)


def _choose_shift(n: int, cells: int) -> int | None:
    """Return log2 of the cells in a page for ``n`` sites; None if the index would be too large.

    Pages of this size take the least memory, words and slots together.
    """
    shift = (cells // (16 * max(n, 1))).bit_length() // 2
    fits = _is_affordable((cells >> shift) // 4 + (4 * n << shift), n) and n << shift < 2**31
    return shift if fits else None


def _is_affordable(size: int, n: int) -> bool:
    """Return whether an index for ``n`` rows may take ``size`` bytes."""
    return size <= _MAX_INDEX_BYTES + _MAX_ROW_BYTES * n


def build_index(coords: Tensor, grid: CellGrid) -> SiteIndex:
    """Index ``coords`` [N, 1 + D] by key; rows outside the grid are left out.

    If the grid has so many cells that pages would take too much memory, the index is sorted keys.
    """
    n, device = coords.shape[0], coords.device
    shift = _choose_shift(n, grid.num_cells)
    if shift is None:
        return eager_sites.build_index(coords, grid)
    n_words = num_blocks(grid.num_cells, 32 << shift)
    # The words are followed by the number of slots taken and by the repeat flag. Slots start at a
    # multiple of 16 bytes.
    n_table = 2 * num_blocks(n_words + 2, 2)
    memory = torch.zeros(2 * n_table + (n << shift), dtype=torch.int32, device=device)
    table, slots = memory[: 2 * n_table].view(torch.int64), memory[2 * n_table :]
    if n and n_words:
        blocks, box = (num_blocks(n, _BLOCK_N),), seal_grid(grid)
        mark, allot, insert = _index_kernels(coords.shape[1] - 1)
        mark(blocks, device, coords, table, n, grid.batch_size, box, shift)
        allot((num_blocks(n_words, _BLOCK_ALLOTTED),), device, table, n_words)
        insert(blocks, device, coords, table, slots, n, n_table, grid.batch_size, box, shift)
    return SiteIndex("pages", table, slots, shift)


@functools.lru_cache(maxsize=16)
def _index_kernels(ndim: int) -> tuple[BoundKernel, BoundKernel, BoundKernel]:
    """Return the kernels that mark pages, allot slots and insert rows."""
    kind = {"NDIM": ndim, "BLOCK_N": _BLOCK_N}
    return (
        bind(mark_pages_kernel, **kind),
        bind(allot_kernel, BLOCK=_BLOCK_ALLOTTED, num_warps=4),
        bind(insert_kernel, **kind),
    )


@functools.lru_cache(maxsize=1024)
def _bind_reach(
    offsets: Window,
    stride: tuple[int, ...],
    divide: bool,
    grid: CellGrid,
    own_grid: CellGrid,
) -> tuple[list[BoundKernel], list[BoundKernel], int, IntTuple]:
    """Return the kernels that mark and write reached sites, and their last arguments."""
    mark, write = _reach_kernels(offsets, stride, divide, is_narrow(grid, offsets, stride))
    return mark, write, *box_args(grid, own_grid, offsets)


@functools.lru_cache(maxsize=512)
def _reach_kernels(
    offsets: Window, stride: tuple[int, ...], divide: bool, narrow: bool
) -> tuple[list[BoundKernel], list[BoundKernel]]:
    """Return the kernels that mark and write the sites a window reaches, 32 steps each."""
    metas = [
        {
            "TAPS": taps.constants, "STRIDE": stride, "DIVIDE": divide, "NDIM": len(stride),
            "NARROW": narrow, "V": taps.volume, "BLOCK_N": _BLOCK_N,
        }
        for taps in window_steps(offsets, stride, divide)
    ]  # fmt: skip
    return (
        [bind(mark_kernel, **meta) for meta in metas],
        [bind(write_sites_kernel, **meta) for meta in metas],
    )


def reached_sites(
    coords: Tensor,
    offsets: Window,
    stride: tuple[int, ...],
    divide: bool,
    grid: CellGrid,
    own_grid: CellGrid,
    flag: Tensor | None = None,
    capacity: int | None = None,
    overflow: Tensor | None = None,
) -> ReachedSites:
    """Mark reached sites in a bitmap, rank them, and write each site once."""
    n, device, cells = coords.shape[0], coords.device, grid.num_cells
    if n and capacity is not None and not _is_affordable(cells // 4, n):
        raise RuntimeError(
            f"a grid of {cells} cells is too large for rows that are padded to a capacity, whose "
            "sites are found in a bitmap of all cells. Capture with a smaller box= or "
            "spatial_shape, or with larger voxels."
        )
    # A bitmap takes 8 bytes for 32 cells.
    if n == 0 or cells == 0 or not _is_affordable(cells // 4, n):
        return eager_sites.reached_sites(
            coords, offsets, stride, divide, grid, own_grid, flag, capacity, overflow
        )
    n_words = num_blocks(cells, 32)
    word_blocks = num_blocks(n_words, _BLOCK_WORDS)
    words = torch.zeros(n_words + word_blocks + 2, dtype=torch.int64, device=device)
    mark, write, batch_size, box = _bind_reach(offsets, stride, divide, grid, own_grid)
    # Bit v of a row's word: the row was the first to reach a site by step v.
    firsts = [torch.empty(n, dtype=torch.int32, device=device) for _ in mark]
    blocks = (num_blocks(n, _BLOCK_N),)
    for run, first in zip(mark, firsts, strict=True):
        run(blocks, device, coords, words, first, n, batch_size, box)
    # With a capacity eight warps would have too few registers.
    rank = bind(rank_kernel, BLOCK=_BLOCK_WORDS, num_warps=8 if capacity is None else 16)
    count = None if capacity is None else torch.empty((), dtype=torch.int64, device=device)
    rank((word_blocks,), device, words, flag, count, overflow, n_words, capacity or 0)
    is_set = None
    if capacity is None:
        total = int(words[-1])
        is_set = None if flag is None else bool(total >> _FLAG_BIT.value)
        n_out = total & ((1 << _FLAG_BIT.value) - 1)
        out = torch.empty(n_out, coords.shape[1], dtype=torch.int32, device=device)
    else:
        out = torch.full((capacity, coords.shape[1]), -1, dtype=torch.int32, device=device)
    for run, first in zip(write, firsts, strict=True):
        run(blocks, device, coords, words, first, out, n, box)
    return ReachedSites(out, SiteIndex("bitmap", words, None), is_set, count)
