"""A table seen from its other side, made of the table alone (Triton)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.table import NeighborTable
from tritonspconv.kernels.triton._blocks import num_blocks
from tritonspconv.kernels.triton._bounds import real_rows
from tritonspconv.kernels.triton._grid import Offsets
from tritonspconv.kernels.triton._launch import launch
from tritonspconv.kernels.triton._scratch_table import new_scratch, table_of

_BLOCK_N = 256


@triton.jit(do_not_specialize=["n"])
def invert_kernel(
    rows_ptr,
    order_ptr,
    scratch_ptr,
    count_ptr,
    n,
    HAS_ORDER: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``scratch[i, v]`` = the row whose entry of tap v is i."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tl.program_id(1)
    mask_n = offs_n < real_rows(count_ptr, n)
    row = tl.load(order_ptr + offs_n, mask=mask_n, other=0) if HAS_ORDER else offs_n
    other = tl.load(rows_ptr + v.to(tl.int64) * n + offs_n, mask=mask_n, other=-1)
    tl.atomic_min(scratch_ptr + other.to(tl.int64) * V + v, row, mask=other >= 0, sem="relaxed")


def invert_table(
    rows: Tensor,
    order: Tensor | None,
    n_other: int,
    offsets: Offsets,
    *,
    count: Tensor | None = None,
    other_count: Tensor | None = None,
) -> NeighborTable:
    """Write columns into a scratch [n_other, V], then make the table of it."""
    volume, n = rows.shape
    scratch = new_scratch(n_other, volume, rows.device)
    if n and n_other:
        launch(
            invert_kernel, (num_blocks(n, _BLOCK_N), volume), rows.device,
            rows, order, scratch, count, n, HAS_ORDER=order is not None, V=volume, BLOCK_N=_BLOCK_N,
        )  # fmt: skip
    return table_of(scratch, offsets, other_count)
