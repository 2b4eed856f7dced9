"""Gradients of convolutions that can be differentiated again.

The gradient of the features is a convolution along the inverse map. The gradient of the weight is a
sum over the pairs of the map, and its own gradients are convolutions. ``backward`` runs these
functions if the caller passes ``create_graph=True``; the ordinary ones are in ``ops/conv.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonspconv.guide import more
from tritonspconv.kernel_map import KernelMap
from tritonspconv.kernels import acc_dtype
from tritonspconv.kernels.channel_norm import TrainingNorm
from tritonspconv.kernels.conv_grads import conv_grads

if TYPE_CHECKING:
    from collections.abc import Callable

    # Features, matrices, bias, map and precision of products.
    Convolution = Callable[[Tensor, Tensor, Tensor | None, KernelMap, Any], Tensor]


def refuse_second_order(count: Tensor | None) -> None:
    """Raise if rows are padded to a capacity: their gradients cannot be differentiated again.

    Args:
        count: Number of real rows; None: all.

    Raises:
        NotImplementedError: ``count`` is not None.
    """
    if count is not None:
        raise NotImplementedError(
            "create_graph=True is not supported on rows that are padded to a capacity. Compute "
            "gradients of gradients outside the captured function."
        )


def conv_gradients(
    convolve: Convolution,
    feats: Tensor,
    matrices: Tensor,
    grad: Tensor,
    kernel_map: KernelMap,
    precision: str,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return differentiable gradients of a convolution's features and matrices.

    Args:
        convolve: The differentiable convolution.
        feats: [n_in, c_in], with its graph.
        matrices: [V, c_in, c_out], with its graph, of the dtype of ``feats``.
        grad: [n_out, c_out], with its graph, of the same dtype.
        kernel_map: The map of the forward pass.
        precision: Products of float32.
        needs: True for the features, and for the matrices, if they need a gradient.

    Returns:
        [n_in, c_in] in the dtype of ``feats``, and [V, c_in, c_out] in the dtype of sums.
    """
    grad_feats = grad_matrices = None
    if needs[0]:
        grad_feats = convolve(grad, matrices.transpose(1, 2), None, kernel_map.inverse(), precision)
    if needs[1]:
        grad_matrices = _WeightGrad.apply(
            feats, grad, matrices.detach(), kernel_map, precision, convolve
        )
    return grad_feats, grad_matrices


def check_not_converted(name: str, feats: Tensor, given: torch.dtype, needs_grad: bool) -> None:
    """Raise if features that need a gradient were converted inside the operation.

    The graph behind the features ends at the converted copy. Its share of a gradient of a gradient
    would be lost.

    Args:
        name: The operation, for the message.
        feats: The features that the operation saved.
        given: The dtype of the features that it got.
        needs_grad: True: they need a gradient.
    """
    if needs_grad and feats.dtype != given:
        raise RuntimeError(
            f"{name}: a gradient of the gradient needs contiguous features of {feats.dtype}, in "
            "which the layer computes. Convert them before the layer, where autograd sees it: "
            f"x.replace(x.feats.to({feats.dtype}).contiguous())." + more("second-order")
        )


class _WeightGrad(torch.autograd.Function):
    """``out[v] = sum over pairs (i, o) of tap v: feats[i]^T grad[o]``, in the dtype of sums."""

    @staticmethod
    def forward(
        ctx: Any,
        feats: Tensor,
        grad: Tensor,
        matrices: Tensor,
        kernel_map: KernelMap,
        precision: str,
        convolve: Convolution,
    ) -> Tensor:
        ctx.save_for_backward(feats, grad)
        ctx.call = kernel_map, precision, convolve
        out = torch.empty_like(matrices, dtype=acc_dtype(feats.dtype))
        conv_grads(
            feats.contiguous(), grad.contiguous(), matrices, kernel_map,
            needs_feats=False, grad_weight=out, precision=precision,
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        feats, grad = ctx.saved_tensors
        kernel_map, precision, convolve = ctx.call
        matrices = grad_out.to(feats.dtype)
        grad_feats = grad_grad = None
        if ctx.needs_input_grad[0]:
            grad_feats = convolve(
                grad, matrices.transpose(1, 2), None, kernel_map.inverse(), precision
            )
        if ctx.needs_input_grad[1]:
            grad_grad = convolve(feats, matrices, None, kernel_map, precision)
        return grad_feats, grad_grad, None, None, None, None


def normed_gradients(
    out: Tensor,
    norm: TrainingNorm,
    clamped: Tensor | None,
    relu: bool,
    grad: Tensor,
    inputs: list[Tensor],
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return differentiable gradients of a convolution with batch norm in training.

    Args:
        out: The convolution without norm, made again, with its graph.
        norm: The batch norm; its running statistics are left alone.
        clamped: The result of the node, if a residual was added before the ReLU.
        relu: The node clamped its output at zero.
        grad: The gradient of the node's output, with its graph.
        inputs: The tensors to differentiate with respect to.

    Returns:
        The gradients of ``inputs``, and the gradient of the residual [n_out, c_out].
    """
    dtype = acc_dtype(out.dtype)
    scale, shift = (None if v is None else v.to(dtype) for v in (norm.weight, norm.bias))
    normed = F.batch_norm(out, None, None, scale, shift, True, 0.0, norm.eps)
    if relu:
        grad = torch.where((normed if clamped is None else clamped).detach() > 0, grad, 0)
    if not inputs:
        return (), grad
    return torch.autograd.grad(normed, inputs, grad, create_graph=True), grad
