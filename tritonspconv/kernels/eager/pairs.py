"""Pair lists: the (input row, output row) pairs of a table, tap by tap (vectorised torch)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tritonspconv.kernels.eager._stable_sort import stable_sort

# Pairs of a panel for each tap, times channels. A product of few rows is slow. The products of many
# rows leave the cache before they are summed.
_ENTRIES_PER_TAP = 2**15
_FEWEST_PER_TAP, _MOST_PER_TAP = 512, 2048
# A window of fewer taps has panels as large as a window of this many.
_FEWEST_TAPS = 16


def pair_lists(
    rows: Tensor,
    mask: Tensor | None,
    order: Tensor | None,
    taps: int,
    capacity: int,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """List the pairs from ``rows`` alone, in memory of exactly their number."""
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


def list_inputs(
    rows: Tensor, mask: Tensor | None, order: Tensor | None, n_in: int, count: Tensor | None
) -> None:
    """Return None: the torch kernels multiply ``PairPanels``, not a table of one row."""


class TapPairs(NamedTuple):
    """The pairs of a table, tap by tap, in any order within a tap.

    Attributes:
        columns: int32 [P], the table's columns.
        rows: int32 [P], their entries.
        counts: Number of pairs of each tap; [V].
        identity: The tap that pairs every column with the row of the same number. The pairs of this
            tap are not listed.
    """

    columns: Tensor
    rows: Tensor
    counts: list[int]
    identity: int | None = None

    @classmethod
    def joined(cls, taps: list[tuple[Tensor, Tensor]], identity: int | None = None) -> TapPairs:
        """Join the columns and entries of every tap, of any integer dtype."""
        counts = [columns.shape[0] for columns, _ in taps]
        # Keep at least one tap, which gives the device of an empty list.
        taken = [tap for tap, _, _ in taken_taps(counts)] or [0]
        columns = torch.cat([taps[tap][0].int() for tap in taken])
        rows = torch.cat([taps[tap][1].int() for tap in taken])
        return cls(columns, rows, counts, identity)

    def swapped(self) -> TapPairs:
        """Return the pairs of the table seen from the other side."""
        return self._replace(columns=self.rows, rows=self.columns)


def taken_taps(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield each tap that has pairs, and the first and the end of its pairs in a list by tap."""
    start = 0
    for tap, count in enumerate(counts):
        if count:
            yield tap, start, start + count
            start += count


def taps_of_table(rows: Tensor) -> TapPairs:
    """List the pairs of a table [V, n]."""
    columns = [torch.nonzero(row >= 0).squeeze(1) for row in rows]
    entries = [row.index_select(0, at) for row, at in zip(rows, columns, strict=True)]
    return TapPairs.joined(list(zip(columns, entries, strict=True)))


class PairPanel(NamedTuple):
    """The pairs of some consecutive columns of a table.

    Attributes:
        rows: int32 [P], the entries, by tap.
        columns: int32 [P], their columns, counted from the table's first.
        counts: Number of pairs of each tap; [V].
        by_column: int32 [P], places in ``rows``, by column and then by tap.
        ends: int32 [columns + 1], where each column's part of ``by_column`` begins.
        is_one_each: True: every column has exactly one pair. This is the case if windows do not
            overlap.
    """

    rows: Tensor
    columns: Tensor
    counts: list[int]
    by_column: Tensor
    ends: Tensor
    is_one_each: bool


class PairPanels:
    """The pairs of a table in panels of columns; listed on first use and kept.

    The products of a panel are made tap by tap and stay in the cache until they are summed by
    column. Fewer channels therefore take larger panels. Memory: 8 bytes a pair, and for each size
    of panels 12 bytes a pair and 4 a column.

    Args:
        rows: int32 [V, n], a row or -1.
        pairs: The pairs of ``rows``; None: list them on first use.

    Attributes:
        identity: The tap whose pairs are not in the panels; see :class:`TapPairs`.
    """

    __slots__ = ("_listed", "_pairs", "_rows", "identity")

    def __init__(self, rows: Tensor, pairs: TapPairs | None = None) -> None:
        self._rows = rows
        self._pairs = pairs
        self.identity = None if pairs is None else pairs.identity
        self._listed: dict[int, list[PairPanel]] = {}

    def listed(self, channels: int) -> list[PairPanel]:
        """Return the panels for products of ``channels`` channels: all columns, in order."""
        per_tap = _pairs_per_tap(channels)
        if per_tap not in self._listed:
            if self._pairs is None:
                self._pairs = taps_of_table(self._rows)
            self._listed[per_tap] = _list_panels(self._pairs, self._rows.shape[1], per_tap)
        return self._listed[per_tap]


