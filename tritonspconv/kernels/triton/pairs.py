"""Pair lists: the (input row, output row) pairs of a table, tap by tap (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.triton._blocks import num_blocks
from tritonspconv.kernels.triton._launch import launch

_BLOCK_N = 1024


@triton.jit(do_not_specialize=["n"])
def count_pairs_kernel(rows_ptr, counts_ptr, n, BLOCK_N: tl.constexpr):
    """Count the present entries of each block of columns, per tap."""
    v = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.load(rows_ptr + v.to(tl.int64) * n + offs_n, mask=offs_n < n, other=-1)
    count = tl.sum((rows >= 0).to(tl.int32), axis=0)
    tl.store(counts_ptr + v * tl.num_programs(0) + tl.program_id(0), count)


@triton.jit(do_not_specialize=["n", "capacity"])
def write_pairs_kernel(
    rows_ptr,
    order_ptr,
    ends_ptr,
    pairs_ptr,
    tap_ptr_ptr,
    n,
    capacity,
    HAS_ORDER: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the pairs of each block at its place, and where each tap's pairs begin."""
    v = tl.program_id(1)
    blocks = tl.num_programs(0)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    rows = tl.load(rows_ptr + v.to(tl.int64) * n + offs_n, mask=mask_n, other=-1)
    present = (rows >= 0).to(tl.int32)
    end = tl.load(ends_ptr + v * blocks + tl.program_id(0))
    start = end - tl.sum(present, axis=0)
    place = start + tl.cumsum(present, axis=0) - present
    out = tl.load(order_ptr + offs_n, mask=mask_n, other=0) if HAS_ORDER else offs_n
    tl.store(pairs_ptr + place, rows, mask=rows >= 0)
    tl.store(pairs_ptr + capacity + place, out, mask=rows >= 0)
    if tl.program_id(0) == 0:
        tl.store(tap_ptr_ptr + v, start)
        if v == 0:
            last = tl.load(ends_ptr + tl.num_programs(1) * blocks - 1)
            tl.store(tap_ptr_ptr + tl.num_programs(1), last)


def pair_lists(
    rows: Tensor, order: Tensor | None, taps: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """List the pairs of the first ``taps`` taps of a table.

    Args:
        rows: int32 [V, n_out], input row or -1.
        order: int32 [n_out] output row of each column, or None.
        taps: Taps to list.
        capacity: An upper bound of the number of pairs.

    Returns:
        pairs int32 [2, capacity] (input rows, output rows), of which the first ``tap_ptr[-1]``
        columns are written, and tap_ptr int64 [taps + 1]. No wait for the device.
    """
    n = rows.shape[1]
    device = rows.device
    if n == 0:
        return (
            torch.empty(2, 0, dtype=torch.int32, device=device),
            torch.zeros(taps + 1, dtype=torch.int64, device=device),
        )
    blocks = num_blocks(n, _BLOCK_N)
    counts = torch.empty(taps * blocks, dtype=torch.int32, device=device)
    launch(count_pairs_kernel, (blocks, taps), device, rows, counts, n, BLOCK_N=_BLOCK_N)
    ends = torch.cumsum(counts, dim=0)
    pairs = torch.empty(2, capacity, dtype=torch.int32, device=device)
    tap_ptr = torch.empty(taps + 1, dtype=torch.int64, device=device)
    launch(
            write_pairs_kernel, (blocks, taps), device,
        rows, order, ends, pairs, tap_ptr, n, capacity,
        HAS_ORDER=order is not None, BLOCK_N=_BLOCK_N,
    )  # fmt: skip
    return pairs, tap_ptr
