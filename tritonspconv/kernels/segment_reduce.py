"""Sum, mean and maximum over segments of rows."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspconv.kernels import has_triton

if TYPE_CHECKING:
    from jaxtyping import Float, Int32, Int64


def segment_reduce(
    values: Float[Tensor, "P c"],
    perm: Int64[Tensor, "P"] | None,
    segment_start: Int64[Tensor, "S"],
    segment_end: Int64[Tensor, "S"],
    mode: str,
    want_argmax: bool = False,
) -> tuple[Float[Tensor, "S c"], Int32[Tensor, "S c"] | None]:
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
        Two items. The first one is [S, C] in ``values.dtype``; an empty segment is 0. The second
        one holds the winning rows, int32 [S, C], with -1 in an empty segment; or it is None. The
        lowest row wins a tie. NaN wins over numbers.

    Accumulates in float32 (float64 for float64 input).
    """
    return _back_end(values.device).segment_reduce(
        values, perm, segment_start, segment_end, mode, want_argmax
    )


@functools.lru_cache(maxsize=1024)
def _back_end(device: torch.device):
    if has_triton(device):
        from tritonspconv.kernels.triton import segment_reduce as back_end
    else:
        from tritonspconv.kernels.eager import segment_reduce as back_end
    return back_end
