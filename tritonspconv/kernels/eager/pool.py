"""Max, average and sum over the present taps of a neighbour table, in vectorised torch."""

from __future__ import annotations

import torch
from torch import Tensor


def pool_fwd(
    feats: Tensor,
    rows: Tensor,
    order: Tensor | None,
    mode: str,
    floor: float | None = None,
    want_saved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Pool the input rows that a neighbour table names for every output row.

    Args:
        feats: Input rows [n_in, C].
        rows: int32 [V, n_out], input row or -1.
        order: int32 [n_out], column ``c`` is output row ``order[c]``; None where they agree.
        mode: ``"max"``, ``"avg"`` (over the present inputs) or ``"sum"``.
        floor: Lower bound of a maximum; None for a true maximum.
        want_saved: Return what the backward pass needs.

    Returns:
        Output rows [n_out, C] in ``feats.dtype``; a row without inputs is ``floor``, else 0. The
        second item is None unless it is wanted. Maximum: the winning input rows, int32 [n_out, C];
        -1 where all inputs lie below ``floor`` or there are none; the lowest tap wins a tie; NaN
        wins over numbers. Average: the number of inputs, int32 [n_out].

    Accumulates in float32 (float64 for float64 input), in tap order.
    """
    n_out, channels = rows.shape[1], feats.shape[1]
    acc_dtype = torch.float64 if feats.dtype == torch.float64 else torch.float32
    start = 0.0 if mode != "max" else float("-inf") if floor is None else floor
    acc = torch.full((n_out, channels), start, dtype=acc_dtype, device=feats.device)
    argmax = torch.full((n_out, channels), -1, dtype=torch.int32, device=feats.device)
    for row in rows if feats.shape[0] else ():
        present = (row >= 0)[:, None]
        value = feats[row.clamp(min=0).long()].to(acc_dtype)
        if mode == "max":
            better = (value > acc) | ((value == acc) & (argmax < 0)) | value.isnan()
            better &= present
            acc = torch.where(better, value, acc)
            argmax = torch.where(better, row[:, None], argmax)
        else:
            acc += torch.where(present, value, 0)
    saved = argmax if mode == "max" else None
    if mode == "max" and floor is None:
        acc = torch.where(argmax < 0, 0, acc)
    elif mode == "avg":
        saved = (rows >= 0).sum(0, dtype=torch.int32)
        acc /= saved.clamp(min=1)[:, None]
    out = _by_row(acc.to(feats.dtype), order)
    return out, _by_row(saved, order) if want_saved and saved is not None else None


def pool_bwd(
    grad_out: Tensor,
    rows: Tensor,
    order: Tensor | None,
    mode: str,
    *,
    argmax: Tensor | None = None,
    feats: Tensor | None = None,
    out: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Gather the gradient of every input row from the outputs that it fed.

    Args:
        grad_out: Gradient of the output rows [n_out, C].
        rows: int32 [V, n_in], the table seen from the inputs: output row or -1. The order of the
            taps does not matter.
        order: int32 [n_in], column ``c`` is input row ``order[c]``; None where they agree.
        mode: ``"max"``, ``"avg"`` or ``"sum"``.
        argmax: For ``"max"``: int32 [n_out, C]; the gradient goes to that row.
        feats: For ``"max"`` without ``argmax``: the input rows [n_in, C]; the gradient goes to
            every input that equals its output.
        out: With ``feats``: the output rows [n_out, C].
        count: For ``"avg"``: int32 [n_out], inputs of every output row.

    Returns:
        Gradient of the input rows [n_in, C] in ``grad_out.dtype``.
    """
    n_in, channels = rows.shape[1], grad_out.shape[1]
    acc_dtype = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    acc = torch.zeros(n_in, channels, dtype=acc_dtype, device=grad_out.device)
    if grad_out.shape[0]:
        me = torch.arange(n_in, device=rows.device) if order is None else order.long()
        for row in rows:
            source = row.clamp(min=0).long()
            grad = grad_out[source].to(acc_dtype)
            takes = (row >= 0)[:, None]
            if mode == "avg":
                assert count is not None
                grad = grad / count[source][:, None]
            elif mode == "max" and argmax is not None:
                takes = takes & (argmax[source] == me[:, None])
            elif mode == "max":
                assert feats is not None
                assert out is not None
                takes = takes & (out[source] == feats[me])
            acc += torch.where(takes, grad, 0)
    return _by_row(acc.to(grad_out.dtype), order)


def _by_row(columns: Tensor, order: Tensor | None) -> Tensor:
    """Return what is given by table column, by row."""
    if order is None:
        return columns
    by_row = torch.empty_like(columns)
    by_row[order.long()] = columns
    return by_row
