"""Reduction of rows by segment, and of all rows of each sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from tritonspconv.arguments import check_tensor, whole_number
from tritonspconv.graph_capture import refuse_capture
from tritonspconv.kernels.segment_reduce import segment_reduce
from tritonspconv.ops.pool import PoolMode

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SegmentMode = Literal["sum", "mean", "max"]

_INDEX_DTYPES = (torch.int32, torch.int64)


def global_pool(
    feats: Float[Tensor, "N C"],
    batch_index: Int[Tensor, "N"],
    batch_size: int,
    mode: PoolMode = "max",
    *,
    is_sorted: bool = False,
) -> Float[Tensor, "{batch_size} C"]:
    """Reduce all rows of each sample, channel by channel.

    Args:
        feats: Rows [N, C], floating point.
        batch_index: Sample of each row, int32 or int64 [N]. A row whose sample is not in
            ``[0, batch_size)`` is left out.
        batch_size: Number of samples.
        mode: ``"max"``, ``"avg"`` or ``"sum"``.
        is_sorted: Pass True if you know that ``batch_index`` ascends; this saves a sort.

    Returns:
        [batch_size, C] in ``feats.dtype``; 0 for a sample without rows.

    Raises:
        TypeError: ``feats`` is not floating point or ``batch_index`` not integral.
        ValueError: Shapes or devices disagree, or the mode is unknown.

    Deterministic; the host never waits. Accumulates in float32 (float64 for float64).
    Differentiable any number of times in ``feats``; the gradient of a maximum goes to the lowest
    row that has it.
    """
    if has_torch_function_variadic(feats, batch_index):
        return handle_torch_function(
            global_pool, (feats, batch_index), feats, batch_index, batch_size, mode,
            is_sorted=is_sorted,
        )  # fmt: skip
    _check("global_pool", feats, batch_index)
    if mode not in get_args(PoolMode):
        raise ValueError(f"global_pool: mode must be one of {get_args(PoolMode)}; got {mode!r}.")
    batch_size = whole_number("global_pool: batch_size", batch_size, least=0)
    ordered, perm = _sorted(batch_index, is_sorted)
    samples = torch.arange(batch_size + 1, dtype=ordered.dtype, device=ordered.device)
    bounds = torch.searchsorted(ordered, samples)
    segment_mode = "mean" if mode == "avg" else mode
    sample_of_row = _known(batch_index, batch_size)
    return reduce_segments(feats, sample_of_row, perm, bounds[:-1], bounds[1:], segment_mode)


def global_broadcast(
    values: Float[Tensor, "B C"], batch_index: Int[Tensor, "N"], *, is_sorted: bool = False
) -> Float[Tensor, "N C"]:
    """Give every row the values of its sample: the transpose of a global sum.

    Args:
        values: [batch_size, C], floating point.
        batch_index: Sample of each row, int32 or int64 [N].
        is_sorted: Pass True if you know that ``batch_index`` ascends; this saves a sort in the
            backward pass.

    Returns:
        [N, C]; 0 for a row whose sample is not in ``[0, batch_size)``.

    Raises:
        TypeError: ``values`` is not floating point or ``batch_index`` not integral.
        ValueError: Shapes or devices disagree.

    Deterministic, differentiable in ``values``.
    """
    if has_torch_function_variadic(values, batch_index):
        return handle_torch_function(
            global_broadcast, (values, batch_index), values, batch_index, is_sorted=is_sorted
        )
    _check("global_broadcast", values, batch_index, same_rows=False)
    return _GlobalBroadcast.apply(values, batch_index, is_sorted)


def reduce_segments(
    values: Tensor,
    segment_of_row: Tensor,
    perm: Tensor | None,
    segment_start: Tensor,
    segment_end: Tensor,
    mode: SegmentMode,
) -> Tensor:
    """Reduce ``values[perm[segment_start[s]:segment_end[s]]]`` for every segment ``s``.

    Args:
        values: Rows [P, C].
        segment_of_row: Segment of each row, int [P]; -1: the row is in no segment. The backward
            pass uses it.
        perm: int64 [P], the row at each position; None: position ``p`` is row ``p``.
        segment_start: int64 [S], first position.
        segment_end: int64 [S], one past the last position.
        mode: ``"sum"``, ``"mean"`` or ``"max"``.

    Returns:
        [S, C]; an empty segment is 0.
    """
    return _ReduceSegments.apply(values, segment_of_row, perm, segment_start, segment_end, mode)


def _check(op: str, feats: Tensor, batch_index: Tensor, same_rows: bool = True) -> None:
    refuse_capture(op)
    name = "feats" if same_rows else "values"
    check_tensor(f"{op}: {name}", feats)
    check_tensor(f"{op}: batch_index", batch_index)
    if not feats.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point; got {feats.dtype}.")
    if batch_index.dtype not in _INDEX_DTYPES:
        raise TypeError(f"{op}: batch_index must be int32 or int64; got {batch_index.dtype}.")
    if feats.ndim != 2:
        raise ValueError(f"{op}: {name} must have 2 dimensions; got shape {list(feats.shape)}.")
    if batch_index.ndim != 1 or (same_rows and batch_index.shape[0] != feats.shape[0]):
        expected = f"[{feats.shape[0]}]" if same_rows else "[N]"
        raise ValueError(
            f"{op}: batch_index must have shape {expected}; got {list(batch_index.shape)}."
        )
    if feats.device != batch_index.device:
        raise ValueError(
            f"{op}: {name} and batch_index must share a device; got {feats.device} and "
            f"{batch_index.device}."
        )


def _sorted(index: Tensor, is_sorted: bool) -> tuple[Tensor, Tensor | None]:
    """Return ``index`` in ascending order, and the row at every position."""
    if is_sorted:
        return index.contiguous(), None
    ordered, perm = torch.sort(index, stable=True)
    return ordered, perm


def _known(index: Tensor, size: int) -> Tensor:
    """Replace values outside ``[0, size)`` by -1."""
    return torch.where((index >= 0) & (index < size), index, -1)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Return ``rows[index]``, zeros where the index is -1."""
    if rows.shape[0] == 0:
        return rows.new_zeros(index.shape[0], rows.shape[1])
    taken = rows[index.clamp(min=0).long()]
    return taken.masked_fill_((index < 0)[:, None], 0)


