"""A search for the fine rows around every coarse row, run of taps by run of taps.

Both sides are sorted by key. The keys count cells of a larger grid, with room beside the fine one;
see ``eager/_row_search.py``. In this larger grid the key of a neighbour is the row's own key plus a
constant. The keys of the searching rows ascend, so the keys of their neighbours ascend too. Each
run of taps therefore needs a single pass through both sorted lists, for any grid.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tritonspconv.kernels.eager._row_search import MAX_LONG, roomy_extents
from tritonspconv.kernels.index import CellGrid, SiteIndex
from tritonspconv.kernels.numba._compile import compiled
from tritonspconv.kernels.numba._sorted_keys import box_of
from tritonspconv.kernels.numba._threads import in_ranges
from tritonspconv.kernels.window import IntTuple

# A run may hold a few offsets without a tap; this is faster than two runs.
_WIDEST_STEP = 4
_LEAST_ROWS = 4096


class Runs(NamedTuple):
    """The taps of a window in runs: offsets that follow each other along the last axis.

    Attributes:
        offsets: int64 [R, D], where each run begins.
        ends: int64 [R + 1], where the places of each run begin; a run has a place for each offset.
        taps: int64 [places, 2]: the tap through which the searching row sees the row that it finds,
            and the tap through which the found row sees the searching row; -1: none.
    """

    offsets: NDArray[np.int64]
    ends: NDArray[np.int64]
    taps: NDArray[np.int64]


@functools.lru_cache(maxsize=512)
def mirrored_runs(offsets: tuple[IntTuple, ...]) -> Runs:
    """Return the runs of a submanifold window without its centre.

    One of two opposite taps is searched; the other one has the same pairs, swapped. Taps at one
    offset, and the taps opposite to them, are searched one by one.
    """
    taps = {offset: v for v, offset in enumerate(offsets)}
    held, zero = Counter(offsets), (0,) * len(offsets[0])
    wanted = []
    for v, offset in enumerate(offsets):
        mirror = tuple(-x for x in offset)
        opposite = taps.get(mirror, -1) if held[offset] == held[mirror] == 1 else -1
        if offset < zero or (offset > zero and opposite < 0):
            wanted.append((offset, v, opposite))
    return _runs(wanted, len(zero))


@functools.lru_cache(maxsize=512)
def plain_runs(offsets: tuple[IntTuple, ...], finder_is_column: bool) -> Runs:
    """Return the runs of a window whose columns are the searching rows, or the rows they find."""
    if finder_is_column:
        wanted = [(offset, v, -1) for v, offset in enumerate(offsets)]
    else:
        wanted = [(offset, -1, v) for v, offset in enumerate(offsets)]
    return _runs(wanted, len(offsets[0]))


def _runs(wanted: Iterable[tuple[IntTuple, int, int]], ndim: int) -> Runs:
    """Cut (offset, tap, opposite tap) of each tap into runs."""
    begins, ends, taps = [], [0], []
    last: IntTuple | None = None
    for offset, *both in sorted(wanted):
        step = offset[-1] - last[-1] if last and offset[:-1] == last[:-1] else 0
        if 0 < step <= _WIDEST_STEP:
            taps += [[-1, -1]] * (step - 1)
        else:
            ends.append(len(taps))
            begins.append(offset)
        taps.append(both)
        last = offset
    return Runs(
        np.array(begins, np.int64).reshape(-1, ndim),
        np.array([*ends[1:], len(taps)], np.int64),
        np.array(taps, np.int64).reshape(-1, 2),
    )


class Sites(NamedTuple):
    """Distinct sites, ascending by key.

    Attributes:
        keys: int64 [M + 1], keys of the larger grid, and a last one that no search reaches.
        rows: int32 [M].
    """

    keys: NDArray[np.int64]
    rows: NDArray[np.int32]


class RoomyGrid(NamedTuple):
    """A fine grid with room at its upper ends for all cells that a window can reach.

    Attributes:
        lower: int64 [D], the smallest fine coordinates.
        extents: int64 [D], with the room.
        units: int64 [D], how much the key grows with each coordinate.
    """

    lower: NDArray[np.int64]
    extents: NDArray[np.int64]
    units: NDArray[np.int64]


@functools.lru_cache(maxsize=512)
def roomy_grid(
    coarse_grid: CellGrid, stride: IntTuple, offsets: tuple[IntTuple, ...], fine_grid: CellGrid
) -> RoomyGrid | None:
    """Return the larger grid; None if an int64 cannot number its cells."""
    corners = _corners(offsets)
    extents = roomy_extents(coarse_grid, stride, corners, fine_grid)
    units = [math.prod(extents[axis + 1 :]) for axis in range(len(extents))]
    cells = max(coarse_grid.batch_size, fine_grid.batch_size) * math.prod(extents)
    furthest = (max(map(abs, ends)) for ends in zip(*corners, strict=True))
    reach = sum(offset * unit for offset, unit in zip(furthest, units, strict=True))
    if cells + reach > MAX_LONG:
        return None
    return RoomyGrid(*(np.array(each, np.int64) for each in (fine_grid.lower, extents, units)))


@functools.lru_cache(maxsize=512)
def _corners(offsets: tuple[IntTuple, ...]) -> tuple[IntTuple, IntTuple]:
    """Return the smallest and the largest offset on every axis."""
    axes = list(zip(*offsets, strict=True))
    return tuple(map(min, axes)), tuple(map(max, axes))


def sites_in(roomy: RoomyGrid, index: SiteIndex, grid: CellGrid, stride: IntTuple) -> Sites:
    """Return the sites of a sorted index, numbered as the cells ``stride * site``.

    Rows outside the grid are left out. If several rows share a cell, the lowest row is the site.
    """
    assert index.rows is not None, "a sorted index has rows"
    n = index.table.shape[0]
    keys, rows = np.empty(n + 1, np.int64), np.empty(n, np.int32)
    count = _number_sites(
        index.table.numpy(), index.rows.numpy(), grid.num_cells, *box_of(grid), np.array(stride),
        roomy.lower, roomy.extents, keys, rows,
    )  # fmt: skip
    keys[count] = np.iinfo(np.int64).max
    return Sites(keys[: count + 1], rows[:count])


@compiled
def _number_sites(
    table, table_rows, num_cells, lower, shape, stride, fine_lower, extents, keys, rows
):
    """Write keys of the larger grid, and rows; return their number."""
    last = shape.shape[0] - 1
    count = 0
    before = line = base = np.int64(-1)
    for i in range(table.shape[0]):
        key = table[i]
        if key >= num_cells:
            break
        if key == before:
            continue
        before = key
        if line < 0 or key >= line + shape[last]:
            # Keys of one line share all coordinates but the last.
            rest = key // shape[last]
            line = rest * shape[last]
            base, unit = np.int64(0), extents[last]
            for axis in range(last - 1, -1, -1):
                quotient = rest // shape[axis]
                cell = rest - quotient * shape[axis] + lower[axis]
                base += (cell * stride[axis] - fine_lower[axis]) * unit
                unit *= extents[axis]
                rest = quotient
            base += rest * unit + lower[last] * stride[last] - fine_lower[last]
        keys[count] = base + (key - line) * stride[last]
        rows[count] = table_rows[i]
        count += 1
    return count


def search(
    finders: Sites, found: Sites, roomy: RoomyGrid, runs: Runs, table: NDArray[np.int32]
) -> None:
    """Write the pairs of ``finders`` and ``found`` that ``runs`` describe to ``table`` [V, n]."""
    steps = runs.offsets @ roomy.units

    def work(start: int, end: int) -> None:
        _walk(*finders, start, end, *found, steps, runs.ends, runs.taps, table)

    in_ranges(work, finders.rows.shape[0], _LEAST_ROWS)


@compiled
def _walk(finder_keys, finder_rows, start, end, keys, rows, steps, ends, taps, table):
    """Search for the finders from ``start`` to ``end``.

    No two finders write one entry, so ranges may be walked at the same time.
    """
    if start == end:
        return
    one = np.uint64(1)
    for run in range(steps.shape[0]):
        step, through = steps[run], taps[ends[run] : ends[run + 1]]
        # Unsigned numbers need no check for negative indices, which saves a quarter of the time.
        at = np.uint64(_first_from(keys, finder_keys[start] + step))
        for i in range(start, end):
            wanted = finder_keys[i] + step
            while keys[at] < wanted:
                at += one
            place = at
            while keys[place] < wanted + through.shape[0]:
                row, other = np.uint64(finder_rows[i]), np.uint64(rows[place])
                tap, opposite = through[np.uint64(keys[place] - wanted)]
                if tap >= 0:
                    table[np.uint64(tap), row] = other
                if opposite >= 0:
                    table[np.uint64(opposite), other] = row
                place += one


@compiled
def _first_from(keys, wanted):
    """Return the place of the first of ``keys`` that is not below ``wanted``."""
    first, last = 0, keys.shape[0] - 1
    while first < last:
        middle = (first + last) >> 1
        if keys[middle] < wanted:
            first = middle + 1
        else:
            last = middle
    return first
