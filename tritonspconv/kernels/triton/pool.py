"""Max, average and sum over the present taps of a neighbour table (Triton).

One program owns ``BLOCK_M`` columns of the table and ``BLOCK_N`` channels and walks the taps in
order. Both directions gather, so no two programs add to one row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.triton._blocks import next_power_of_2, num_blocks
from tritonspconv.kernels.triton._bounds import real_rows
from tritonspconv.kernels.triton._launch import launch

# Elements of one tile, and the most channels that it holds.
_TILE = 1024
_MAX_BLOCK_N = 128


@triton.jit(do_not_specialize=["n_out"])
def pool_fwd_kernel(
    feats_ptr,
    rows_ptr,
    order_ptr,
    out_ptr,
    saved_ptr,
    count_ptr,
    n_out,
    c,
    stride_feats_n,
    MODE: tl.constexpr,
    FLOOR: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    WANT_SAVED: tl.constexpr,
    V: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Reduce the input rows of a tile of outputs; outputs behind the count are zero."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < real_rows(count_ptr, n_out)
    mask_out = offs_m < n_out
    mask_n = offs_n < c
    # [BLOCK_M, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    if MODE == "max":
        acc += float("-inf") if FLOOR is None else FLOOR
    argmax = tl.full((BLOCK_M, BLOCK_N), -1, tl.int32)
    # [BLOCK_M]
    count = tl.zeros((BLOCK_M,), tl.int32)
    for v in range(V):
        tap_ptr = rows_ptr + tl.cast(v, tl.int64) * n_out
        row = tl.load(tap_ptr + offs_m, mask=mask_m, other=-1)
        present = (row >= 0)[:, None] & mask_n[None, :]
        source = feats_ptr + row.to(tl.int64)[:, None] * stride_feats_n + offs_n[None, :]
        value = tl.load(source, mask=present, other=0.0).to(ACC_DTYPE)
        if MODE == "max":
            # Take the first input even if it is -inf or the floor, and take NaN always.
            better = (value > acc) | ((value == acc) & (argmax < 0)) | (value != value)
            better = better & present
            acc = tl.where(better, value, acc)
            argmax = tl.where(better, row[:, None], argmax)
        else:
            acc += value
        if MODE == "avg":
            count += (row >= 0).to(tl.int32)
    if MODE == "max" and FLOOR is None:
        acc = tl.where(argmax < 0, 0.0, acc)
    if MODE == "avg":
        acc = acc / tl.maximum(count, 1).to(ACC_DTYPE)[:, None]

    if count_ptr is not None:
        acc = tl.where(mask_m[:, None], acc, 0.0)
    out_row = tl.load(order_ptr + offs_m, mask=mask_out, other=0) if HAS_ORDER else offs_m
    at = out_row.to(tl.int64)[:, None] * c + offs_n[None, :]
    mask = mask_out[:, None] & mask_n[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if WANT_SAVED and MODE == "max":
        tl.store(saved_ptr + at, argmax, mask=mask)
    if WANT_SAVED and MODE == "avg":
        # All tiles of channels write the same values.
        tl.store(saved_ptr + out_row, count, mask=mask_out)


@triton.jit(do_not_specialize=["n_in"])
def pool_bwd_kernel(
    grad_out_ptr,
    rows_ptr,
    order_ptr,
    argmax_ptr,
    feats_ptr,
    out_ptr,
    present_ptr,
    grad_feats_ptr,
    count_ptr,
    n_in,
    c,
    stride_feats_n,
    MODE: tl.constexpr,
    HAS_ARGMAX: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    V: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum the gradients that a tile of inputs gets from its outputs."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < real_rows(count_ptr, n_in)
    mask_in = offs_m < n_in
    mask_n = offs_n < c
    mask = mask_in[:, None] & mask_n[None, :]
    in_row = tl.load(order_ptr + offs_m, mask=mask_in, other=0) if HAS_ORDER else offs_m
    if MODE == "max" and not HAS_ARGMAX:
        own_ptr = feats_ptr + in_row.to(tl.int64)[:, None] * stride_feats_n + offs_n[None, :]
        own = tl.load(own_ptr, mask=mask, other=0.0)
    # [BLOCK_M, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    for v in range(V):
        tap_ptr = rows_ptr + tl.cast(v, tl.int64) * n_in
        row = tl.load(tap_ptr + offs_m, mask=mask_m, other=-1)
        takes = (row >= 0)[:, None] & mask_n[None, :]
        at = row.to(tl.int64)[:, None] * c + offs_n[None, :]
        if MODE == "max":
            if HAS_ARGMAX:
                winner = tl.load(argmax_ptr + at, mask=takes, other=-1)
                takes = takes & (winner == in_row[:, None])
            else:
                takes = takes & (tl.load(out_ptr + at, mask=takes, other=0.0) == own)
        grad = tl.load(grad_out_ptr + at, mask=takes, other=0.0).to(ACC_DTYPE)
        if MODE == "avg":
            present = tl.load(present_ptr + row, mask=row >= 0, other=1)
            grad = grad / present.to(ACC_DTYPE)[:, None]
        acc += grad
    at = in_row.to(tl.int64)[:, None] * c + offs_n[None, :]
    tl.store(grad_feats_ptr + at, acc.to(grad_feats_ptr.dtype.element_ty), mask=mask)


def pool_fwd(
    feats: Tensor,
    rows: Tensor,
    order: Tensor | None,
    mode: str,
    floor: float | None = None,
    want_saved: bool = False,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Pool a block of columns and channels in each program."""
    volume, n_out = rows.shape
    c = feats.shape[1]
    out = torch.empty(n_out, c, dtype=feats.dtype, device=feats.device)
    saved = None
    if want_saved and mode != "sum":
        shape = (n_out, c) if mode == "max" else (n_out,)
        saved = torch.empty(shape, dtype=torch.int32, device=feats.device)
    if n_out:
        feats = _with_dense_rows(feats)
        grid, blocks = _tiles(n_out, c)
        launch(
            pool_fwd_kernel, grid, feats.device,
            feats, rows.contiguous(), order, out, saved, count, n_out, c, feats.stride(0),
            MODE=mode, FLOOR=floor, HAS_ORDER=order is not None, WANT_SAVED=saved is not None,
            V=volume, ACC_DTYPE=_acc_dtype(feats), **blocks,
        )  # fmt: skip
    return out, saved


