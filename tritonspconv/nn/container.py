"""Containers and the way out of the sparse world."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tritonspconv.nn._module import SparseModule
from tritonspconv.sparse_tensor import SparseTensor


class Sequential(SparseModule, nn.Sequential):
    """Apply modules in turn, sparse ones and plain torch ones alike.

    A :class:`SparseModule` gets the running value as it is. Any other module gets the features of a
    sparse tensor and its result replaces them: it must keep the rows. What is no sparse tensor, as
    after :class:`ToDense`, goes to any module unchanged.
    """

    def forward(self, input: Any) -> Any:
        """Apply the modules in turn."""
        for module in self:
            if isinstance(input, SparseTensor) and not isinstance(module, SparseModule):
                input = input.replace(module(input.feats))
            else:
                input = module(input)
        return input


class ToDense(SparseModule):
    """Turn a sparse tensor into a dense one.

    Args:
        channels_first: Layout of the result.
    """

    def __init__(self, channels_first: bool = True) -> None:
        super().__init__()
        self.channels_first = channels_first

    def forward(self, x: SparseTensor) -> Tensor:
        """Return ``[batch_size, C, *spatial_shape]``, or channels last."""
        return x.dense(channels_first=self.channels_first)

    def extra_repr(self) -> str:
        """Return the layout."""
        return f"channels_first={self.channels_first}"
