"""Layers that change the sites of a tensor."""

from __future__ import annotations

import torch

from compat.spconv._names import module_getattr
from compat.spconv.pytorch.core import SparseConvTensor
from compat.spconv.pytorch.modules import SparseModule
from tritonspconv.coords import Grid

__all__ = ["RemoveDuplicate"]

__getattr__ = module_getattr(__name__, modules={"spconv": "compat.spconv.pytorch"})


class RemoveDuplicate(SparseModule):
    """Keep one row per site: the first.

    Rows ascend by (batch, coordinates); rows outside the grid are dropped. ``indice_dict`` is
    empty. The input does not change. This call waits for the device. Differentiable.
    """

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Return ``x`` without repeated sites."""
        shape = tuple(x.spatial_shape)
        keys = Grid((0,) * len(shape), shape, int(x.batch_size)).keys(x.indices)
        ordered, rows = torch.sort(keys, stable=True)
        kept = ordered >= 0
        kept[1:] &= ordered[1:] != ordered[:-1]
        rows = rows[kept]
        return SparseConvTensor(
            x.features[rows], x.indices[rows], list(shape), x.batch_size, x.grid
        )
