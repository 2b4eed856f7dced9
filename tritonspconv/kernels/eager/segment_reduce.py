"""Sum, mean and maximum over segments of rows, in vectorised torch."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels import acc_dtype

_LAST_ROW = 2**31 - 1


def segment_reduce(
    values: Tensor,
    perm: Tensor | None,
    segment_start: Tensor,
    segment_end: Tensor,
    mode: str,
    want_argmax: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Reduce ``values[perm[segment_start[s]:segment_end[s]]]`` for every segment ``s``.

    Segments may lie in any order and leave positions out, but must not overlap.

    Args:
        values: Rows [P, C].
        perm: int64 [P], the row at every position; None where they agree.
        segment_start: int64 [S], first position.
        segment_end: int64 [S], one past the last position; at least ``segment_start``.
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        want_argmax: Return which row won. Only for ``"max"``.

    Returns:
        [S, C] in ``values.dtype``; an empty segment is 0. And the winning rows, int32 [S, C], or
        None: -1 in an empty segment. The lowest row wins a tie. NaN wins over numbers.

    Accumulates in float32 (float64 for float64 input).
    """
    n_segments, channels = segment_start.shape[0], values.shape[1]
    dtype = acc_dtype(values.dtype)
    length = segment_end - segment_start
    # One entry per (segment, position in it); segments that are cut short leave positions out.
    segment = torch.repeat_interleave(
        torch.arange(n_segments, device=values.device), length.to(values.device)
    )
    first = length.cumsum(0) - length
    position = torch.arange(segment.shape[0], device=values.device)
    position = position - first[segment] + segment_start[segment]
    row = position if perm is None else perm[position]
    taken = values[row].to(dtype)
    if mode != "max":
        out = torch.zeros(n_segments, channels, dtype=dtype, device=values.device)
        out.index_add_(0, segment, taken)
        if mode == "mean":
            out /= length.clamp(min=1)[:, None]
        return out.to(values.dtype), None
    index = segment[:, None].expand(-1, channels)
    out = torch.full((n_segments, channels), float("-inf"), dtype=dtype, device=values.device)
    out.scatter_reduce_(0, index, taken, "amax")
    wins = (taken == out[segment]) | taken.isnan()
    argmax = torch.full((n_segments, channels), _LAST_ROW, device=values.device)
    argmax.scatter_reduce_(0, index, torch.where(wins, row[:, None], _LAST_ROW), "amin")
    empty = (length == 0)[:, None]
    out = torch.where(empty, 0, out).to(values.dtype)
    if not want_argmax:
        return out, None
    return out, torch.where(empty, -1, argmax).to(torch.int32)
