"""Convolution of rows that share sites, with the pairs that spconv lists."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv import ops
from tritonspconv.coords import ActiveSites
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import kernel_map
from tritonspconv.ops.conv import Precision


class RepeatedSites:
    """Rows that may share cells, such as image points in a voxel.

    The engine's maps list the first row of each cell only. spconv lists every row. In a strided or
    transposed layer the rows of a cell add up. In an inverse layer all of them get the result.

    For a submanifold window, spconv looks up the neighbours of every row through the first half of
    the taps. It finds the first row of a cell there. For the second half it swaps these pairs.
    Through the second half of the taps, every row therefore reads the first rows of its neighbours.
    Through the first half, the first row of a cell reads all rows of its neighbours, and the other
    rows of the cell read nothing. Each row sees itself.

    Args:
        sites: All rows.

    Attributes:
        first: The first row of each cell, int64 ``[U]``, ascending.
        cell: The number of each row's cell among them, int64 ``[N]``; -1 outside the grid.
        distinct: The sites of the first rows.
    """

    def __init__(self, sites: ActiveSites) -> None:
        first_of_row = sites.rows_of(sites.coords)
        rows = torch.arange(sites.num_rows, device=sites.device)
        is_first = first_of_row == rows
        self.first = rows[is_first]
        numbers = is_first.cumsum(0) - 1
        self.cell = torch.where(first_of_row >= 0, numbers[first_of_row], -1)
        self.distinct = ActiveSites(sites.coords[self.first], sites.grid)

    def add_up(self, features: Tensor) -> Tensor:
        """Return ``features [N, C]`` with the sum of each cell in its first row."""
        return features.index_put((self.first,), self._sums(features))

    def spread(self, features: Tensor) -> Tensor:
        """Copy the first row of each cell to all rows of the cell; ``features [N, C]``."""
        return self._to_rows(features[self.first])

    def convolve_submanifold(
        self, features: Tensor, matrices: Tensor, geometry: ConvGeometry, precision: Precision
    ) -> Tensor:
        """Convolve, without bias; deterministic and differentiable.

        Args:
            features: ``[N, in]``.
            matrices: Matrices of the taps, ``[V, in, out]``.
            geometry: A submanifold window.
            precision: See :func:`tritonspconv.ops.sparse_conv`.

        Returns:
            ``[N, out]``.
        """
        found = kernel_map(self.distinct, geometry)
        taps = torch.arange(len(matrices), device=matrices.device)[:, None, None]
        centre = len(matrices) // 2
        later, earlier = (torch.where(half, matrices, 0) for half in (taps > centre, taps < centre))
        to_all = ops.sparse_conv(features[self.first], later, found, precision=precision)
        to_first = ops.sparse_conv(self._sums(features), earlier, found, precision=precision)
        out = ops.pointwise_conv(features, matrices[centre]) + self._to_rows(to_all)
        return out.index_put((self.first,), to_first, accumulate=True)

    def _sums(self, features: Tensor) -> Tensor:
        return ops.global_pool(features, self.cell, len(self.first), "sum")

    def _to_rows(self, features: Tensor) -> Tensor:
        return ops.global_broadcast(features, self.cell)
