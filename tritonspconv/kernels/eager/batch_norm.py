"""Batch norm of training over the rows of a matrix, with the ReLU behind it (torch)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels.channel_norm import TrainingNorm


def batch_norm(feats: Tensor, norm: TrainingNorm, relu: bool) -> tuple[Tensor, Tensor]:
    """Take the moments of all rows at once, in float32."""
    n = feats.shape[0]
    variance, mean = torch.var_mean(feats.float(), dim=0, correction=0)
    stats = torch.stack([mean, (variance + norm.eps).rsqrt()])
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (n / (n - 1)), norm.momentum)
    if norm.num_batches is not None:
        norm.num_batches.add_(1)
    _, out = _scaled(feats, stats, norm.weight, norm.bias)
    return (out.relu() if relu else out).to(feats.dtype), stats


def batch_norm_grad(
    grad: Tensor,
    feats: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over all rows at once, in float32."""
    normal, out = _scaled(feats, stats, weight, bias)
    grad = grad.float()
    if relu:
        grad = grad.where(~(out.to(feats.dtype) <= 0), grad.new_zeros(()))
    grad_bias, grad_weight = grad.sum(0), (grad * normal).sum(0)
    grad = grad - (grad_bias + normal * grad_weight) / feats.shape[0]
    scale = stats[1] if weight is None else stats[1] * weight
    return (grad * scale).to(feats.dtype), grad_weight, grad_bias


def _scaled(
    feats: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return normalised rows, and those after weight and bias."""
    normal = (feats.float() - stats[0]) * stats[1]
    out = normal if weight is None else normal * weight
    return normal, out if bias is None else out + bias
