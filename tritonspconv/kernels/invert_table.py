"""A table seen from its other side, made of the table alone."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspconv.kernels import has_numba, has_triton_maps

if TYPE_CHECKING:
    from jaxtyping import Int32, Int64

    from tritonspconv.kernels.table import NeighborTable
    from tritonspconv.kernels.window import IntTuple


def invert_table(
    rows: Int32[Tensor, "V n"],
    order: Int32[Tensor, "n"] | None,
    n_other: int,
    offsets: tuple[IntTuple, ...],
    *,
    count: Int64[Tensor, ""] | None = None,
    other_count: Int64[Tensor, ""] | None = None,
) -> NeighborTable:
    """Build the table of the other side.

    Args:
        rows: int32 [V, n], entries below ``n_other`` or -1.
        order: int32 [n], the row of each column; None: column c is row c.
        n_other: Rows of the other side.
        offsets: V tap offsets, which only steer the order of columns.
        count: int64 [], number of real columns; None: all.
        other_count: The same for the other side.
    """
    return _back_end(rows.device, len(offsets[0])).invert_table(
        rows, order, n_other, offsets, count=count, other_count=other_count
    )


@functools.lru_cache(maxsize=1024)
def _back_end(device: torch.device, ndim: int):
    if has_triton_maps(device, ndim):
        from tritonspconv.kernels.triton import invert_table as back_end
    elif has_numba(device):
        from tritonspconv.kernels.numba import invert_table as back_end
    else:
        from tritonspconv.kernels.eager import invert_table as back_end
    return back_end
