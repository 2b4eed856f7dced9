"""Modules that fork a SparseConvTensor into a list, or join a list of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compat.spconv._names import module_getattr
from compat.spconv.pytorch._errors import SpconvError
from compat.spconv.pytorch.core import SparseConvTensor
from compat.spconv.pytorch.functional import sparse_add
from compat.spconv.pytorch.modules import SparseModule
from tritonspconv.guide import more

__getattr__ = module_getattr(__name__, modules={"F": "compat.spconv.pytorch.functional"})


class _Join(SparseModule):
    """A module that makes one tensor of several."""

    def input_spatial_size(self, out_size: Any) -> Any:
        """Return ``out_size``: the module changes no size."""
        return out_size


class JoinTable(_Join):
    """Concatenate the channels of tensors over the same rows."""

    def forward(self, input: Sequence[SparseConvTensor]) -> SparseConvTensor:
        """Return item 0's sites and ``indice_dict`` with the channels of all items."""
        _check_rows(self, input, same_channels=False)
        return _join(input, torch.cat([item.features for item in input], dim=1))


class AddTable(_Join):
    """Add tensors over the same rows."""

    def forward(self, input: Sequence[SparseConvTensor]) -> SparseConvTensor:
        """Return item 0's sites and ``indice_dict`` with the sum of all features."""
        _check_rows(self, input, same_channels=True)
        total = input[0].features
        for item in input[1:]:
            total = total + item.features
        return _join(input, total)


class AddTableMisaligned(_Join):
    """Add tensors over different sites: the union of them."""

    def forward(self, input: Sequence[SparseConvTensor]) -> SparseConvTensor:
        """Return ``functional.sparse_add`` of all items."""
        return sparse_add(*input)


class ConcatTable(SparseModule):
    """Apply several modules to one input."""

    def forward(self, input: Any) -> list[Any]:
        """Return the results as a list."""
        return [module(input) for module in self._modules.values()]  # pyright: ignore

    def add(self, module: nn.Module) -> ConcatTable:
        """Append a module; returns the table."""
        self.add_module(str(len(self._modules)), module)
        return self

    def input_spatial_size(self, out_size: Any) -> Any:
        """Return the result of the first module."""
        return self._modules["0"].input_spatial_size(out_size)  # pyright: ignore


def _join(items: Sequence[SparseConvTensor], features: torch.Tensor) -> SparseConvTensor:
    out = items[0]._derive(features)
    last = items[min(1, len(items) - 1)]
    out.benchmark = last.benchmark
    out.benchmark_record = last.benchmark_record
    return out


def _check_rows(
    table: SparseModule, items: Sequence[SparseConvTensor], *, same_channels: bool
) -> None:
    """Check that the items can share rows; coordinates are trusted."""

    def describe(item: SparseConvTensor) -> tuple[Any, ...]:
        shape = tuple(item.features.shape) if same_channels else item.features.shape[0]
        return item.spatial_shape, item.batch_size, shape, item.indices.shape[0]

    first = describe(items[0])
    for item in items[1:]:
        if describe(item) != first:
            raise SpconvError(
                f"{type(table).__name__} needs tensors over the same rows: expected (spatial "
                f"shape, batch size, features, indices) {first}, got {describe(item)}. Use "
                "AddTableMisaligned for tensors over different sites." + more("same-sites")
            )
