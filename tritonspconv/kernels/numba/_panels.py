"""The pairs of a table, listed by panel of columns and by tap."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tritonspconv.kernels.numba._compile import compiled
from tritonspconv.kernels.numba._threads import in_ranges

# Columns of a panel. The sums of 512 columns stay in the second cache up to 256 channels. In these
# columns a tap of a LiDAR sweep has some 150 pairs, so the tap's matrix is read once for 150
# products.
WIDTH = 512
# The lists of a tap in a panel are filled up to a multiple of this, so that tiles are whole.
GROUP = 8
_FEWEST_PANELS = 16


class PanelPairs(NamedTuple):
    """Pairs by panel, then by tap; the list of tap v in panel p is number ``p * V + v``.

    Lists are filled up with pairs of column ``width``, which no panel has, and a row that exists.

    Attributes:
        starts: int64 [panels * V + 1], where each list begins, a multiple of ``GROUP``.
        counts: int64 [panels * V], the pairs of each list without those that fill it up.
        columns: int32 [P], columns, counted from the first one of their panel.
        rows: int32 [P], the entries.
        volume: V.
        width: Columns of a panel; the last one may have fewer.
    """

    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    columns: NDArray[np.int32]
    rows: NDArray[np.int32]
    volume: int
    width: int

    @property
    def panels(self) -> int:
        """Number of panels."""
        return self.counts.shape[0] // max(self.volume, 1)


class TapPanels:
    """The pairs of a table in panels of columns: listed on first use, and from then on the table.

    Args:
        rows: int32 [V, n], a row or -1.
        count: int64 [], number of real columns, which come first; None: all. The others have -1.

    Attributes:
        num_columns: n.
    """

    __slots__ = ("_count", "_listed", "_rows", "num_columns")

    def __init__(self, rows: Tensor, count: Tensor | None = None) -> None:
        self.num_columns = rows.shape[1]
        self._rows: Tensor | None = rows
        self._count = count
        self._listed: PanelPairs | None = None

    def listed(self) -> PanelPairs:
        """Return the pairs of all real columns; 8 bytes a pair and 16 a list."""
        if self._listed is None:
            n = self.num_columns if self._count is None else int(self._count)
            self._listed = list_pairs(self.rows().contiguous(), n, WIDTH)
            self._rows = None
        return self._listed

    def rows(self) -> Tensor:
        """Return the table int32 [V, n], written again from the pairs once they are listed."""
        if self._rows is not None:
            return self._rows
        pairs = self.listed()
        rows = torch.full((pairs.volume, self.num_columns), -1, dtype=torch.int32)
        table = rows.numpy()
        in_ranges(lambda a, b: _fill_table(a, b, *pairs, table), pairs.panels, _FEWEST_PANELS)
        return rows

    @property
    def num_bytes(self) -> int:
        """Memory of the table or of the lists, in bytes."""
        if self._rows is not None:
            return self._rows.untyped_storage().nbytes()
        starts, counts, columns, rows, _, _ = self.listed()
        return starts.nbytes + counts.nbytes + columns.nbytes + rows.nbytes


def list_pairs(rows: Tensor, n: int, width: int) -> PanelPairs:
    """List the pairs of the first ``n`` columns of ``rows`` [V, at least n], contiguous."""
    table = rows.numpy()
    volume, panels = rows.shape[0], -(-n // width)
    counts = np.empty(panels * volume, np.int64)
    in_ranges(lambda a, b: _count_pairs(table, n, width, a, b, counts), panels, _FEWEST_PANELS)
    starts = np.zeros(panels * volume + 1, np.int64)
    np.cumsum((counts + (GROUP - 1)) // GROUP * GROUP, out=starts[1:])
    columns, entries = (rows.new_empty(int(starts[-1])).numpy() for _ in range(2))
    in_ranges(
        lambda a, b: _fill_lists(table, width, a, b, starts, counts, columns, entries),
        panels,
        _FEWEST_PANELS,
    )
    return PanelPairs(starts, counts, columns, entries, volume, width)


@compiled
def _count_pairs(table, n, width, first, last, counts):
    """Count the entries of each list of the panels from ``first`` to ``last``."""
    volume = table.shape[0]
    for panel in range(first, last):
        for tap in range(volume):
            held = np.int32(0)
            for row in table[tap, panel * width : min((panel + 1) * width, n)]:
                held += np.int32(row >= 0)
            counts[panel * volume + tap] = held


@compiled
def _fill_lists(table, width, first, last, starts, counts, columns, rows):
    """Write the lists of the panels from ``first`` to ``last``.

    Every entry is written, and the place advances only if the entry is a pair, so no branch is
    mispredicted. Unsigned numbers need no check for negative indices, which makes the loop twice as
    fast.
    """
    volume = table.shape[0]
    for number in range(first * volume, last * volume):
        line = table[number % volume, number // volume * width :]
        listed = slice(starts[number], starts[number + 1])
        to_columns, to_rows, held = columns[listed], rows[listed], counts[number]
        place = column = np.uint64(0)
        while place < np.uint64(held):
            row = line[column]
            to_columns[place] = column
            to_rows[place] = row
            place += np.uint64(row >= 0)
            column += np.uint64(1)
        for filled in range(held, len(to_rows)):
            to_columns[filled] = width
            to_rows[filled] = to_rows[held - 1]


@compiled
def _fill_table(first, last, starts, counts, columns, rows, volume, width, table):
    """Write the entries of the panels from ``first`` to ``last``; the table holds -1 before."""
    for number in range(first * volume, last * volume):
        line = table[number % volume, number // volume * width :]
        for pair in range(starts[number], starts[number] + counts[number]):
            line[columns[pair]] = rows[pair]
