"""Weight gradient over pair lists: equal shares of each tap's pairs, an ordered sum (Triton)."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels import acc_dtype
from tritonspconv.kernels.triton._blocks import next_power_of_2, num_blocks
from tritonspconv.kernels.triton._dot_precision import dot_precision
from tritonspconv.kernels.triton._launch import BoundKernel, bind
from tritonspconv.kernels.triton.configs import (
    Card,
    GemmConfig,
    card_of,
    is_in_two_levels,
    weight_grad_config,
)
from tritonspconv.kernels.triton.half_parts import Operand, join_parts, leading_part
from tritonspconv.kernels.triton.tuned_tiles import problem, tuned_tile

# Programs in a wave: one for each multiprocessor of a large GPU.
_WAVE = 132
_MIN_SLICES = 64
# The most steps of a share for IEEE float32: the rounding error of a sum grows with the root of its
# steps. A share gets more steps where all partial sums would take more memory than this.
_MAX_STEPS = 256
_MAX_PARTIAL_BYTES = 2**26


@triton.jit
def _tap_shares(
    tap_ptr_ptr,
    slices,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MIRRORED: tl.constexpr,
):
    """Return for every tap where its pairs and its shares begin and end.

    A tap has one share for each ``ceil(P / slices)`` of its pairs. All taps together therefore have
    at most ``slices + V`` shares, for any distribution of the pairs.
    """
    offs_v = tl.arange(0, BLOCK_V)
    listed = tl.minimum(offs_v, V - 1 - offs_v) if MIRRORED else offs_v
    mask_v = offs_v < V
    begin = tl.load(tap_ptr_ptr + listed, mask=mask_v, other=0)
    end = tl.load(tap_ptr_ptr + listed + 1, mask=mask_v, other=0)
    count = end - begin
    size = tl.maximum((tl.sum(count, axis=0) + slices - 1) // slices, 1)
    shares = (count + size - 1) // size
    last = tl.cumsum(shares, axis=0)
    return offs_v, begin, end, last - shares, last


@triton.jit(do_not_specialize=["capacity", "slices"])
def weight_grad_kernel(
    feats_ptr,
    feats_low_ptr,
    feats_largest_ptr,
    grad_ptr,
    grad_low_ptr,
    grad_largest_ptr,
    pairs_ptr,
    tap_ptr_ptr,
    partial_ptr,
    capacity,
    slices,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MIRRORED: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IN_TWO_LEVELS: tl.constexpr,
):
    """``partial[share] = sum over the share's pairs of feats[in]^T grad[out]``, one tile of it.

    The shares of a tap take its steps in turn. Programs that run at the same time then read rows of
    one stretch of columns, for all taps, and find them in the cache.

    PARTS: float16 parts of each float32 operand, or 0 for operands as they are.
    IN_TWO_LEVELS: Each step is summed by itself and added in float32.
    """
    N_TILES: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    tile, share = tl.program_id(0), tl.program_id(1)
    offs_v, begin, end, first, last = _tap_shares(tap_ptr_ptr, slices, V, BLOCK_V, MIRRORED)
    mine = (first <= share) & (share < last)
    if tl.sum(mine.to(tl.int32), axis=0) > 0:
        v = tl.sum(tl.where(mine, offs_v, 0), axis=0)
        start = tl.sum(tl.where(mine, begin + (share - first) * BLOCK_K, 0), axis=0)
        stop = tl.sum(tl.where(mine, end, 0), axis=0)
        stride = tl.sum(tl.where(mine, last - first, 0), axis=0).to(tl.int32) * BLOCK_K
        # A mirrored map lists half of its taps. The others have the same pairs with sides swapped.
        swap = MIRRORED and v > V - 1 - v
        in_ptr = pairs_ptr + tl.where(swap, capacity, 0)
        out_ptr = pairs_ptr + tl.where(swap, 0, capacity)
        offs_m = (tile // N_TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = (tile % N_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m = offs_m < C_IN
        mask_n = offs_n < C_OUT
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_TYPE)
        # Matrix units truncate the sum that they add to. In two levels, each step starts from zero
        # and is added in float32. The compiler must not know this zero, or it merges the sums.
        zeros = acc + tl.minimum(capacity, 0).to(ACC_TYPE)
        acc_low = acc
        for at in range(start, stop, stride):
            offs_p = at + tl.arange(0, BLOCK_K)
            mask_p = offs_p < stop
            row_in = tl.load(in_ptr + offs_p, mask=mask_p, other=0)
            row_out = tl.load(out_ptr + offs_p, mask=mask_p, other=0)
            # [BLOCK_K, BLOCK_M]
            x_offs = row_in.to(tl.int64)[:, None] * C_IN + offs_m[None, :]
            x_mask = mask_p[:, None] & mask_m[None, :]
            x = tl.load(feats_ptr + x_offs, mask=x_mask, other=0.0)
            # [BLOCK_K, BLOCK_N]
            g_offs = row_out.to(tl.int64)[:, None] * C_OUT + offs_n[None, :]
            g_mask = mask_p[:, None] & mask_n[None, :]
            g = tl.load(grad_ptr + g_offs, mask=g_mask, other=0.0)
            if PARTS == 2:
                x_low = tl.load(feats_low_ptr + x_offs, mask=x_mask, other=0.0)
                g_low = tl.load(grad_low_ptr + g_offs, mask=g_mask, other=0.0)
                acc_low = tl.dot(tl.trans(x_low), g, acc_low)
                acc_low = tl.dot(tl.trans(x), g_low, acc_low)
            if IN_TWO_LEVELS:
                acc += tl.dot(tl.trans(x), g, zeros, input_precision=PRECISION, out_dtype=ACC_TYPE)
            else:
                acc = tl.dot(tl.trans(x), g, acc, input_precision=PRECISION, out_dtype=ACC_TYPE)
        if PARTS > 0:
            acc = join_parts(acc, acc_low, feats_largest_ptr, grad_largest_ptr, PARTS)
        partial = partial_ptr + share.to(tl.int64) * (C_IN * C_OUT)
        tl.store(
            partial + offs_m[:, None] * C_OUT + offs_n[None, :],
            acc,
            mask=mask_m[:, None] & mask_n[None, :],
        )


@triton.jit(do_not_specialize=["slices"])
def sum_shares_kernel(
    partial_ptr,
    tap_ptr_ptr,
    out_ptr,
    slices,
    STRIDE_V: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MIRRORED: tl.constexpr,
    ACC_TYPE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out[v]`` = sum of the partial matrices of tap v: LANES of them side by side, in order."""
    v = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < C_IN * C_OUT
    offs_v, _, _, first, last = _tap_shares(tap_ptr_ptr, slices, V, BLOCK_V, MIRRORED)
    first_share = tl.sum(tl.where(offs_v == v, first, 0), axis=0)
    last_share = tl.sum(tl.where(offs_v == v, last, 0), axis=0)
    # [LANES, BLOCK]: a sum of one matrix after another would wait for every load.
    lanes = tl.zeros((LANES, BLOCK), dtype=ACC_TYPE)
    for at in range(first_share, last_share, LANES):
        share = at + tl.arange(0, LANES)
        partial = partial_ptr + share.to(tl.int64)[:, None] * (C_IN * C_OUT) + offs[None, :]
        lanes += tl.load(partial, mask=(share < last_share)[:, None] & mask[None, :], other=0.0)
    acc = tl.sum(lanes, axis=0)
    row, column = offs // C_OUT, offs % C_OUT
    out = out_ptr + v.to(tl.int64) * STRIDE_V + row * STRIDE_K + column * STRIDE_N
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def weight_grad(
    feats: Operand,
    grad: Operand,
    pairs: Tensor,
    tap_ptr: Tensor,
    out: Tensor,
    *,
    mirrored: bool,
    precision: str = "ieee",
    config: GemmConfig | None = None,
) -> Tensor:
    """Sum each share of the pairs in a program, then the shares; ``config`` chooses the tile."""
    parts, feats, feats_low, feats_largest = leading_part(feats)
    _, grad, grad_low, grad_largest = leading_part(grad)
    volume, c_in, c_out = out.shape
    if pairs.shape[1] == 0 or c_in == 0 or c_out == 0:
        return out.zero_()
    device, capacity = feats.device, pairs.shape[1]
    multiply, grid, add, grid_add, slices, sums = _bind(
        device, card_of(device), feats.dtype, parts, precision,
        volume, c_in, c_out, out.stride(), mirrored, capacity.bit_length(),
        _WAVE, _MIN_SLICES, config,
    )  # fmt: skip
    partial = torch.empty(grid[1], c_in, c_out, dtype=sums, device=device)
    multiply(
        grid, device,
        feats, feats_low, feats_largest, grad, grad_low, grad_largest,
        pairs, tap_ptr, partial, capacity, slices,
    )  # fmt: skip
    add(grid_add, device, partial, tap_ptr, out, slices)
    return out


