"""Convolution of a window of one cell: every row times one matrix, without a kernel map."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from tritonspconv.graph_capture import refuse_capture
from tritonspconv.kernels import acc_dtype
from tritonspconv.kernels.table import PairList
from tritonspconv.kernels.weight_grad import weight_grad
from tritonspconv.ops._second_order import check_not_converted
from tritonspconv.ops.conv import compute_dtype

if TYPE_CHECKING:
    from jaxtyping import Float


def pointwise_conv(
    feats: Float[Tensor, "N c_in"],
    weight: Float[Tensor, "c_in c_out"],
    bias: Float[Tensor, "c_out"] | None = None,
) -> Float[Tensor, "N c_out"]:
    """Multiply every row of features by one matrix: ``feats @ weight + bias``.

    Torch multiplies. Under autocast torch would also round the gradients of a float32 weight and
    bias to half precision, where sums over many rows overflow; here both are summed in float32 and
    keep float32.

    Args:
        feats: [N, c_in], float32, float64, float16 or bfloat16.
        weight: [c_in, c_out].
        bias: [c_out]. Default: none.

    Returns:
        [N, c_out] in the dtype that :func:`tritonspconv.ops.sparse_conv` would return.

    Raises:
        RuntimeError: The shapes do not fit (torch's message).

    Deterministic. Differentiable any number of times in ``feats``, ``weight`` and ``bias``; each
    gradient has its tensor's dtype. The host never waits.
    """
    refuse_capture("pointwise_conv")
    if has_torch_function_unary(feats):
        return handle_torch_function(pointwise_conv, (feats,), feats, weight, bias)
    dtype = compute_dtype(feats, weight)
    if dtype == weight.dtype or not torch.is_grad_enabled():
        return _product(feats, weight, bias)
    return _RoundedOperands.apply(feats, weight, bias, dtype)


def _product(feats: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return feats.mm(weight) if bias is None else torch.addmm(bias, feats, weight)


class _RoundedOperands(torch.autograd.Function):
    """The product of operands that are rounded to ``dtype`` first."""

    @staticmethod
    def forward(
        ctx: Any, feats: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.dtypes = feats.dtype, weight.dtype, None if bias is None else bias.dtype
        # Gradients of gradients need the graph behind the weight.
        ctx.weight = weight
        feats, weight = feats.to(dtype), weight.to(dtype)
        ctx.save_for_backward(feats, weight)
        return _product(feats, weight, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        feats, weight = ctx.saved_tensors
        # Gradients are off, unless the caller passed create_graph=True.
        has_graph = torch.is_grad_enabled()
        if has_graph:
            check_not_converted("pointwise_conv", feats, ctx.dtypes[0], ctx.needs_input_grad[0])
            weight = ctx.weight.to(feats.dtype)
        feats_dtype, weight_dtype, bias_dtype = ctx.dtypes
        needs_feats, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad = grad.to(feats.dtype).contiguous()
        grad_feats = grad.mm(weight.t()).to(feats_dtype) if needs_feats else None
        grad_weight = None
        if needs_weight and has_graph:
            grad_weight = feats.float().t().mm(grad.float()).to(weight_dtype)
        elif needs_weight:
            grad_weight = _weight_grad(feats, grad, weight_dtype)
        grad_bias = None
        if needs_bias:
            grad_bias = grad.sum(0, dtype=acc_dtype(grad.dtype)).to(bias_dtype)
        return grad_feats, grad_weight, grad_bias, None


def _weight_grad(feats: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``feats.T @ grad`` in ``dtype``, summed like the weight gradient of any layer."""
    rows = feats.shape[0]
    out = feats.new_empty(1, feats.shape[1], grad.shape[1], dtype=dtype)
    if rows == 0:
        return out.zero_()[0]
    # The single tap pairs each input row with the output row of the same number.
    pairs = torch.arange(rows, dtype=torch.int32, device=feats.device).repeat(2, 1)
    tap_ptr = torch.arange(0, rows + 1, rows, device=feats.device)
    weight_grad(feats.contiguous(), grad, PairList(pairs, tap_ptr, False), out)
    return out[0]
