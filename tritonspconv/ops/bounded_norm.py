"""Batch norm in training over padded rows: only the first rows are real."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels.channel_norm import TrainingNorm
from tritonspconv.ops.batch_norm import train_norm


def batch_norm(
    feats: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    momentum: float,
    eps: float,
    count: Tensor | None,
) -> Tensor:
    """Normalise channels by their statistics over the real rows.

    Args:
        feats: [N, C], floating point.
        running_mean: [C], moved towards the mean by ``momentum``, in place; or None.
        running_var: [C], moved towards the unbiased variance, in place; or None.
        weight: [C], a factor; None: 1.
        bias: [C], added last; None: 0.
        momentum: Share of the new statistics in the running ones.
        eps: Added to the variance.
        count: int64 [], the number of real rows, on the device; None: all.

    Returns:
        [N, C] in the dtype of ``feats``; padding rows are zero. Fewer than two real rows leave the
        running statistics as they are. No wait for the device. Differentiable once.
    """
    vectors = running_mean, running_var, weight, bias
    if _fits_kernel(feats, vectors):
        assert running_mean is not None
        assert running_var is not None
        norm = TrainingNorm(running_mean, running_var, weight, bias, None, momentum, eps)
        return train_norm(feats, norm, count=count)
    return _in_torch(feats, *vectors, momentum, eps, count)


def _fits_kernel(feats: Tensor, vectors: tuple[Tensor | None, ...]) -> bool:
    if feats.dtype == torch.float64 or vectors[0] is None or vectors[1] is None:
        return False
    return feats.numel() > 0 and all(
        vector is None or (vector.dtype == torch.float32 and vector.is_contiguous())
        for vector in vectors
    )


def _in_torch(
    feats: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    count: Tensor | None,
) -> Tensor:
    """Return :func:`batch_norm` in operations that torch differentiates, for any dtypes."""
    rows = feats.shape[0]
    if count is None:
        count = torch.full((), rows, dtype=torch.int64, device=feats.device)
    is_real = (torch.arange(rows, device=feats.device) < count)[:, None]
    x = feats if feats.dtype == torch.float64 else feats.float()
    zero = x.new_zeros(())
    size = count.clamp(min=1).to(x.dtype)
    mean = torch.where(is_real, x, zero).sum(0) / size
    far = torch.where(is_real, x - mean, zero)
    variance = far.square().sum(0) / size
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            share = momentum * (count > 1)
            unbiased = variance * (size / (size - 1).clamp(min=1))
            running_mean.lerp_(mean.to(running_mean.dtype), share.to(running_mean.dtype))
            running_var.lerp_(unbiased.to(running_var.dtype), share.to(running_var.dtype))
    out = far * (variance + eps).rsqrt()
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    return torch.where(is_real, out, zero).to(feats.dtype)
