"""Pair lists: the (input row, output row) pairs of a table, tap by tap (Triton)."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.table import NeighborTable
from tritonspconv.kernels.triton._bits import popcount_signed
from tritonspconv.kernels.triton._blocks import num_blocks
from tritonspconv.kernels.triton._bounds import real_rows
from tritonspconv.kernels.triton._launch import BoundKernel, bind

_BLOCK_N = 1024
# Up to this many columns, and 32 taps, each program counts the pairs before its own in the masks.
# One launch then replaces three short kernels. The launches of these three take longer than the
# kernels themselves.
_MAX_COUNTED = 32_768
_COUNTED_BLOCK_N = 2048
_BLOCK_COUNTS = 4096


@triton.jit(do_not_specialize=["n"])
def count_pairs_kernel(rows_ptr, counts_ptr, count_ptr, n, BLOCK_N: tl.constexpr):
    """Count the present entries of each block of columns, per tap."""
    v = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < real_rows(count_ptr, n)
    rows = tl.load(rows_ptr + v.to(tl.int64) * n + offs_n, mask=mask_n, other=-1)
    count = tl.sum((rows >= 0).to(tl.int32), axis=0)
    tl.store(counts_ptr + v * tl.num_programs(0) + tl.program_id(0), count)


@triton.jit(do_not_specialize=["n"])
def running_sums_kernel(counts_ptr, ends_ptr, n, BLOCK: tl.constexpr):
    """Write the running sums of n counts, in one program."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((1,), dtype=tl.int64)
    for at in range(0, n, BLOCK):
        count = tl.load(counts_ptr + at + offs, mask=at + offs < n, other=0).to(tl.int64)
        tl.store(ends_ptr + at + offs, total + tl.cumsum(count, axis=0), mask=at + offs < n)
        total += tl.sum(count, axis=0)


@triton.jit
def pairs_before(mask_ptr, n, v, column, BLOCK_N: tl.constexpr):
    """Count the pairs of all taps before v, plus the pairs of v in columns before ``column``."""
    offs_n = tl.arange(0, BLOCK_N)
    count = tl.zeros((BLOCK_N,), dtype=tl.int32)
    for at in range(0, n, BLOCK_N):
        mask = tl.load(mask_ptr + at + offs_n, mask=at + offs_n < n, other=0)
        count += popcount_signed(mask & ((1 << v) - 1))
        count += tl.where(at + offs_n < column, (mask >> v) & 1, 0)
    return tl.sum(count, axis=0)


