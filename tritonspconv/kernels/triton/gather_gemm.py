"""Masked implicit GEMM over a neighbour table: forward and input gradient (Triton)."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.channel_norm import ChannelNorm
from tritonspconv.kernels.triton._bits import bitwise_or, popcount_signed
from tritonspconv.kernels.triton._blocks import num_blocks
from tritonspconv.kernels.triton._bounds import real_rows
from tritonspconv.kernels.triton._dot_precision import dot_precision
from tritonspconv.kernels.triton._launch import BoundKernel, bind
from tritonspconv.kernels.triton.configs import (
    Card,
    GemmConfig,
    card_of,
    gather_gemm_config,
)
from tritonspconv.kernels.triton.half_parts import Operand, as_operand, join_parts, leading_part
from tritonspconv.kernels.triton.tuned_tiles import problem, tuned_tile


@triton.jit(do_not_specialize=["n_out"])
def gather_gemm_kernel(
    feats_ptr,
    feats_low_ptr,
    feats_largest_ptr,
    weight_ptr,
    weight_low_ptr,
    weight_largest_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    residual_ptr,
    out_ptr,
    rows_ptr,
    mask_ptr,
    order_ptr,
    count_ptr,
    n_out,
    STRIDE_W_V: tl.constexpr,
    STRIDE_W_K: tl.constexpr,
    STRIDE_W_N: tl.constexpr,
    V: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    EPS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    MIRRORED: tl.constexpr,
    ONE_ROW: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out[order[m]] = bias + sum_v feats[rows[v, m]] @ weight[v]`` for BLOCK_M columns m.

    Then normalise the sum, add the residual and clamp, as the flags say.

    ONE_ROW: A column has one entry at most. All entries stand in one row, and the masks say through
    which tap. PARTS: float16 parts of each float32 operand, or 0. WIDE: Operands or table have
    2**31 entries or more; 32-bit offsets save a tenth of the time at 256 channels. Columns behind
    the count are padding: their output rows are zero.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    N_TILES: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    CHUNKS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    pid_m = tl.program_id(0) // N_TILES
    if HAS_ORDER and BLOCK_N < 256:
        # The last columns have the most taps. Start them first, so that no program ends late.
        pid_m = tl.num_programs(0) // N_TILES - 1 - pid_m
    pid_n = tl.program_id(0) % N_TILES
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < real_rows(count_ptr, n_out)
    mask_n = offs_n < C_OUT
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_TYPE)
    if PARTS == 2:
        # Matrix units truncate the sum that they add to. For this reason each step of the leading
        # product starts from zero and is added in float32. The compiler must not know this zero, or
        # it merges the sums.
        zeros = acc + tl.minimum(n_out, 0).to(ACC_TYPE)
    acc_low = acc
    for word in tl.static_range((V + 31) // 32):
        masks = tl.load(mask_ptr + word * n_out.to(tl.int64) + offs_m, mask=mask_m, other=0)
        taps = tl.reduce(masks, 0, bitwise_or)
        for step in range(popcount_signed(taps) * CHUNKS):
            chunk = step % CHUNKS
            v = word * 32 + popcount_signed((taps & -taps) - 1)
            if ONE_ROW:
                row = tl.load(rows_ptr + offs_m, mask=((masks >> (v % 32)) & 1) != 0, other=-1)
            else:
                # Load in the loop, so that the pipeliner can run the gather ahead.
                row = tl.load(rows_ptr + v.to(OFFSET) * n_out + offs_m, mask=mask_m, other=-1)
            channel = chunk * BLOCK_K + offs_k
            # [BLOCK_M, BLOCK_K]
            a_mask = (row >= 0)[:, None]
            w_mask = mask_n[None, :]
            if C_IN % BLOCK_K != 0:
                a_mask = a_mask & (channel < C_IN)[None, :]
                w_mask = w_mask & (channel < C_IN)[:, None]
            a_offs = row.to(OFFSET)[:, None] * C_IN + channel[None, :]
            a = tl.load(feats_ptr + a_offs, mask=a_mask, other=0.0)
            tap = V - 1 - v if MIRRORED else v
            # [BLOCK_K, BLOCK_N]
            w_offs = (
                tap.to(OFFSET) * STRIDE_W_V
                + channel[:, None] * STRIDE_W_K
                + offs_n[None, :] * STRIDE_W_N
            )
            w = tl.load(weight_ptr + w_offs, mask=w_mask, other=0.0)
            if PARTS == 2:
                a_low = tl.load(feats_low_ptr + a_offs, mask=a_mask, other=0.0)
                w_low = tl.load(weight_low_ptr + w_offs, mask=w_mask, other=0.0)
                acc_low = tl.dot(a_low, w, acc_low)
                acc_low = tl.dot(a, w_low, acc_low)
                acc += tl.dot(a, w, zeros)
            else:
                acc = tl.dot(a, w, acc, input_precision=PRECISION, out_dtype=ACC_TYPE)
            taps = tl.where(chunk == CHUNKS - 1, taps & (taps - 1), taps)
    if PARTS > 0:
        acc = join_parts(acc, acc_low, feats_largest_ptr, weight_largest_ptr, PARTS)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC_TYPE)[None, :]
    if HAS_NORM:
        acc -= tl.load(mean_ptr + offs_n, mask=mask_n, other=0.0).to(ACC_TYPE)[None, :]
        # [BLOCK_N]
        variance = tl.load(variance_ptr + offs_n, mask=mask_n, other=1.0).to(ACC_TYPE)
        scale = tl.rsqrt(variance + EPS)
        if HAS_NORM_WEIGHT:
            scale *= tl.load(norm_weight_ptr + offs_n, mask=mask_n, other=0.0).to(ACC_TYPE)
        acc *= scale[None, :]
    if HAS_NORM_BIAS:
        acc += tl.load(norm_bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC_TYPE)[None, :]
    mask_out = mask_m if count_ptr is None else offs_m < n_out
    out_row = tl.load(order_ptr + offs_m, mask=mask_out, other=0) if HAS_ORDER else offs_m
    out_offs = out_row.to(tl.int64)[:, None] * C_OUT + offs_n[None, :]
    out_mask = mask_out[:, None] & mask_n[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + out_offs, mask=out_mask, other=0.0).to(ACC_TYPE)
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)
    if count_ptr is not None:
        acc = tl.where(mask_m[:, None], acc, 0.0)
    tl.store(out_ptr + out_offs, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


_NO_NORM = (None,) * 4


def gather_gemm(
    feats: Operand,
    weight: Operand,
    bias: Tensor | None,
    rows: Tensor,
    mask: Tensor | None,
    order: Tensor | None,
    *,
    mirrored: bool,
    precision: str = "ieee",
    norm: ChannelNorm | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    panels: object = None,
    count: Tensor | None = None,
    in_count: Tensor | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """Multiply a tile of columns and channels in each program; ``config`` chooses the tile."""
    n_out = rows.shape[1]
    if isinstance(feats, Tensor) and isinstance(weight, Tensor) and feats.dtype == torch.float32:
        work = max(feats.shape[0], n_out) * weight.shape[1] * weight.shape[2]
        feats = as_operand(feats, work, precision, in_count)
        weight = as_operand(weight, work, precision)
    parts, feats, feats_low, feats_largest = leading_part(feats)
    _, weight, weight_low, weight_largest = leading_part(weight)
    volume, c_in, c_out = weight.shape
    dtype = torch.float32 if parts else feats.dtype
    out = torch.empty(n_out, c_out, dtype=dtype, device=feats.device)
    if n_out == 0 or c_out == 0:
        return out
    if feats.dtype == torch.float32 and weight.stride(1) != 1:
        # wgmma takes 32-bit operands only if the summed axis is contiguous.
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    bias = None if bias is None else bias.contiguous()
    norm = None if norm is None else norm.each(Tensor.contiguous)
    run, block_m, tiles_n = _bind(
        feats.device.type,
        card_of(feats.device),
        feats.dtype,
        parts,
        precision,
        volume,
        c_in,
        c_out,
        weight.stride(),
        n_out.bit_length(),
        bias is not None,
        None if norm is None else (norm.weight is not None, norm.bias is not None, norm.eps),
        residual is not None,
        relu,
        order is not None,
        mirrored,
        rows.shape[0] < volume,
        max(feats.numel(), weight.numel(), rows.numel()) >= 2**31,
        config,
    )
    run(
        (num_blocks(n_out, block_m) * tiles_n,), feats.device,
        feats, feats_low, feats_largest, weight, weight_low, weight_largest,
        bias, *_NO_NORM if norm is None else norm[:4], residual, out, rows, mask, order, count,
        n_out,
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=4096)
def _bind(
    device_type: str,
    card: Card,
    dtype: torch.dtype,
    parts: int,
    precision: str,
    volume: int,
    c_in: int,
    c_out: int,
    strides: tuple[int, int, int],
    log2_rows: int,
    has_bias: bool,
    norm: tuple[bool, bool, float] | None,
    has_residual: bool,
    relu: bool,
    has_order: bool,
    mirrored: bool,
    one_row: bool,
    wide: bool,
    config: GemmConfig | None,
) -> tuple[BoundKernel, int, int]:
    """Return the kernel for these operands, the rows of its tiles, and its tiles per row."""
    cfg = (
        config
        or tuned_tile(problem("gather_gemm", dtype, parts, c_in, c_out), log2_rows, card)
        or gather_gemm_config(card, log2_rows, c_in, c_out, dtype, parts, one_row)
    )
    # The epsilon is a constant of the kernel: a network has one, and a run-time argument would be
    # rounded to float32.
    has_norm_weight, has_norm_bias, eps = norm or (False, False, 0.0)
    kernel = bind(
        gather_gemm_kernel,
        STRIDE_W_V=strides[0], STRIDE_W_K=strides[1], STRIDE_W_N=strides[2],
        V=volume, C_IN=c_in, C_OUT=c_out,
        HAS_BIAS=has_bias, HAS_NORM=norm is not None, HAS_NORM_WEIGHT=has_norm_weight,
        HAS_NORM_BIAS=has_norm_bias, EPS=eps,
        HAS_RESIDUAL=has_residual, RELU=relu, HAS_ORDER=has_order,
        MIRRORED=mirrored, ONE_ROW=one_row, PARTS=parts, WIDE=wide,
        PRECISION=dot_precision(precision, device_type, dtype, card),
        ACC_TYPE=tl.float64 if dtype == torch.float64 else tl.float32,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
        num_warps=cfg.num_warps, num_stages=cfg.num_stages,
    )  # fmt: skip
    return kernel, cfg.block_m, num_blocks(c_out, cfg.block_n)