def pool_bwd(
    grad_out: Tensor,
    rows: Tensor,
    order: Tensor | None,
    mode: str,
    *,
    argmax: Tensor | None = None,
    feats: Tensor | None = None,
    out: Tensor | None = None,
    present: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Gather the gradient of a block of columns and channels in each program."""
    volume, n_in = rows.shape
    c = grad_out.shape[1]
    grad_feats = torch.empty(n_in, c, dtype=grad_out.dtype, device=grad_out.device)
    if n_in:
        feats = None if feats is None else _with_dense_rows(feats)
        grid, blocks = _tiles(n_in, c)
        launch(
            pool_bwd_kernel, grid, grad_out.device,
            grad_out.contiguous(), rows.contiguous(), order, argmax, feats, out, present,
            grad_feats, count, n_in, c, c if feats is None else feats.stride(0),
            MODE=mode, HAS_ARGMAX=argmax is not None, HAS_ORDER=order is not None,
            V=volume, ACC_DTYPE=_acc_dtype(grad_out), **blocks,
        )  # fmt: skip
    return grad_feats


def _with_dense_rows(feats: Tensor) -> Tensor:
    """Return ``feats`` with channels next to each other; rows may be apart."""
    return feats if feats.stride(1) == 1 else feats.contiguous()


def _acc_dtype(feats: Tensor) -> tl.dtype:
    """Return the type to accumulate in."""
    return tl.float64 if feats.dtype == torch.float64 else tl.float32


def _tiles(n: int, c: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid over ``n`` columns x ``c`` channels, and the tile."""
    block_n = min(next_power_of_2(max(c, 1)), _MAX_BLOCK_N)
    block_m = min(_TILE // block_n, 256)
    # The kernel must write the counts even if there are no channels.
    grid = (num_blocks(n, block_m), max(num_blocks(c, block_n), 1))
    return grid, {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4}