def largest_tap(panels: list[PairPanel]) -> int:
    """Return the largest number of pairs that a tap has in a panel."""
    return max((max(panel.counts) for panel in panels), default=0)


def _pairs_per_tap(channels: int) -> int:
    """Return a power of two: layers of similar channels then share panels."""
    wanted = min(max(_ENTRIES_PER_TAP // max(channels, 1), _FEWEST_PER_TAP), _MOST_PER_TAP)
    return 1 << wanted.bit_length() - 1


def _list_panels(pairs: TapPairs, n: int, per_tap: int) -> list[PairPanel]:
    """List the pairs of ``n`` columns in panels of about ``per_tap`` pairs of each tap."""
    if not n:
        return []
    columns, rows, counts, _ = pairs
    volume, total = len(counts), columns.shape[0]
    wanted = max(volume, _FEWEST_TAPS) * per_tap * torch.get_num_threads()
    width = max(n * wanted // max(total, 1), 1)
    starts = list(range(0, n, width))
    if len(starts) > 1:
        columns, rows, counts = _by_panel(pairs, width, len(starts))
    # In both orders, by tap and by column, panels follow each other.
    by_column = stable_sort(columns)[1].int()
    ends = torch.zeros(n + 1, dtype=torch.int32, device=columns.device)
    held = torch.bincount(columns, minlength=n)
    torch.cumsum(held, dim=0, out=ends[1:])
    is_one_each = total == n and bool((held == 1).all())
    panels, first = [], 0
    for number, start in enumerate(starts):
        taps = counts[number * volume : (number + 1) * volume]
        last = first + sum(taps)
        panel_ends = ends[start : start + width + 1] - first
        places = by_column[first:last] - first
        held_pairs = rows[first:last], columns[first:last]
        panels.append(PairPanel(*held_pairs, taps, places, panel_ends, is_one_each))
        first = last
    return panels


def _by_panel(pairs: TapPairs, width: int, panels: int) -> tuple[Tensor, Tensor, list[int]]:
    """Sort columns and entries by panel of ``width`` columns, then by tap; return counts too."""
    columns, rows, counts, _ = pairs
    volume, device = len(counts), columns.device
    if _ascend(columns, counts):
        return _cut_taps(pairs, width, panels)
    taps = torch.repeat_interleave(
        torch.arange(volume, dtype=torch.int32, device=device),
        torch.tensor(counts, device=device),
        output_size=columns.shape[0],
    )
    key = torch.div(columns, width, rounding_mode="floor").mul_(volume).add_(taps)
    order = stable_sort(key)[1]
    counts = torch.bincount(key, minlength=panels * volume).tolist()
    return columns.index_select(0, order), rows.index_select(0, order), counts


def _ascend(columns: Tensor, counts: list[int]) -> bool:
    """Return whether the columns of every tap ascend; they do if both sets of sites are sorted."""
    descends = columns[1:] < columns[:-1]
    if int(torch.count_nonzero(descends)) >= len(counts):
        return False
    starts = torch.nonzero(descends).squeeze(1).add_(1)
    return set(starts.tolist()) <= set(itertools.accumulate(counts))


def _cut_taps(pairs: TapPairs, width: int, panels: int) -> tuple[Tensor, Tensor, list[int]]:
    """Return the result of :func:`_by_panel` without a sort, if the columns of every tap ascend."""
    columns, rows, counts, _ = pairs
    ends = torch.arange(1, panels, dtype=columns.dtype, device=columns.device) * width
    sizes: list[int] = []
    for tap in columns.split(counts):
        cuts = [0, *torch.searchsorted(tap, ends).tolist(), tap.shape[0]]
        sizes += [end - start for start, end in itertools.pairwise(cuts)]
    order = [tap * panels + panel for panel in range(panels) for tap in range(len(counts))]
    columns, rows = (
        torch.cat([parts[at] for at in order])
        for parts in (columns.split(sizes), rows.split(sizes))
    )
    return columns, rows, [sizes[at] for at in order]
