"""Batch norm of training over the rows of a matrix, with residual and ReLU behind it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspconv.kernels import has_triton

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Int64

    from tritonspconv.kernels.channel_norm import TrainingNorm


def batch_norm(
    feats: Float[Tensor, "n c"],
    norm: TrainingNorm,
    relu: bool,
    residual: Float[Tensor, "n c"] | None = None,
    count: Int64[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, "n c"], Float32[Tensor, "2 c"]]:
    """Normalise channels by their statistics over all rows, scale and shift, add, and clamp.

    Args:
        feats: [n, c], contiguous; float16, bfloat16 or float32; ``n >= 2``, ``c >= 1``.
        norm: Batch norm of c channels; its running statistics move.
        relu: Clamp the result at zero.
        residual: [n, c], contiguous, in the dtype of ``feats``: added before the result is clamped;
            None: nothing.
        count: int64 [], number of real rows; None: all. Fewer than two leave the running statistics
            as they are.

    Returns:
        [n, c] in the dtype of ``feats``, rounded once, padding rows zero; and float32 [2, c]: mean
        and ``1 / sqrt(var + eps)``.
    """
    return _back_end(feats.device).batch_norm(feats, norm, relu, residual, count)


def batch_norm_grad(
    grad: Float[Tensor, "n c"],
    feats: Float[Tensor, "n c"],
    stats: Float32[Tensor, "2 c"],
    weight: Float32[Tensor, "c"] | None,
    bias: Float32[Tensor, "c"] | None,
    relu: bool,
    out: Float[Tensor, "n c"] | None = None,
    count: Int64[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, "n c"], Float32[Tensor, "c"], Float32[Tensor, "c"], Float[Tensor, "n c"]]:
    """Return the gradients of :func:`batch_norm`.

    Args:
        grad: [n, c], the gradient of the output, contiguous, in the dtype of ``feats``.
        feats: The argument of :func:`batch_norm`.
        stats: The statistics that :func:`batch_norm` returned.
        weight: The norm's.
        bias: The norm's.
        relu: The argument of :func:`batch_norm`.
        out: The output that :func:`batch_norm` returned. Needed if it added a residual and clamped
            the sum, else None.
        count: The argument of :func:`batch_norm`.

    Returns:
        The gradients of ``feats``, of the norm's weight and bias, and of the residual. The last one
        means nothing if there was no residual.
    """
    return _back_end(grad.device).batch_norm_grad(
        grad, feats, stats, weight, bias, relu, out, count
    )


def fuses_training(device: torch.device) -> bool:
    """Return whether these launchers beat torch's batch norm of training: on a GPU with Triton."""
    return has_triton(device)


@functools.lru_cache(maxsize=1024)
def _back_end(device: torch.device):
    if has_triton(device):
        from tritonspconv.kernels.triton import batch_norm as back_end
    else:
        from tritonspconv.kernels.eager import batch_norm as back_end
    return back_end
