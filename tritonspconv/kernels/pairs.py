"""Pair lists: the (input row, output row) pairs of a table, tap by tap."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspconv.kernels import has_triton
from tritonspconv.kernels.table import NeighborTable, PairList

if TYPE_CHECKING:
    from jaxtyping import Int64


def pair_lists(table: NeighborTable, taps: int, capacity: int, mirrored: bool) -> PairList:
    """List the pairs of the first ``taps`` taps of a table.

    Args:
        table: The table of the outputs.
        taps: Taps to list: V, or ceil(V/2) of a mirrored map.
        capacity: An upper bound of the number of pairs.
        mirrored: True: the list also describes the other taps; see :class:`PairList`.

    Returns:
        The list. Its first ``tap_ptr[-1]`` columns are written. The host does not wait for a GPU.
    """
    rows, mask, order, count = table.rows, table.mask, table.order, table.real_columns
    pairs, tap_ptr = _back_end(rows.device).pair_lists(rows, mask, order, taps, capacity, count)
    return PairList(pairs, tap_ptr, mirrored)


def list_inputs(
    table: NeighborTable, n_in: int, in_count: Int64[Tensor, ""] | None = None
) -> tuple[PairList, NeighborTable] | None:
    """List the pairs of a table that names no input twice; they are also the table of the inputs.

    That table has one row of entries, because a column has one entry at most.

    Args:
        table: The table of the outputs.
        n_in: Number of inputs.
        in_count: int64 [], how many of them are real; None: all.

    Returns:
        The pairs; and the table of the inputs, of rows [1, n_in], whose last columns are inputs
        without an output. Rows and order lie in the pairs' memory. The host does not wait for the
        device. None on a CPU, whose kernels read panels of the table itself.
    """
    rows, mask, order, count = table.kept_rows, table.mask, table.order, table.real_columns
    if rows is None:  # do not write the rows again for nothing
        return None
    found = _back_end(rows.device).list_inputs(rows, mask, order, n_in, count)
    if found is None:
        return None
    pairs, tap_ptr, in_table = found
    return PairList(pairs, tap_ptr, False), in_table._replace(real_columns=in_count)


@functools.lru_cache(maxsize=1024)
def _back_end(device: torch.device):
    if has_triton(device):
        from tritonspconv.kernels.triton import pairs as back_end
    else:
        from tritonspconv.kernels.eager import pairs as back_end
    return back_end
