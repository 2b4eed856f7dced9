"""Sum, mean and maximum over segments of rows (Triton).

A lane walks one segment, or every ``split``-th position of it, so neighbouring lanes read
neighbouring positions. The partial results of a split segment are a segment of the next launch,
until one lane is left. The split depends on sizes only, so the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.triton._blocks import next_power_of_2, num_blocks
from tritonspconv.kernels.triton._launch import launch

_LAST_ROW: tl.constexpr = tl.constexpr(2**31 - 1)
# Positions that a lane of a split segment walks; segments up to four times as long stay whole.
_LANE_LENGTH = 64
# Elements of one tile, and the most channels that it holds.
_TILE = 512
_MAX_BLOCK_N = 64


@triton.jit(do_not_specialize=["n_lanes", "split"])
def segment_reduce_kernel(
    values_ptr,
    ids_ptr,
    perm_ptr,
    start_ptr,
    end_ptr,
    length_ptr,
    out_ptr,
    argmax_ptr,
    n_lanes,
    split,
    c,
    stride_values_p,
    MODE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_PERM: tl.constexpr,
    IS_LAST: tl.constexpr,
    WANT_ARGMAX: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Reduce one tile of lanes x channels."""
    lane = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_s = lane < n_lanes
    mask_n = offs_n < c
    segment = lane // split
    position = tl.load(start_ptr + segment, mask=mask_s, other=0) + lane % split
    end = tl.load(end_ptr + segment, mask=mask_s, other=0)
    steps = tl.max((end - position + split - 1) // split, axis=0)
    # [BLOCK_S, BLOCK_N]
    acc = tl.full((BLOCK_S, BLOCK_N), float("-inf") if MODE == "max" else 0.0, ACC_DTYPE)
    argmax = tl.full((BLOCK_S, BLOCK_N), _LAST_ROW, tl.int32)
    for _ in range(steps):
        valid = position < end
        mask = valid[:, None] & mask_n[None, :]
        row = tl.load(perm_ptr + position, mask=valid, other=0) if HAS_PERM else position
        source = values_ptr + row[:, None] * stride_values_p + offs_n[None, :]
        value = tl.load(source, mask=mask, other=0.0).to(ACC_DTYPE)
        if MODE == "max":
            if HAS_IDS:
                ids = ids_ptr + row[:, None] * c + offs_n[None, :]
                own = tl.load(ids, mask=mask, other=_LAST_ROW)
            else:
                own = row.to(tl.int32)[:, None] + tl.zeros((1, BLOCK_N), tl.int32)
            # The lowest row wins a tie and NaN wins over numbers, so the order of lanes does not
            # matter.
            value_nan = value != value
            acc_nan = acc != acc
            better = (value > acc) | (value_nan & (acc_nan == 0))
            tie = (value == acc) | (value_nan & acc_nan)
            better = mask & (better | (tie & (own < argmax)))
            acc = tl.where(better, value, acc)
            argmax = tl.where(better, own, argmax)
        else:
            acc += value
        position += split
    if IS_LAST:
        if MODE == "max":
            acc = tl.where(argmax == _LAST_ROW, 0.0, acc)
            argmax = tl.where(argmax == _LAST_ROW, -1, argmax)
        elif MODE == "mean":
            length = tl.load(length_ptr + segment, mask=mask_s, other=1)
            acc = acc / tl.maximum(length, 1).to(ACC_DTYPE)[:, None]
    at = lane.to(tl.int64)[:, None] * c + offs_n[None, :]
    mask = mask_s[:, None] & mask_n[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if WANT_ARGMAX:
        tl.store(argmax_ptr + at, argmax, mask=mask)


def segment_reduce(
    values: Tensor,
    perm: Tensor | None,
    segment_start: Tensor,
    segment_end: Tensor,
    mode: str,
    want_argmax: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Walk a block of segments in each program.

    The function launches one kernel for mean segments of up to 256 positions, and one more for
    every further factor of 64. One lane walks a single long segment among many short ones.
    """
    n_segments, c = segment_start.shape[0], values.shape[1]
    dtype, acc_dtype = values.dtype, tl.float32
    partial_dtype = torch.float32
    if dtype == torch.float64:
        acc_dtype, partial_dtype = tl.float64, torch.float64
    values = values if values.stride(1) == 1 else values.contiguous()
    length = segment_end - segment_start if mode == "mean" else None
    start, end = segment_start.contiguous(), segment_end.contiguous()
    ids = None
    while True:
        split = _split(values.shape[0], n_segments)
        is_last = split == 1
        n_lanes = n_segments * split
        out_dtype = dtype if is_last else partial_dtype
        out = torch.empty(n_lanes, c, dtype=out_dtype, device=values.device)
        argmax = None
        if want_argmax or (mode == "max" and not is_last):
            argmax = torch.empty(n_lanes, c, dtype=torch.int32, device=values.device)
        if n_lanes and c:
            block_n = min(next_power_of_2(c), _MAX_BLOCK_N)
            block_s = min(_TILE // block_n, 128)
            launch(
                segment_reduce_kernel,
                (num_blocks(n_lanes, block_s), num_blocks(c, block_n)),
                values.device,
                values, ids, perm, start, end, length, out, argmax,
                n_lanes, split, c, values.stride(0),
                MODE=mode, HAS_IDS=ids is not None, HAS_PERM=perm is not None, IS_LAST=is_last,
                WANT_ARGMAX=argmax is not None, ACC_DTYPE=acc_dtype,
                BLOCK_S=block_s, BLOCK_N=block_n, num_warps=4,
            )  # fmt: skip
        if is_last:
            return out, argmax
        values, ids, perm = out, argmax, None
        start = torch.arange(n_segments, device=values.device) * split
        end = start + split


def _split(n_positions: int, n_segments: int) -> int:
    """Return into how many lanes to split each of ``n_segments``; 1: leave them whole."""
    mean_length = n_positions // max(n_segments, 1)
    return 1 if mean_length <= 4 * _LANE_LENGTH else mean_length // _LANE_LENGTH
