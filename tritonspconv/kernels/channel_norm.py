"""Normalisation of channels: by fixed statistics, or by the statistics of the rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class ChannelNorm(NamedTuple):
    """``(x - mean) / sqrt(variance + eps) * weight + bias``, one number of each for a channel.

    This is batch norm in evaluation mode. Each vector is [C] and of any float dtype.

    Attributes:
        mean: Subtracted from each row.
        variance: At least 0.
        weight: The factor; None: 1.
        bias: Added last; None: 0.
        eps: Added to the variance.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5

    def each(self, change: Callable[[Tensor], Tensor]) -> ChannelNorm:
        """Return the norm with ``change`` applied to each vector that is not None."""
        weight = None if self.weight is None else change(self.weight)
        bias = None if self.bias is None else change(self.bias)
        return ChannelNorm(change(self.mean), change(self.variance), weight, bias, self.eps)

    def scale(self, dtype: torch.dtype) -> Tensor:
        """Return the factor ``weight / sqrt(variance + eps)`` [C], computed in ``dtype``."""
        scale = (self.variance.to(dtype) + self.eps).rsqrt()
        return scale if self.weight is None else scale * self.weight.to(dtype)

    def scale_and_shift(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return the norm as ``scale * x + shift``: the two vectors [C] of torch's batch norm.

        Torch's batch norm computes them, so that they have its bits.

        Args:
            dtype: Type of the result; None: the widest of the vectors' types, at least float32.
        """
        if dtype is None:
            held = (vector.dtype for vector in self[:4] if vector is not None)
            dtype = functools.reduce(torch.promote_types, held, torch.float32)
        mean, variance, weight, bias, eps = self.each(
            lambda x: x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()
        )
        zeros = mean.new_zeros(1, len(mean))
        ones = torch.ones_like(zeros)
        # F.batch_norm calls torch.batch_norm after checks that take as long as the call.
        scale = torch.batch_norm(ones, weight, None, zeros[0], variance, False, 0, eps, False)
        shift = torch.batch_norm(zeros, weight, bias, mean, variance, False, 0, eps, False)
        return scale[0], shift[0]


class TrainingNorm(NamedTuple):
    """Batch norm in training: :class:`ChannelNorm` by the mean and variance of all rows.

    Each vector is float32 [C] and contiguous. Batch norm: arXiv:1502.03167.

    Attributes:
        running_mean: Moved towards the mean by ``momentum``, in place.
        running_var: Moved towards the unbiased variance by ``momentum``, in place.
        weight: Factor; None: 1.
        bias: Added last; None: 0.
        num_batches: int64 [], counted up in place; or None.
        momentum: Share of the new statistics in the running ones.
        eps: Added to the variance.
    """

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    num_batches: Tensor | None = None
    momentum: float = 0.1
    eps: float = 1e-5