@triton.jit(do_not_specialize=["n", "capacity", "n_in"])
def write_pairs_kernel(
    rows_ptr,
    mask_ptr,
    order_ptr,
    ends_ptr,
    pairs_ptr,
    tap_ptr_ptr,
    seen_ptr,
    in_mask_ptr,
    count_ptr,
    n,
    capacity,
    n_in,
    HAS_ORDER: tl.constexpr,
    HAS_ENDS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the pairs of each block at its place, and where each tap's pairs begin.

    HAS_ENDS: the running sums of the blocks' counts are given; else count in masks of one word.
    WORDS: Mask words of the table of the inputs, if that is to be written too; else 0.
    """
    v = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N
    offs_n = column + tl.arange(0, BLOCK_N)
    real = real_rows(count_ptr, n)
    mask_n = offs_n < real
    rows = tl.load(rows_ptr + v.to(tl.int64) * n + offs_n, mask=mask_n, other=-1)
    present = (rows >= 0).to(tl.int32)
    count = tl.sum(present, axis=0)
    if HAS_ENDS:
        start = tl.load(ends_ptr + v * tl.num_programs(0) + tl.program_id(0)) - count
    else:
        start = pairs_before(mask_ptr, real, v, column, BLOCK_N)
    place = start + tl.cumsum(present, axis=0) - present
    out = tl.load(order_ptr + offs_n, mask=mask_n, other=0) if HAS_ORDER else offs_n
    tl.store(pairs_ptr + place, rows, mask=rows >= 0)
    tl.store(pairs_ptr + capacity + place, out, mask=rows >= 0)
    if WORDS > 0:
        tl.store(seen_ptr + rows, present, mask=rows >= 0)
        for word in tl.static_range(WORDS):
            bit = tl.where(v // 32 == word, 1 << (v % 32), 0) + tl.zeros_like(rows)
            tl.store(in_mask_ptr + word * n_in.to(tl.int64) + place, bit, mask=rows >= 0)
    if tl.program_id(0) == 0:
        tl.store(tap_ptr_ptr + v, start)
    if (tl.program_id(0) == tl.num_programs(0) - 1) & (v == tl.num_programs(1) - 1):
        tl.store(tap_ptr_ptr + tl.num_programs(1), start + count)


@triton.jit(do_not_specialize=["capacity", "n_in"])
def append_unpaired_kernel(
    seen_ptr,
    tap_ptr_ptr,
    pairs_ptr,
    in_mask_ptr,
    capacity,
    n_in,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Append the inputs that no pair names: entry -1, and no bit in the mask.

    A block takes the next free places. The order does not matter, because these inputs have no
    pairs.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    seen = tl.load(seen_ptr + rows, mask=rows < n_in, other=1)
    unpaired = seen == 0
    count = unpaired.to(tl.int32)
    total = tl.sum(count, axis=0)
    if total > 0:
        first = tl.load(tap_ptr_ptr + V) + tl.atomic_add(seen_ptr + n_in, total, sem="relaxed")
        place = first + tl.cumsum(count, axis=0) - count
        absent = tl.zeros_like(rows) - 1
        tl.store(pairs_ptr + place, rows, mask=unpaired)
        tl.store(pairs_ptr + capacity + place, absent, mask=unpaired)
        for word in tl.static_range((V + 31) // 32):
            no_tap = in_mask_ptr + word * n_in.to(tl.int64) + place
            tl.store(no_tap, tl.zeros_like(rows), mask=unpaired)


def pair_lists(
    rows: Tensor,
    mask: Tensor | None,
    order: Tensor | None,
    taps: int,
    capacity: int,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Count the pairs before each program's own, then write them."""
    device = rows.device
    pairs = torch.empty(2, capacity, dtype=torch.int32, device=device)
    return pairs, _write(rows, mask, order, count, taps, pairs, 0, None, None)


def list_inputs(
    rows: Tensor,
    mask: Tensor | None,
    order: Tensor | None,
    n_in: int,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, NeighborTable]:
    """List all pairs, then append the inputs that have none."""
    volume, device = rows.shape[0], rows.device
    words = num_blocks(volume, 32)
    # Both rows start at a multiple of 16 bytes.
    pairs = torch.empty(2, 4 * num_blocks(n_in, 4), dtype=torch.int32, device=device)
    in_mask = torch.empty(words, n_in, dtype=torch.int32, device=device)
    # The entry behind the flags counts the inputs without an output that have a place.
    seen = torch.zeros(n_in + 1, dtype=torch.int32, device=device)
    tap_ptr = _write(rows, mask, order, count, volume, pairs, words, seen, in_mask)
    if n_in:
        append = bind(append_unpaired_kernel, V=volume, BLOCK_N=_BLOCK_N)
        append(
            (num_blocks(n_in, _BLOCK_N),), device,
            seen, tap_ptr, pairs, in_mask, pairs.shape[1], n_in,
        )  # fmt: skip
    return pairs, tap_ptr, NeighborTable(pairs[1:, :n_in], in_mask, pairs[0, :n_in])


def _write(
    rows: Tensor,
    mask: Tensor | None,
    order: Tensor | None,
    count: Tensor | None,
    taps: int,
    pairs: Tensor,
    words: int,
    seen: Tensor | None,
    in_mask: Tensor | None,
) -> Tensor:
    """Write the pairs, and with ``seen`` the table of the inputs; return ``tap_ptr``."""
    n, device = rows.shape[1], rows.device
    if n == 0:
        return torch.zeros(taps + 1, dtype=torch.int64, device=device)
    ends = None
    if n > _MAX_COUNTED or taps > 32:
        ends = _block_ends(rows, count, taps)
    tap_ptr = torch.empty(taps + 1, dtype=torch.int64, device=device)
    write, block_n = _bind_write(order is not None, ends is not None, words)
    n_in = 0 if in_mask is None else in_mask.shape[1]
    write(
        (num_blocks(n, block_n), taps), device,
        rows, mask, order, ends, pairs, tap_ptr, seen, in_mask, count, n,
        pairs.shape[1], n_in,
    )  # fmt: skip
    return tap_ptr


def _block_ends(rows: Tensor, real: Tensor | None, taps: int) -> Tensor:
    """Return the running sum of the pairs of each block of columns, tap by tap; int64."""
    n = rows.shape[1]
    blocks = num_blocks(n, _BLOCK_N)
    counts = torch.empty(taps * blocks, dtype=torch.int32, device=rows.device)
    count = bind(count_pairs_kernel, BLOCK_N=_BLOCK_N)
    count((blocks, taps), rows.device, rows, counts, real, n)
    # Torch's cumulative sum takes as much host time as ten launches.
    ends = torch.empty(taps * blocks, dtype=torch.int64, device=rows.device)
    add_up = bind(running_sums_kernel, BLOCK=_BLOCK_COUNTS, num_warps=8)
    add_up((1,), rows.device, counts, ends, taps * blocks)
    return ends


@functools.lru_cache(maxsize=64)
def _bind_write(has_order: bool, has_ends: bool, words: int) -> tuple[BoundKernel, int]:
    """Return the kernel that writes, and the number of columns of a program."""
    block_n = _BLOCK_N if has_ends else _COUNTED_BLOCK_N
    kernel = bind(
        write_pairs_kernel,
        HAS_ORDER=has_order, HAS_ENDS=has_ends, WORDS=words, BLOCK_N=block_n,
    )  # fmt: skip
    return kernel, block_n
