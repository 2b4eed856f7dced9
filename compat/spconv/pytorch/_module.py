"""``SparseModule``, the base of modules that take a SparseConvTensor."""

from __future__ import annotations

from torch import nn


class SparseModule(nn.Module):
    """Base of modules to which SparseSequential passes the SparseConvTensor itself.

    Args:
        name: Kept as an attribute, without effect.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = name
        self._sparse_unique_name = ""
