"""Weighted sums of a few rows each, as interpolation takes them, and their transpose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritonspconv.arguments import check_tensor, whole_number
from tritonspconv.graph_capture import refuse_capture
from tritonspconv.kernels import acc_dtype
from tritonspconv.ops.global_pool import global_pool

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


def gather_weighted(
    feats: Float[Tensor, "N C"], rows: Int64[Tensor, "M K"], weights: Float[Tensor, "M K"]
) -> Float[Tensor, "M C"]:
    """Sum weighted rows: ``out[m] = sum over k of weights[m, k] * feats[rows[m, k]]``.

    Args:
        feats: [N, C], floating point.
        rows: int64 [M, K]; -1 adds nothing.
        weights: [M, K], floating point.

    Returns:
        [M, C] in ``feats.dtype``.

    Raises:
        ValueError: Shapes or devices disagree.

    Deterministic, and differentiable in ``feats`` alone. Accumulates in float32 (float64 for
    float64). The host never waits.
    """
    _check("gather_weighted", feats, rows, weights, "N")
    return _GatherWeighted.apply(feats, rows, weights)


def scatter_weighted(
    feats: Float[Tensor, "M C"],
    rows: Int64[Tensor, "M K"],
    weights: Float[Tensor, "M K"],
    n_out: int,
) -> Float[Tensor, "{n_out} C"]:
    """Spread rows: ``out[rows[m, k]] += weights[m, k] * feats[m]``.

    Args:
        feats: [M, C], floating point.
        rows: int64 [M, K], below ``n_out``; -1 goes nowhere.
        weights: [M, K], floating point.
        n_out: Number of output rows.

    Returns:
        [n_out, C] in ``feats.dtype``.

    Raises:
        ValueError: Shapes or devices disagree.

    Deterministic, and differentiable in ``feats`` alone. Accumulates in float32 (float64 for
    float64). The host never waits. Extra memory: [M * K, C].
    """
    _check("scatter_weighted", feats, rows, weights, "M")
    n_out = whole_number("scatter_weighted: n_out", n_out, least=0)
    return _ScatterWeighted.apply(feats, rows, weights, n_out)


def _check(op: str, feats: Tensor, rows: Tensor, weights: Tensor, length: str) -> None:
    refuse_capture(op)
    for name, value in (("feats", feats), ("rows", rows), ("weights", weights)):
        check_tensor(f"{op}: {name}", value)
    if feats.ndim != 2 or rows.ndim != 2 or weights.shape != rows.shape:
        raise ValueError(
            f"{op}: feats must be [{length}, C] and rows and weights [M, K]; got "
            f"{list(feats.shape)}, {list(rows.shape)} and {list(weights.shape)}."
        )
    if length == "M" and feats.shape[0] != rows.shape[0]:
        raise ValueError(
            f"{op}: feats and rows must have one row each per item; got {list(feats.shape)} and "
            f"{list(rows.shape)}."
        )
    devices = [str(tensor.device) for tensor in (feats, rows, weights)]
    if len(set(devices)) > 1:
        raise ValueError(f"{op}: all tensors must be on one device; got {devices}.")


class _GatherWeighted(torch.autograd.Function):
    """Gather rows; the gradient scatters them by the same weights."""

    @staticmethod
    def forward(ctx: Any, feats: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.n_in = feats.shape[0]
        dtype = acc_dtype(feats.dtype)
        out = torch.zeros(rows.shape[0], feats.shape[1], dtype=dtype, device=feats.device)
        if feats.shape[0]:
            weights = torch.where(rows < 0, 0, weights).to(dtype)
            for row, weight in zip(rows.clamp(min=0).unbind(1), weights.unbind(1), strict=True):
                out.addcmul_(feats[row].to(dtype), weight[:, None])
        return out.to(feats.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        rows, weights = ctx.saved_tensors
        return scatter_weighted(grad_outputs[0], rows, weights, ctx.n_in), None, None


class _ScatterWeighted(torch.autograd.Function):
    """Scatter rows; the gradient gathers them by the same weights."""

    @staticmethod
    def forward(ctx: Any, feats: Tensor, rows: Tensor, weights: Tensor, n_out: int) -> Tensor:
        ctx.save_for_backward(rows, weights)
        dtype = acc_dtype(feats.dtype)
        spread = feats.to(dtype)[:, None] * weights.to(dtype)[..., None]
        return global_pool(spread.flatten(0, 1), rows.flatten(), n_out, "sum").to(feats.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        rows, weights = ctx.saved_tensors
        return gather_weighted(grad_outputs[0], rows, weights), None, None, None
