"""The table of the other side, made from a table alone (numba)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels.numba._compile import compiled
from tritonspconv.kernels.numba._panels import TapPanels
from tritonspconv.kernels.numba._threads import in_ranges
from tritonspconv.kernels.table import NeighborTable
from tritonspconv.kernels.window import IntTuple


def table_of(rows: Tensor, count: Tensor | None = None) -> NeighborTable:
    """Return the table of ``rows`` int32 [V, n], whose first ``count`` columns are real."""
    return NeighborTable(None, None, None, TapPanels(rows, count), real_columns=count)


def invert_table(
    rows: Tensor,
    order: Tensor | None,
    n_other: int,
    offsets: tuple[IntTuple, ...],
    *,
    count: Tensor | None = None,
    other_count: Tensor | None = None,
) -> NeighborTable:
    """Write the number of each column to the rows that it names; padding columns name none."""
    volume, n = rows.shape
    inverse = rows.new_full((volume, n_other), -1)
    columns = torch.arange(n, dtype=torch.int32, device=rows.device) if order is None else order
    operands = rows.contiguous().numpy(), columns.numpy(), inverse.numpy()
    in_ranges(lambda first, last: _invert(*operands, first, last), volume, 4)
    return table_of(inverse, other_count)


@compiled
def _invert(rows, columns, inverse, first, last):
    """Invert the taps from ``first`` to ``last``."""
    for tap in range(first, last):
        for column in range(columns.shape[0]):
            row = rows[tap, column]
            if row >= 0:
                inverse[tap, row] = columns[column]
