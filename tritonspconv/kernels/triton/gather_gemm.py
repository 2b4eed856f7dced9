"""Masked implicit GEMM over a neighbour table: forward and input gradient (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.triton import configs
from tritonspconv.kernels.triton._blocks import num_blocks
from tritonspconv.kernels.triton._launch import launch
from tritonspconv.kernels.triton.configs import GemmConfig, gather_gemm_config


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def popcount32(x):
    """Count the set bits of an int32 in portable integer arithmetic."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0x3F


@triton.jit(do_not_specialize=["n_out"])
def gather_gemm_kernel(
    feats_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows_ptr,
    mask_ptr,
    order_ptr,
    n_out,
    stride_w_v,
    stride_w_k,
    stride_w_n,
    V: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    MIRRORED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out[order[m]] = bias + sum_v feats[rows[v, m]] @ weight[v]`` for BLOCK_M columns m."""
    N_TILES: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    CHUNKS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    pid_m = tl.program_id(0) // N_TILES
    pid_n = tl.program_id(0) % N_TILES
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < n_out
    mask_n = offs_n < C_OUT
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_TYPE)
    for word in tl.static_range((V + 31) // 32):
        masks = tl.load(mask_ptr + word * n_out.to(tl.int64) + offs_m, mask=mask_m, other=0)
        taps = tl.reduce(masks, 0, _or)
        for step in range(popcount32(taps) * CHUNKS):
            chunk = step % CHUNKS
            v = word * 32 + popcount32((taps & -taps) - 1)
            # The index is loaded in the loop so that the pipeliner can run the gather ahead.
            row = tl.load(rows_ptr + v.to(tl.int64) * n_out + offs_m, mask=mask_m, other=-1)
            channel = chunk * BLOCK_K + offs_k
            # [BLOCK_M, BLOCK_K]
            a_mask = (row >= 0)[:, None]
            w_mask = mask_n[None, :]
            if C_IN % BLOCK_K != 0:
                a_mask = a_mask & (channel < C_IN)[None, :]
                w_mask = w_mask & (channel < C_IN)[:, None]
            a = tl.load(
                feats_ptr + row.to(tl.int64)[:, None] * C_IN + channel[None, :],
                mask=a_mask,
                other=0.0,
            )
            tap = V - 1 - v if MIRRORED else v
            # [BLOCK_K, BLOCK_N]
            w = tl.load(
                weight_ptr
                + tap.to(tl.int64) * stride_w_v
                + channel[:, None] * stride_w_k
                + offs_n[None, :] * stride_w_n,
                mask=w_mask,
                other=0.0,
            )
            acc = tl.dot(a, w, acc, input_precision=PRECISION, out_dtype=ACC_TYPE)
            taps = tl.where(chunk == CHUNKS - 1, taps & (taps - 1), taps)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC_TYPE)[None, :]
    out_row = tl.load(order_ptr + offs_m, mask=mask_m, other=0) if HAS_ORDER else offs_m
    tl.store(
        out_ptr + out_row.to(tl.int64)[:, None] * C_OUT + offs_n[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )


def dot_precision(precision: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return Triton's ``input_precision`` for ``precision`` on this device.

    NVIDIA has no fast IEEE float32 product; the sum of three tf32 products keeps its accuracy.
    AMD and the interpreter multiply float32 exactly.
    """
    if dtype != torch.float32 or configs.on_amd():
        return "ieee"
    if precision == "ieee" and device.type == "cuda":
        return "tf32x3"
    return precision


def gather_gemm(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    mask: Tensor,
    order: Tensor | None,
    *,
    mirrored: bool,
    precision: str = "ieee",
    config: GemmConfig | None = None,
) -> Tensor:
    """Multiply gathered rows with the taps' matrices and sum over taps.

    Args:
        feats: [n_in, c_in], contiguous rows.
        weight: [V, c_in, c_out], any strides, same dtype.
        bias: [c_out] or None.
        rows: int32 [V, n_out], row of ``feats`` or -1.
        mask: int32 [ceil(V/32), n_out], which taps are present.
        order: int32 [n_out] output row of each column, or None.
        mirrored: Table tap v multiplies ``weight[V-1-v]``.
        precision: ``"ieee"`` or ``"tf32"`` products for float32.
        config: Tile to use; None: the fixed choice for these sizes.

    Returns:
        [n_out, c_out] in the dtype of ``feats``; sums in float32 (float64 for float64).
    """
    volume, c_in, c_out = weight.shape
    n_out = rows.shape[1]
    out = torch.empty(n_out, c_out, dtype=feats.dtype, device=feats.device)
    if n_out == 0 or c_out == 0:
        return out
    if feats.dtype == torch.float32 and weight.stride(1) != 1:
        # wgmma takes 32-bit operands with the summed axis contiguous only.
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    cfg = config or gather_gemm_config(n_out, c_in, c_out, feats.dtype)
    grid = (num_blocks(n_out, cfg.block_m) * num_blocks(c_out, cfg.block_n),)
    launch(
            gather_gemm_kernel, grid, feats.device,
        feats, weight, bias, out, rows, mask, order,
        n_out, weight.stride(0), weight.stride(1), weight.stride(2),
        V=volume, C_IN=c_in, C_OUT=c_out,
        HAS_BIAS=bias is not None, HAS_ORDER=order is not None, MIRRORED=mirrored,
        PRECISION=dot_precision(precision, feats.device, feats.dtype),
        ACC_TYPE=tl.float64 if feats.dtype == torch.float64 else tl.float32,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
        num_warps=cfg.num_warps, num_stages=cfg.num_stages,
    )  # fmt: skip
    return out