class _ReduceSegments(torch.autograd.Function):
    """Reduce along segments; the gradient is gathered by ``segment_of_row``."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        segment_of_row: Tensor,
        perm: Tensor | None,
        segment_start: Tensor,
        segment_end: Tensor,
        mode: SegmentMode,
    ) -> Tensor:
        want_argmax = mode == "max" and ctx.needs_input_grad[0]
        out, argmax = segment_reduce(values, perm, segment_start, segment_end, mode, want_argmax)
        if ctx.needs_input_grad[0]:
            length = segment_end - segment_start if mode == "mean" else None
            ctx.save_for_backward(segment_of_row, argmax, length)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        # Use torch's operations, which can be differentiated again.
        (grad_out,) = grad_outputs
        segment_of_row, argmax, length = ctx.saved_tensors
        if length is not None:
            grad_out = grad_out / length.clamp(min=1).to(grad_out.dtype)[:, None]
        grad = _take(grad_out, segment_of_row)
        if argmax is not None and argmax.shape[0]:
            row = torch.arange(grad.shape[0], dtype=argmax.dtype, device=grad.device)
            winner = argmax[segment_of_row.clamp(min=0).long()]
            grad.masked_fill_(winner != row[:, None], 0)
        return grad, None, None, None, None, None


class _GlobalBroadcast(torch.autograd.Function):
    """Gather rows by sample; the gradient is a global sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, batch_index: Tensor, is_sorted: bool) -> Tensor:
        ctx.save_for_backward(batch_index)
        ctx.batch_size = values.shape[0]
        ctx.is_sorted = is_sorted
        return _take(values, _known(batch_index, values.shape[0]))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_out,) = grad_outputs
        (batch_index,) = ctx.saved_tensors
        grad = global_pool(grad_out, batch_index, ctx.batch_size, "sum", is_sorted=ctx.is_sorted)
        return grad, None, None
