"""Base classes of the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from tritonspconv.nn._backward_hooks import add_hook
from tritonspconv.sparse_tensor import SparseTensor


class SparseModule(nn.Module):
    """A module whose ``forward`` takes a :class:`SparseTensor`.

    Derive your own blocks from this class, to place them in :class:`tritonspconv.nn.Sequential`.
    The container gives the sparse tensor to such modules, and the features alone to all others.

    Full backward hooks get the gradients of the features, as they get the gradients of tensors in
    torch.
    """

    def register_full_backward_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call ``hook(module, grad_input, grad_output)`` once the input gradients are there."""
        return add_hook(self, hook, before=False, prepend=prepend)

    def register_full_backward_pre_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call ``hook(module, grad_output)`` before the input gradients are computed."""
        return add_hook(self, hook, before=True, prepend=prepend)


class FeatureModule(SparseModule):
    """A base that lets a torch module take sparse tensors: it changes the features, not the sites.

    List this class before the torch module among the bases. A plain tensor is treated as the torch
    module treats it.
    """

    def forward(self, input: Any) -> Any:
        """Apply the torch module to the features of a sparse tensor, or to a plain tensor."""
        if isinstance(input, SparseTensor):
            return input.replace(super().forward(input.feats))
        return super().forward(input)
