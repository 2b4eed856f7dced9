"""The convolution and its gradients as plain functions, which registered operators call."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernel_map import KernelMap
from tritonspconv.kernels.channel_norm import ChannelNorm
from tritonspconv.kernels.conv_grads import conv_grads
from tritonspconv.ops._conv_checks import check_norm, check_operands, check_residual
from tritonspconv.ops.conv import (
    Precision,
    WeightLayout,
    as_matrices,
    cast,
    new_weight_grad,
    run_convolution,
)


def forward_only(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_map: KernelMap,
    layout: WeightLayout,
    dtype: torch.dtype,
    precision: Precision,
    norm: ChannelNorm | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Return the convolution [n_out, c_out] in ``dtype``, without autograd.

    The arguments are those of :func:`tritonspconv.ops.sparse_conv`.
    """
    matrices = weight if layout == "VIO" else as_matrices(weight, layout)
    check_operands(feats, matrices, kernel_map, bias, precision)
    if residual is not None:
        check_residual(residual, matrices, kernel_map)
        residual = residual.contiguous()
    if norm is not None:
        check_norm(norm, matrices)
    feats, matrices = cast(feats, dtype).contiguous(), cast(matrices, dtype)
    return run_convolution(feats, matrices, bias, kernel_map, precision, norm, residual, relu)


def gradients_only(
    grad: Tensor,
    feats: Tensor,
    weight: Tensor,
    kernel_map: KernelMap,
    layout: WeightLayout,
    dtype: torch.dtype,
    precision: Precision,
    needs_feats: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``feats`` and ``weight``; empty where not needed."""
    grad, feats_c = cast(grad, dtype).contiguous(), cast(feats, dtype).contiguous()
    matrices = cast(weight if layout == "VIO" else as_matrices(weight, layout), dtype)
    grad_weight = into = None
    if needs_weight:
        shape = None if layout == "VIO" else weight.shape
        grad_weight, into = new_weight_grad(matrices, weight.dtype, shape)
    grad_feats = conv_grads(
        feats_c, grad, matrices, kernel_map,
        needs_feats=needs_feats, grad_weight=into, precision=precision,
    )  # fmt: skip
    return (
        feats.new_empty(0) if grad_feats is None else cast(grad_feats, feats.dtype),
        weight.new_empty(0) if grad_weight is None else grad_weight,
    )