@functools.lru_cache(maxsize=4096)
def _bind(
    device: torch.device,
    card: Card,
    dtype: torch.dtype,
    parts: int,
    precision: str,
    volume: int,
    c_in: int,
    c_out: int,
    strides: tuple[int, int, int],
    mirrored: bool,
    log2_pairs: int,
    wave: int,
    min_slices: int,
    config: GemmConfig | None,
) -> tuple[BoundKernel, tuple[int, int], BoundKernel, tuple[int, int], int, torch.dtype]:
    """Return both kernels for such operands with their grids; slices, and dtype of sums."""
    sums = acc_dtype(dtype)
    cfg = (
        config
        or tuned_tile(problem("weight_grad", dtype, parts, c_in, c_out), log2_pairs, card)
        or weight_grad_config(card, c_in, c_out, dtype, parts)
    )
    tiles = num_blocks(c_in, cfg.block_m) * num_blocks(c_out, cfg.block_n)
    # All shares together fill whole waves. A multiprocessor runs four programs of up to 32 x 32
    # entries at a time, and two of up to 128 x 128.
    waves = 3 if tiles > 1 else 4 if cfg.block_m * cfg.block_n <= 2**10 else 2
    slices = max(waves * wave // tiles - volume, min_slices)
    is_exact = precision == "ieee" and (parts > 0 or dtype == torch.float32)
    if is_exact:
        # A list is about half full, and a mirrored list describes twice as many pairs as it holds.
        wanted = (1 << log2_pairs) // (cfg.block_k * _MAX_STEPS)
        slices = max(slices, min(wanted, _MAX_PARTIAL_BYTES // (c_in * c_out * sums.itemsize)))
    shared = {
        "C_IN": c_in, "C_OUT": c_out, "V": volume, "BLOCK_V": next_power_of_2(volume),
        "MIRRORED": mirrored,
        "ACC_TYPE": tl.float64 if sums == torch.float64 else tl.float32,
    }  # fmt: skip
    multiply = bind(
        weight_grad_kernel, **shared,
        PARTS=parts, PRECISION=dot_precision(precision, device.type, dtype, card),
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
        IN_TWO_LEVELS=is_exact or is_in_two_levels(cfg),
        num_warps=cfg.num_warps, num_stages=cfg.num_stages,
    )  # fmt: skip
    block = min(next_power_of_2(c_in * c_out), 256)
    add = bind(
        sum_shares_kernel, **shared,
        STRIDE_V=strides[0], STRIDE_K=strides[1], STRIDE_N=strides[2],
        # About twice the shares of a tap: the centre has more shares than other taps.
        LANES=32 if slices > 16 * volume else 16, BLOCK=block,
    )  # fmt: skip
    grid_add = volume, num_blocks(c_in * c_out, block)
    return multiply, (tiles, slices + volume), add, grid_add, slices, sums
