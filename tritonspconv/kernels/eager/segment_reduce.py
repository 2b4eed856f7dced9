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
    """Reduce the entries of all segments by index."""
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
