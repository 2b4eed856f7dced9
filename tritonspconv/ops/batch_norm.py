"""Batch norm of training, with residual and ReLU, as one node of the autograd graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from tritonspconv.kernels.batch_norm import batch_norm, batch_norm_grad
from tritonspconv.kernels.channel_norm import TrainingNorm
from tritonspconv.ops._second_order import normed_gradients, refuse_second_order

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def takes_training_norm(feats: Tensor, residual: Tensor | None) -> bool:
    """Return whether :func:`train_norm` takes these features and this residual."""
    return (
        feats.dtype in _DTYPES
        and feats.shape[0] > 1
        and feats.shape[1] > 0
        and (residual is None or (residual.dtype == feats.dtype and residual.shape == feats.shape))
    )


def train_norm(
    feats: Float[Tensor, "N C"],
    norm: TrainingNorm,
    *,
    residual: Float[Tensor, "N C"] | None = None,
    relu: bool = False,
    count: Int64[Tensor, ""] | None = None,
) -> Float[Tensor, "N C"]:
    """Normalise channels by their statistics over all rows, add a residual, clamp at zero.

    Use this function for features that do not come from :func:`tritonspconv.ops.sparse_conv`,
    because ``sparse_conv`` takes the norm as an argument. The sum is rounded once.

    Args:
        feats: [N, C], of which :func:`takes_training_norm` is true.
        norm: Batch norm of C channels; the call updates its running statistics.
        residual: [N, C] in the dtype of ``feats``; None: nothing is added.
        relu: Clamp the result at zero.
        count: int64 [], the number of real rows, on the device; None: all. Padding rows of the
            result are zero, and fewer than two real rows leave the running statistics as they are.

    Returns:
        [N, C] in the dtype of ``feats``.

    Deterministic. Differentiable in ``feats``, ``residual`` and the norm's weight and bias, twice;
    with a count, once.
    """
    if has_torch_function_unary(feats):
        return handle_torch_function(
            train_norm, (feats,), feats, norm, residual=residual, relu=relu, count=count
        )
    return _TrainNorm.apply(feats, norm.weight, norm.bias, residual, _Call(norm, relu, count))


class _Call(NamedTuple):
    """The arguments of :class:`_TrainNorm` that have no gradient."""

    norm: TrainingNorm
    relu: bool
    real_rows: Tensor | None


class _TrainNorm(torch.autograd.Function):
    """The launchers of ``kernels.batch_norm``, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        feats: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: _Call,
    ) -> Tensor:
        ctx.call = call
        added = None if residual is None else residual.contiguous()
        out, stats = batch_norm(feats.contiguous(), call.norm, call.relu, added, call.real_rows)
        clamped = out if added is not None and call.relu else None
        ctx.save_for_backward(feats, weight, bias, stats, clamped)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        feats, weight, bias, stats, clamped = ctx.saved_tensors
        norm, relu, real_rows = ctx.call
        needs = ctx.needs_input_grad
        # Gradients are off, unless the caller passed create_graph=True.
        if torch.is_grad_enabled():
            refuse_second_order(real_rows)
            places = [place for place in range(3) if needs[place]]
            candidates = (feats, weight, bias)
            found, grad_residual = normed_gradients(
                feats, norm._replace(weight=weight, bias=bias), clamped, relu, grad,
                [candidates[place] for place in places],
            )  # fmt: skip
            by_place = dict(zip(places, found, strict=True))
            grads = [by_place.get(place) for place in range(3)]
        else:
            *grads, grad_residual = batch_norm_grad(
                grad.contiguous(), feats.contiguous(), stats, weight, bias, relu, clamped, real_rows
            )
        wanted = zip((*grads, grad_residual), needs, strict=False)
        return (*(value if needed else None for value, needed in wanted), None)
