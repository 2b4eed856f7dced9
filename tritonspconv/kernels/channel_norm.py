"""Normalisation by fixed statistics, which kernels apply before they round."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class ChannelNorm(NamedTuple):
    """``(x - mean) / sqrt(variance + eps) * weight + bias``, one number of each for a channel.

    Batch norm in evaluation mode is this. Vectors are [C], of any float dtypes.

    Attributes:
        mean: Subtracted.
        variance: At least 0.
        weight: Factor after that; None: 1.
        bias: Added last; None: 0.
        eps: Added to the variance.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5

    def each(self, change: Callable[[Tensor], Tensor]) -> ChannelNorm:
        """Return ``change`` of each vector that is there."""
        weight = None if self.weight is None else change(self.weight)
        bias = None if self.bias is None else change(self.bias)
        return ChannelNorm(change(self.mean), change(self.variance), weight, bias, self.eps)
