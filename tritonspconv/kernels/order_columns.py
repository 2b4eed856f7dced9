"""Order the columns of a table, so that rows with similar masks are side by side."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from tritonspconv.kernels import has_triton

if TYPE_CHECKING:
    from tritonspconv.kernels.table import NeighborTable
    from tritonspconv.kernels.window import IntTuple

# Ordered columns save a layer more time, the more columns, taps and channels it has; with the
# channels the gain grows less than in proportion. If the product is at least this large, ordering
# saves a layer some 20 us.
_MIN_WORK = 2**30


def pays_to_order(table: NeighborTable, volume: int, c_in: int, c_out: int) -> bool:
    """Return whether a layer saves more than it takes to order the columns of its table.

    Args:
        table: The table. A table that has an order stays as it is. A table of the torch kernels
            stays as it is too, because these kernels skip no taps.
        volume: V, the window's taps.
        c_in: Input channels of the layer.
        c_out: Output channels of the layer.
    """
    if table.order is not None or table.panels is not None or not 1 < volume <= 32:
        return False
    return table.rows.shape[1] * volume * (c_in * c_out) ** 0.75 >= _MIN_WORK


def order_columns(table: NeighborTable, offsets: tuple[IntTuple, ...]) -> NeighborTable:
    """Return ``table`` with columns of similar masks side by side.

    Args:
        table: A table without an order, of at most 32 taps.
        offsets: V tap offsets, which steer the order.
    """
    assert table.mask is not None, "the Triton kernels make a mask with every table"
    rows, mask, order = _back_end(table.rows.device).order_columns(
        table.rows, table.mask, offsets, table.real_columns
    )
    return table._replace(kept_rows=rows, mask=mask, order=order)


@functools.lru_cache(maxsize=1024)
def _back_end(device: torch.device):
    if has_triton(device):
        from tritonspconv.kernels.triton import order_columns as back_end
    else:
        from tritonspconv.kernels.eager import order_columns as back_end
    return back_end
