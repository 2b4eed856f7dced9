"""Base classes of the layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from tritonspconv.sparse_tensor import SparseTensor


class SparseModule(nn.Module):
    """A module whose ``forward`` takes a :class:`SparseTensor`.

    Derive your own blocks from it to place them in :class:`tritonspconv.nn.Sequential`, which hands
    the features alone to every other module.
    """


class FeatureModule(SparseModule):
    """Mixin that lets a torch module work on the features of a sparse tensor; sites stay.

    List it before the torch module among the bases. Plain tensors pass through as in torch.
    """

    def forward(self, input: Any) -> Any:
        """Apply the torch module to the features of a sparse tensor, or to a plain tensor."""
        if isinstance(input, SparseTensor):
            return input.replace(super().forward(input.feats))
        return super().forward(input)
