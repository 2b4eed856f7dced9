"""Identity."""

from __future__ import annotations

from typing import Any

from torch import nn


class Identity(nn.Module):
    """Return the input, a SparseConvTensor or a tensor, unchanged."""

    def forward(self, input: Any) -> Any:
        """Return ``input``."""
        return input

    def input_spatial_size(self, out_size: Any) -> Any:
        """Return ``out_size``: the layer changes no size."""
        return out_size
