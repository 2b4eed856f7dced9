"""Max, average and sum over the present taps of a neighbour table (numba)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tritonspconv.kernels import acc_dtype
from tritonspconv.kernels.numba._compile import compiled
from tritonspconv.kernels.numba._threads import in_ranges

_SUM, _AVERAGE, _MAX, _SHARED_MAX = range(4)
# The count of numbers that is worth a thread.
_LEAST_WORK = 200_000


def pool_fwd(
    feats: Tensor,
    rows: Tensor,
    order: Tensor | None,
    mode: str,
    floor: float | None = None,
    want_saved: bool = False,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Pool column by column, in the order of taps."""
    volume, n = rows.shape
    real = n if count is None else int(count)
    x, table = _array(feats, acc_dtype(feats.dtype)), rows.contiguous().numpy()
    out = feats.new_zeros(n, feats.shape[1], dtype=acc_dtype(feats.dtype))
    saved = None
    if mode == "max":
        # If the winners are not wanted, the array has no rows and the kernel writes no winners.
        winners = rows.new_full((n if want_saved else 0, feats.shape[1]), -1)
        _in_ranges(_max_columns, real, volume * feats.shape[1], x, table, floor is None,
                   -np.inf if floor is None else floor, winners.numpy(), out.numpy())  # fmt: skip
        saved = winners
    else:
        saved = rows.new_zeros(n)
        _in_ranges(_sum_columns, real, volume * feats.shape[1], x, table, mode == "avg",
                   saved.numpy(), out.numpy())  # fmt: skip
    saved = saved if want_saved and mode != "sum" else None
    return _by_row(out.to(feats.dtype), order), None if saved is None else _by_row(saved, order)


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
    """Add the gradient column by column, in the order of taps."""
    (volume, n), channels = rows.shape, grad_out.shape[1]
    dtype = acc_dtype(grad_out.dtype)
    real = n if count is None else int(count)
    nothing, no_rows = grad_out.new_empty(0, 0, dtype=dtype), rows.new_empty(0, 0)
    rule = {"sum": _SUM, "avg": _AVERAGE}.get(mode, _SHARED_MAX if argmax is None else _MAX)
    own = torch.arange(n, dtype=torch.int32, device=rows.device) if order is None else order
    grad = grad_out.new_zeros(n, channels, dtype=dtype)
    _in_ranges(
        _add_gradients, real, volume * channels, _array(grad_out, dtype),
        rows.contiguous().numpy(), own.contiguous().numpy(), rule,
        (no_rows if argmax is None else argmax).contiguous().numpy(),
        _array(nothing if feats is None else feats, dtype),
        _array(nothing if out is None else out, dtype),
        _array(nothing[0:0].reshape(-1) if present is None else present, dtype),
        grad.numpy(),
    )  # fmt: skip
    return _by_row(grad.to(grad_out.dtype), order)


def _in_ranges(kernel: Any, n: int, work: int, *args: Any) -> None:
    """Call ``kernel(first, last, *args)`` for ranges of ``n`` columns of ``work`` numbers each."""
    least = _LEAST_WORK // max(work, 1)
    in_ranges(lambda first, last: kernel(first, last, *args), n, least)


def _array(rows: Tensor, dtype: torch.dtype) -> Any:
    """Return rows as a contiguous array of ``dtype``."""
    return rows.detach().to(dtype).contiguous().numpy()


def _by_row(columns: Tensor, order: Tensor | None) -> Tensor:
    """Reorder values from table columns to rows."""
    return columns if order is None else torch.empty_like(columns).index_copy_(
        0, order.long(), columns
    )  # fmt: skip


@compiled
def _sum_columns(first, last, feats, table, average, held, out):
    """Write sums or averages of inputs to ``out`` [n, C], their numbers to ``held`` [n]."""
    channels = feats.shape[1]
    for column in range(first, last):
        found = 0
        for tap in range(table.shape[0]):
            row = table[tap, column]
            if row >= 0:
                found += 1
                for c in range(channels):
                    out[column, c] += feats[row, c]
        held[column] = found
        if average and found > 0:
            for c in range(channels):
                out[column, c] /= found


@compiled
def _max_columns(first, last, feats, table, empty_is_zero, start, winners, out):
    """Write maxima to ``out`` [n, C], and the rows that they come from to ``winners``, if any."""
    channels, wanted = feats.shape[1], winners.shape[0] > 0
    for column in range(first, last):
        found = False
        for c in range(channels):
            out[column, c] = start
        for tap in range(table.shape[0]):
            row = table[tap, column]
            if row < 0:
                continue
            found = True
            for c in range(channels):
                value, best = feats[row, c], out[column, c]
                is_nan = value != value
                if wanted and (
                    value > best or is_nan or (value == best and winners[column, c] < 0)
                ):
                    winners[column, c] = row
                if value > best or is_nan:
                    out[column, c] = value
        if empty_is_zero and not found:
            for c in range(channels):
                out[column, c] = 0


@compiled
def _add_gradients(first, last, grad_out, table, own, rule, argmax, feats, out, present, grad):
    """Add the shares of its outputs to each input's row of ``grad`` [n, C], by a pooling rule."""
    channels = grad_out.shape[1]
    for column in range(first, last):
        me = own[column]
        for tap in range(table.shape[0]):
            source = table[tap, column]
            if source < 0:
                continue
            if rule == _SUM:
                for c in range(channels):
                    grad[column, c] += grad_out[source, c]
            elif rule == _AVERAGE:
                for c in range(channels):
                    grad[column, c] += grad_out[source, c] / present[source]
            elif rule == _MAX:
                for c in range(channels):
                    if argmax[source, c] == me:
                        grad[column, c] += grad_out[source, c]
            else:
                for c in range(channels):
                    if out[source, c] == feats[me, c]:
                        grad[column, c] += grad_out[source, c]
