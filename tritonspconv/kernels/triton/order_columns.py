"""Order the columns of a table, for layers of many channels (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.triton._blocks import num_blocks
from tritonspconv.kernels.triton._bounds import PADDING_KEY, real_rows
from tritonspconv.kernels.triton._column_order import sort_key, tap_groups
from tritonspconv.kernels.triton._grid import Offsets
from tritonspconv.kernels.triton._launch import launch

_BLOCK_N = 512


@triton.jit(do_not_specialize=["n"])
def column_key_kernel(mask_ptr, groups_ptr, key_ptr, count_ptr, n, BLOCK_N: tl.constexpr):
    """Sort key of each column of a table."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < real_rows(count_ptr, n)
    mask = tl.load(mask_ptr + offs_n, mask=mask_n, other=0)
    key = tl.where(mask_n, sort_key(mask, groups_ptr), PADDING_KEY)
    tl.store(key_ptr + offs_n, key, mask=offs_n < n)


@triton.jit(do_not_specialize=["n"])
def permute_columns_kernel(
    rows_ptr,
    mask_ptr,
    sorted_ptr,
    new_rows_ptr,
    new_mask_ptr,
    order_ptr,
    count_ptr,
    n,
    BLOCK_N: tl.constexpr,
):
    """Write one tap's entries of a block of columns in their new order; for tap 0, masks too."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tl.program_id(1)
    mask_n = offs_n < real_rows(count_ptr, n)
    column = tl.load(sorted_ptr + offs_n, mask=offs_n < n, other=0)
    begin = v.to(tl.int64) * n
    entry = tl.load(rows_ptr + begin + column, mask=mask_n, other=-1)
    tl.store(new_rows_ptr + begin + offs_n, entry, mask=mask_n)
    if v == 0:
        tl.store(order_ptr + offs_n, column.to(tl.int32), mask=offs_n < n)
        present = tl.load(mask_ptr + column, mask=mask_n, other=0)
        tl.store(new_mask_ptr + offs_n, present, mask=mask_n)


def order_columns(
    rows: Tensor, mask: Tensor, offsets: Offsets, count: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the columns by a key of their masks; return rows, mask and order."""
    (volume, n), device = rows.shape, rows.device
    keys = torch.empty(n, dtype=torch.int16, device=device)
    blocks = num_blocks(n, _BLOCK_N)
    launch(
        column_key_kernel, (blocks,), device,
        mask, tap_groups(offsets, device), keys, count, n, BLOCK_N=_BLOCK_N,
    )  # fmt: skip
    permutation = torch.sort(keys, stable=True)[1]
    ordered = torch.empty_like(rows), torch.empty_like(mask)
    order = torch.empty(n, dtype=torch.int32, device=device)
    launch(
        permute_columns_kernel, (blocks, volume), device,
        rows, mask, permutation, *ordered, order, count, n, BLOCK_N=_BLOCK_N,
    )  # fmt: skip
    return *ordered, order
