"""A table seen from its other side, made of the table alone (torch)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels.eager.pairs import PairPanels, TapPairs, taken_taps, taps_of_table
from tritonspconv.kernels.table import NeighborTable


def mask_words(rows: Tensor) -> Tensor:
    """Return int32 [ceil(V/32), n]: bit v % 32 of word v // 32 says that ``rows`` has tap v."""
    volume, n = rows.shape
    mask = torch.zeros(-(-volume // 32), n, dtype=torch.int32, device=rows.device)
    for v, present in enumerate(rows >= 0):
        bit = 1 << (v % 32)
        mask[v // 32].add_(present, alpha=bit if bit < 2**31 else -(2**31))
    return mask


def table_of(pairs: TapPairs, n: int, count: Tensor | None = None) -> NeighborTable:
    """Build the table of ``n`` columns that has these pairs; columns in the order of rows.

    The mask is None on a CPU, where no kernel reads it.
    """
    columns, entries, counts, identity = pairs
    rows = torch.full((len(counts), n), -1, dtype=torch.int32, device=columns.device)
    for tap, start, end in taken_taps(counts):
        rows[tap].index_copy_(0, columns[start:end].long(), entries[start:end])
    if identity is not None:
        torch.arange(n, dtype=torch.int32, device=rows.device, out=rows[identity])
    mask = None if rows.device.type == "cpu" else mask_words(rows)
    return NeighborTable(rows, mask, None, PairPanels(rows, pairs), real_columns=count)


def invert_table(
    rows: Tensor,
    order: Tensor | None,
    n_other: int,
    offsets: tuple[tuple[int, ...], ...],
    *,
    count: Tensor | None = None,
    other_count: Tensor | None = None,
) -> NeighborTable:
    """Swap the pairs of the table; ``offsets`` steer nothing here, and padding has no pairs."""
    pairs = taps_of_table(rows)
    if order is not None:
        pairs = pairs._replace(columns=order.index_select(0, pairs.columns))
    return table_of(pairs.swapped(), n_other, other_count)
