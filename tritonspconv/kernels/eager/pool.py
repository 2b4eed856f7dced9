"""Max, average and sum over the present taps of a neighbour table, in vectorised torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tritonspconv.kernels import acc_dtype
from tritonspconv.kernels.eager.gather_gemm import clear_padding


def pool_fwd(
    feats: Tensor,
    rows: Tensor,
    order: Tensor | None,
    mode: str,
    floor: float | None = None,
    want_saved: bool = False,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Pool tap by tap over the columns that are present."""
    n_out, channels = rows.shape[1], feats.shape[1]
    start = 0.0 if mode != "max" else float("-inf") if floor is None else floor
    acc = torch.full((n_out, channels), start, dtype=acc_dtype(feats.dtype), device=feats.device)
    saved = None
    if mode == "max":
        saved = _max_into(acc, feats, rows, want_saved)
        if floor is None:
            acc.masked_fill_((rows < 0).all(0)[:, None], 0)
    else:
        for columns, present in _present(rows):
            acc.index_add_(0, columns, feats.index_select(0, present).to(acc.dtype))
    if mode == "avg":
        saved = (rows >= 0).sum(0, dtype=torch.int32)
        acc /= saved.clamp(min=1)[:, None]
    if count is not None:
        clear_padding(acc, count)
    out = _by_row(acc.to(feats.dtype), order)
    return out, _by_row(saved, order) if want_saved and saved is not None else None


def _max_into(acc: Tensor, feats: Tensor, rows: Tensor, want_saved: bool) -> Tensor | None:
    """Set ``acc`` to the maximum of itself and the inputs; return the winning rows if wanted."""
    argmax = None
    if want_saved:
        argmax = torch.full(acc.shape, -1, dtype=torch.int32, device=acc.device)
    for columns, present in _present(rows):
        value = feats.index_select(0, present).to(acc.dtype)
        best = acc.index_select(0, columns)
        if argmax is not None:
            winner = argmax.index_select(0, columns)
            better = (value > best) | ((value == best) & (winner < 0)) | value.isnan()
            argmax.index_copy_(0, columns, torch.where(better, present[:, None], winner))
        acc.index_copy_(0, columns, torch.maximum(best, value))
    return argmax


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
    """Add the gradient tap by tap over the columns that are present."""
    n_in, channels = rows.shape[1], grad_out.shape[1]
    acc = torch.zeros(n_in, channels, dtype=acc_dtype(grad_out.dtype), device=grad_out.device)
    me = torch.arange(n_in, device=rows.device) if order is None else order.long()
    for columns, source in _present(rows):
        grad = grad_out.index_select(0, source).to(acc.dtype)
        if mode == "avg":
            assert present is not None
            grad = grad / present.index_select(0, source)[:, None]
        elif mode == "max":
            own = me.index_select(0, columns)
            if argmax is not None:
                takes = argmax.index_select(0, source) == own[:, None]
            else:
                assert feats is not None
                assert out is not None
                takes = out.index_select(0, source) == feats.index_select(0, own)
            grad = torch.where(takes, grad, 0)
        acc.index_add_(0, columns, grad)
    return _by_row(acc.to(grad_out.dtype), order)


def _present(rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, tap by tap, the columns that have a row, int64, and the rows that they have."""
    for row in rows:
        columns = torch.nonzero(row >= 0).squeeze(1)
        yield columns, row.index_select(0, columns)


def _by_row(columns: Tensor, order: Tensor | None) -> Tensor:
    """Reorder values from table columns to rows."""
    if order is None:
        return columns
    by_row = torch.empty_like(columns)
    by_row[order.long()] = columns
    return by_row
