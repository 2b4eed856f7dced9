"""Pair lists: the (input row, output row) pairs of a table, tap by tap (vectorised torch)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Products of few rows are slow; rows of many pairs leave the cache before they are summed.
_PAIRS_PER_BLOCK = 8192
_PAIRS_PER_TAP = 512


def pair_lists(
    rows: Tensor, order: Tensor | None, taps: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """List the pairs of the first ``taps`` taps of a table; exactly sized, ``capacity`` unused.

    See :func:`tritonspconv.kernels.triton.pairs.pair_lists`.
    """
    n = rows.shape[1]
    flat = rows[:taps].reshape(-1)
    entry = torch.nonzero(flat >= 0).squeeze(1)
    pairs = torch.empty(2, entry.shape[0], dtype=torch.int32, device=rows.device)
    torch.index_select(flat, 0, entry, out=pairs[0])
    column = entry % max(n, 1)
    pairs[1] = column if order is None else order.index_select(0, column)
    tap_ptr = torch.zeros(taps + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum((rows[:taps] >= 0).sum(1), dim=0, out=tap_ptr[1:])
    return pairs, tap_ptr


class PairBlock(NamedTuple):
    """The pairs of some consecutive columns of a table.

    Attributes:
        rows: int32 [P], the entries, by tap and then by column.
        counts: How many of them each tap has; [V].
        by_column: int32 [P], places in ``rows``, by column and then by tap.
        ends: int32 [columns + 1], where each column's part of ``by_column`` begins.
    """

    rows: Tensor
    counts: list[int]
    by_column: Tensor
    ends: Tensor


class PairBlocks:
    """The pairs of a table in blocks of columns; listed on first use and kept.

    One block's products, made tap by tap, stay in the cache until they are summed by column.
    Memory: 8 bytes a pair and 4 a column.

    Args:
        rows: int32 [V, n], a row or -1.
    """

    __slots__ = ("_blocks", "_rows")

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._blocks: list[PairBlock] | None = None

    def __iter__(self) -> Iterator[PairBlock]:
        """Yield the blocks; together they hold every column, in order."""
        if self._blocks is None:
            self._blocks = _list_blocks(self._rows)
        return iter(self._blocks)


def _list_blocks(rows: Tensor) -> list[PairBlock]:
    volume, n = rows.shape
    pairs = max(int((rows >= 0).sum(dtype=torch.int32)), 1)
    wanted = max(_PAIRS_PER_BLOCK, _PAIRS_PER_TAP * volume) * torch.get_num_threads()
    columns = max(n * wanted // pairs, 1)
    return [_list_block(part) for part in rows.split(columns, dim=1) if n]


def _list_block(rows: Tensor) -> PairBlock:
    present = rows >= 0
    place = present.view(-1).cumsum(0, dtype=torch.int32).view(rows.shape).sub_(1)
    ends = torch.zeros(rows.shape[1] + 1, dtype=torch.int32, device=rows.device)
    torch.cumsum(present.sum(0, dtype=torch.int32), dim=0, out=ends[1:])
    return PairBlock(
        rows.masked_select(present),
        present.sum(1, dtype=torch.int32).tolist(),
        place.t().masked_select(present.t()),
        ends,
    )
