"""A table out of a scratch, which holds the other row of each row and tap (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.table import NeighborTable
from tritonspconv.kernels.triton._blocks import next_power_of_2, num_blocks
from tritonspconv.kernels.triton._bounds import PADDING_KEY, real_rows
from tritonspconv.kernels.triton._column_order import has_order, sort_key, tap_groups
from tritonspconv.kernels.triton._grid import Offsets
from tritonspconv.kernels.triton._launch import launch

# The entry of a scratch for a tap without a pair. Kernels write the lowest row, by atomic minimum.
SCRATCH_ABSENT: tl.constexpr = tl.constexpr(2**31 - 1)
# Rows times taps of a program.
_BLOCK = 1024


@triton.jit
def mask_word(present, lane):
    """Bits of up to 32 taps: int32 [BLOCK_N] from bool [BLOCK_N, BLOCK_V]."""
    return tl.sum(tl.where(present, (tl.zeros_like(lane) + 1) << lane, 0), axis=1)


@triton.jit(do_not_specialize=["n"])
def scratch_key_kernel(
    scratch_ptr,
    groups_ptr,
    key_ptr,
    count_ptr,
    n,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sort key of each row of a scratch."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_V)
    mask = (offs_n < n)[:, None] & (lane < V)[None, :]
    scratch = scratch_ptr + offs_n.to(tl.int64)[:, None] * V + lane[None, :]
    present = tl.load(scratch, mask=mask, other=SCRATCH_ABSENT) != SCRATCH_ABSENT
    key = sort_key(mask_word(present, lane), groups_ptr)
    key = tl.where(offs_n < real_rows(count_ptr, n), key, PADDING_KEY)
    tl.store(key_ptr + offs_n, key, mask=offs_n < n)


@triton.jit(do_not_specialize=["n"])
def arrange_kernel(
    scratch_ptr,
    sorted_ptr,
    rows_ptr,
    mask_ptr,
    order_ptr,
    n,
    HAS_ORDER: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the scratch tap by tap, in column order, with the mask word of 32 taps."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.program_id(1)
    lane = tl.arange(0, BLOCK_V)
    offs_v = word * 32 + lane
    mask_n = offs_n < n
    mask_v = offs_v < V
    if HAS_ORDER:
        row = tl.load(sorted_ptr + offs_n, mask=mask_n, other=0)
        if word == 0:
            tl.store(order_ptr + offs_n, row.to(tl.int32), mask=mask_n)
    else:
        row = offs_n
    mask = mask_n[:, None] & mask_v[None, :]
    scratch = scratch_ptr + row.to(tl.int64)[:, None] * V + offs_v[None, :]
    found = tl.load(scratch, mask=mask, other=SCRATCH_ABSENT)
    present = found != SCRATCH_ABSENT
    rows = rows_ptr + offs_v.to(tl.int64)[None, :] * n + offs_n[:, None]
    tl.store(rows, tl.where(present, found, -1), mask=mask)
    tl.store(mask_ptr + word.to(tl.int64) * n + offs_n, mask_word(present, lane), mask=mask_n)


def new_scratch(n: int, volume: int, device: torch.device) -> Tensor:
    """Return a scratch int32 [n, V] without pairs."""
    return torch.full((n, volume), SCRATCH_ABSENT.value, dtype=torch.int32, device=device)


def table_of(scratch: Tensor, offsets: Offsets, count: Tensor | None = None) -> NeighborTable:
    """Turn a scratch [n, V] into rows [V, n], mask [W, n] and order [n] (None: not reordered)."""
    n, volume = scratch.shape
    device = scratch.device
    words = num_blocks(volume, 32)
    block_v = min(next_power_of_2(volume), 32)
    sizes = {"BLOCK_N": _BLOCK // block_v, "BLOCK_V": block_v}
    blocks = num_blocks(n, sizes["BLOCK_N"])
    rows = torch.empty(volume, n, dtype=torch.int32, device=device)
    mask = torch.empty(words, n, dtype=torch.int32, device=device)
    if n == 0:
        return NeighborTable(rows, mask, None, real_columns=count)
    order = permutation = None
    if has_order(n, volume):
        keys = torch.empty(n, dtype=torch.int16, device=device)
        launch(
            scratch_key_kernel, (blocks,), device,
            scratch, tap_groups(offsets, device), keys, count, n,
            V=volume, **sizes,
        )  # fmt: skip
        permutation = torch.sort(keys, stable=True)[1]
        order = torch.empty(n, dtype=torch.int32, device=device)
    launch(
        arrange_kernel, (blocks, words), device,
        scratch, permutation, rows, mask, order, n,
        HAS_ORDER=order is not None, V=volume, **sizes,
    )  # fmt: skip
    return NeighborTable(rows, mask, order, real_columns=count)
