"""Batch norm of training over the rows of a matrix, with the ReLU behind it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspconv.kernels import has_triton

if TYPE_CHECKING:
    from jaxtyping import Float, Float32

    from tritonspconv.kernels.channel_norm import TrainingNorm


def batch_norm(
    feats: Float[Tensor, "n c"], norm: TrainingNorm, relu: bool
) -> tuple[Float[Tensor, "n c"], Float32[Tensor, "2 c"]]:
    """Normalise channels by their statistics over all rows, scale and shift, and clamp.

    Args:
        feats: [n, c], contiguous; float16, bfloat16 or float32; ``n >= 2``, ``c >= 1``.
        norm: Of c channels; its running statistics move.
        relu: Clamp the result at zero.

    Returns:
        [n, c] in the dtype of ``feats``, and float32 [2, c]: mean and ``1 / sqrt(var + eps)``.
    """
    return _back_end(feats.device).batch_norm(feats, norm, relu)


def batch_norm_grad(
    grad: Float[Tensor, "n c"],
    feats: Float[Tensor, "n c"],
    stats: Float32[Tensor, "2 c"],
    weight: Float32[Tensor, "c"] | None,
    bias: Float32[Tensor, "c"] | None,
    relu: bool,
) -> tuple[Float[Tensor, "n c"], Float32[Tensor, "c"], Float32[Tensor, "c"]]:
    """Return the gradients of ``feats``, ``weight`` and ``bias`` of :func:`batch_norm`.

    Args:
        grad: [n, c], the gradient of the output, contiguous, in the dtype of ``feats``.
        feats: The argument of :func:`batch_norm`.
        stats: The statistics that :func:`batch_norm` returned.
        weight: The norm's.
        bias: The norm's.
        relu: The argument of :func:`batch_norm`.
    """
    return _back_end(grad.device).batch_norm_grad(grad, feats, stats, weight, bias, relu)


@functools.lru_cache(maxsize=1024)
def _back_end(device: torch.device):
    if has_triton(device):
        from tritonspconv.kernels.triton import batch_norm as back_end
    else:
        from tritonspconv.kernels.eager import batch_norm as back_end
    return back_end
