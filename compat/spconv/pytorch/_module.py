"""``SparseModule``, the base of everything that takes a SparseConvTensor."""

from __future__ import annotations

from torch import nn


class SparseModule(nn.Module):
    """Base of everything that takes a SparseConvTensor itself when inside SparseSequential.

    Args:
        name: Kept as an attribute, without effect.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = name
        self._sparse_unique_name = ""
