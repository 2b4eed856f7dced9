"""Batch norm of training over the rows of a matrix, with residual and ReLU behind it (torch)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels.channel_norm import TrainingNorm


def batch_norm(
    feats: Tensor,
    norm: TrainingNorm,
    relu: bool,
    residual: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`tritonspconv.kernels.batch_norm.batch_norm`."""
    rows = feats.shape[0]
    n = rows if count is None else int(count)
    feats = feats[:n]
    if n:
        variance, mean = torch.var_mean(feats.float(), dim=0, correction=0)
    else:
        variance = mean = torch.zeros(feats.shape[1], device=feats.device)
    stats = torch.stack([mean, (variance + norm.eps).rsqrt()])
    if n > 1:
        # Write through ``data``, because autograd must not notice. A torch batch norm that shares
        # these tensors keeps them for its backward pass, and torch's own update is not noticed
        # either.
        norm.running_mean.data.lerp_(mean, norm.momentum)
        norm.running_var.data.lerp_(variance * (n / (n - 1)), norm.momentum)
    if norm.num_batches is not None:
        norm.num_batches.add_(1)
    _, out = _scaled(feats, stats, norm.weight, norm.bias)
    out = out if residual is None else out + residual[:n]
    out = (out.relu() if relu else out).to(feats.dtype)
    return _padded(out, rows), stats


def batch_norm_grad(
    grad: Tensor,
    feats: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    out: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`tritonspconv.kernels.batch_norm.batch_norm_grad`."""
    rows = feats.shape[0]
    n = rows if count is None else int(count)
    grad, feats = grad[:n], feats[:n]
    normal, scaled = _scaled(feats, stats, weight, bias)
    passed = grad
    if relu:
        clamped = scaled.to(feats.dtype) if out is None else out[:n]
        passed = grad.where(~(clamped <= 0), grad.new_zeros(()))
    total = passed.float()
    grad_bias, grad_weight = total.sum(0), (total * normal).sum(0)
    total = total - (grad_bias + normal * grad_weight) / max(n, 1)
    scale = stats[1] if weight is None else stats[1] * weight
    grad_feats = _padded((total * scale).to(feats.dtype), rows)
    return grad_feats, grad_weight, grad_bias, _padded(passed, rows)


def _padded(rows: Tensor, n: int) -> Tensor:
    """Return ``rows`` with rows of zeros behind them, ``n`` in all."""
    if rows.shape[0] == n:
        return rows
    return torch.cat([rows, rows.new_zeros(n - rows.shape[0], rows.shape[1])])


def _scaled(
    feats: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return normalised rows, and those rows after weight and bias."""
    normal = (feats.float() - stats[0]) * stats[1]
    out = normal if weight is None else normal * weight
    return normal, out if bias is None else out + bias
