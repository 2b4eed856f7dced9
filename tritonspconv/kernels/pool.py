"""Pooling over a neighbour table, and its gradient."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspconv.kernels import has_numba, has_triton

if TYPE_CHECKING:
    from jaxtyping import Float, Int32, Int64


def pool_fwd(
    feats: Float[Tensor, "n_in c"],
    rows: Int32[Tensor, "V n_out"],
    order: Int32[Tensor, "n_out"] | None,
    mode: str,
    floor: float | None = None,
    want_saved: bool = False,
    count: Int64[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, "n_out c"], Int32[Tensor, "n_out ..."] | None]:
    """Pool the input rows that a neighbour table names for every output row.

    Args:
        feats: Input rows [n_in, C].
        rows: int32 [V, n_out], input row or -1.
        order: int32 [n_out], column ``c`` is output row ``order[c]``; None where they agree.
        mode: ``"max"``, ``"avg"`` (over the present inputs) or ``"sum"``.
        floor: Lower bound of a maximum; None for a true maximum.
        want_saved: Also return the winners or the counts for the backward pass.
        count: int64 [], number of real columns; None: all. The output rows of others are zero.

    Returns:
        Output rows [n_out, C] in ``feats.dtype``; a row without inputs is ``floor``, else 0. The
        second item is None unless it is wanted. Maximum: the winning input rows, int32 [n_out, C];
        -1 where all inputs lie below ``floor`` or there are none; the lowest tap wins a tie; NaN
        wins over numbers. Average: the number of inputs, int32 [n_out].

    Accumulates in float32 (float64 for float64 input), in tap order.
    """
    return _back_end(feats.device).pool_fwd(feats, rows, order, mode, floor, want_saved, count)


def pool_bwd(
    grad_out: Float[Tensor, "n_out c"],
    rows: Int32[Tensor, "V n_in"],
    order: Int32[Tensor, "n_in"] | None,
    mode: str,
    *,
    argmax: Int32[Tensor, "n_out c"] | None = None,
    feats: Float[Tensor, "n_in c"] | None = None,
    out: Float[Tensor, "n_out c"] | None = None,
    present: Int32[Tensor, "n_out"] | None = None,
    count: Int64[Tensor, ""] | None = None,
) -> Float[Tensor, "n_in c"]:
    """Gather the gradient of every input row from the outputs that it fed.

    Args:
        grad_out: Gradient of the output rows [n_out, C].
        rows: int32 [V, n_in], the table seen from the inputs: output row or -1. The order of the
            taps does not matter.
        order: int32 [n_in], column ``c`` is input row ``order[c]``; None where they agree.
        mode: ``"max"``, ``"avg"`` or ``"sum"``.
        argmax: Winning input rows for ``"max"``, int32 [n_out, C]. The gradient goes to these rows.
        feats: Input rows [n_in, C] for ``"max"`` without ``argmax``. The gradient goes to every
            input that equals its output.
        out: Output rows [n_out, C]; needed with ``feats``.
        present: Number of inputs of each output row for ``"avg"``, int32 [n_out].
        count: int64 [], number of real columns; None: all.

    Returns:
        Gradient of the input rows [n_in, C] in ``grad_out.dtype``.
    """
    return _back_end(grad_out.device).pool_bwd(
        grad_out, rows, order, mode, argmax=argmax, feats=feats, out=out, present=present,
        count=count,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _back_end(device: torch.device):
    if has_triton(device):
        from tritonspconv.kernels.triton import pool as back_end
    elif has_numba(device):
        from tritonspconv.kernels.numba import pool as back_end
    else:
        from tritonspconv.kernels.eager import pool as back_end
    return back_end
