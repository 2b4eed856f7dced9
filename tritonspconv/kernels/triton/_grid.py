"""Grids, taps and indices as arguments of the map kernels (host side)."""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from tritonspconv.kernels.index import CellGrid, SiteIndex
from tritonspconv.kernels.window import Window, reach_steps, window_corner

# In a narrow grid keys are int32, and fine cells and windows stay below `_index._FAR`.
_NARROW_CELLS, _NARROW_EXTENT, _NARROW_WINDOW = 2**31, 2**30, 2**29
# A loop over planes or lines is faster from this many taps in a plane and in a line on.
_MIN_PLANE, _MIN_LINE = 5, 3

IntTuple = tuple[int, ...]
Offsets = tuple[IntTuple, ...]
Steps = tuple[tuple[IntTuple, IntTuple], ...]


class Taps(NamedTuple):
    """Taps as kernel constants: one line of up to 32, and the steps to the other lines.

    All lines are equal, and so are all planes. The taps of line i lie ``i // lines_in_plane`` plane
    steps and ``i % lines_in_plane`` line steps away from the taps of the first line. Up to 32 taps
    that do not repeat are one line.

    Taps count from the window's corner, which is a run-time argument, so windows that differ only
    in padding share kernels.

    Attributes:
        constants: Offset and limit of each tap of the first line on every axis, flat; see
            ``window.reach_steps``.
        volume: Number of taps of a line.
        lines: Number of lines, in all planes together.
        lines_in_plane: Number of lines of a plane.
        line_step: Offset of a line from the one before in its plane, on every axis.
        plane_step: Offset of a plane from the one before, on every axis.
        first: Number of the first tap in the window.
    """

    constants: IntTuple
    volume: int
    lines: int
    lines_in_plane: int
    line_step: IntTuple
    plane_step: IntTuple
    first: int

    @property
    def window(self) -> tuple[IntTuple, int, int, int, IntTuple, IntTuple]:
        """All but ``first``, in their order: a constant of a kernel."""
        return self[:-1]


def _taps(steps: Steps, corner: IntTuple, first: int, in_lines: bool) -> Taps:
    taps = [(_minus(offset, corner), limit) for offset, limit in steps]
    plane = taps[: _period(taps, _MIN_PLANE)] if in_lines else taps
    # A window of one plane stays one plane.
    line = plane[: _period(plane, _MIN_LINE)] if len(plane) < len(taps) else plane
    return Taps(
        tuple(x for offset, limit in line for x in (*offset, *limit)),
        volume=len(line),
        lines=len(taps) // len(line),
        lines_in_plane=len(plane) // len(line),
        line_step=_step(plane, len(line)),
        plane_step=_step(taps, len(plane)),
        first=first,
    )


def _split(steps: Steps, corner: IntTuple, in_lines: bool) -> list[Taps]:
    return [
        _taps(steps[first : first + 32], corner, first, in_lines)
        for first in range(0, len(steps), 32)
    ]


def _minus(a: IntTuple, b: IntTuple) -> IntTuple:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def _period(taps: list[tuple[IntTuple, IntTuple]], least: int) -> int:
    """Return the number of taps after which they repeat, moved by a step; else all of them."""
    for period in range(least, len(taps)):
        pairs = list(zip(taps, taps[period:], strict=False))
        repeats = {(_minus(b, a), near == far) for (a, near), (b, far) in pairs}
        if len(taps) % period == 0 and len(repeats) == 1 and all(same for _, same in repeats):
            return period
    return len(taps)


def _step(taps: list[tuple[IntTuple, IntTuple]], period: int) -> IntTuple:
    """Return the offset between taps that lie a period apart; zeros if there are no such taps."""
    start = taps[0][0]
    return _minus(taps[period][0], start) if period < len(taps) else (0,) * len(start)


def window_taps(offsets: Offsets) -> list[Taps]:
    """Return the taps of a window: in equal lines if there are any, else 32 at a time.

    A kernel loops over the lines and so compiles several times faster: one pass of Triton takes
    time with the cube of the taps in a loop's body.
    """
    steps = tuple((offset, (1,) * len(offset)) for offset in offsets)
    corner = window_corner(offsets)
    whole = _taps(steps, corner, 0, in_lines=True)
    return [whole] if whole.volume <= 32 else _split(steps, corner, in_lines=True)


def window_steps(offsets: Window, stride: IntTuple, divide: bool) -> list[Taps]:
    """Return the steps that reach the same cells as a window, 32 at a time."""
    return _split(reach_steps(offsets, stride, divide), window_corner(offsets), in_lines=False)


@functools.lru_cache(maxsize=512)
def _seal(values: IntTuple) -> IntTuple:
    return tuple(4 * x + 2 for x in values)


def seal_grid(grid: CellGrid) -> IntTuple:
    """Return a grid's lower corner and shape as one sealed kernel argument; kernels ``unseal`` it.

    Triton specialises on an entry of a tuple that is 1 or a multiple of 16, whether or not the
    tuple is in ``do_not_specialize``. Unsealed extents would therefore make Triton compile the
    kernels again for some scenes. A sealed value, ``4 * value + 2``, is neither 1 nor such a
    multiple.
    """
    return _seal((*grid.lower, *grid.shape))


def box_args(grid: CellGrid, own_grid: CellGrid, offsets: Window) -> tuple[int, IntTuple]:
    """Return the two kernel arguments that place a window: the batch size, and the box.

    The box is a flat, sealed tuple. For each axis it has, in this order: lower corner and shape of
    the grid that the taps lead to, lower corner and shape of the rows' own grid, and the window's
    corner.
    """
    batch_size = min(grid.batch_size, own_grid.batch_size)
    return batch_size, _sealed_box(grid, own_grid, window_corner(offsets))


def _sealed_box(grid: CellGrid, own_grid: CellGrid, corner: IntTuple) -> IntTuple:
    return _seal((*grid.lower, *grid.shape, *own_grid.lower, *own_grid.shape, *corner))


@functools.lru_cache(maxsize=512)
def _is_small(offsets: Window) -> bool:
    return all(max(axis) - min(axis) < _NARROW_WINDOW for axis in zip(*offsets, strict=True))


def is_narrow(grid: CellGrid, offsets: Window, stride: IntTuple) -> bool:
    """Return whether an int32 holds every key of ``grid``, also while a tap is added to it.

    The stride counts because a kernel also divides fine cells that lead to a coarse grid.
    """
    fine = max(grid.shape) * max(stride)
    return grid.num_cells < _NARROW_CELLS and fine < _NARROW_EXTENT and _is_small(offsets)


def index_args(index: SiteIndex, unused: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return an index as kernel arguments: its table, its rows, and its size.

    The size is log2 of a page's keys, or the number of sorted keys. ``unused`` stands in for the
    rows of an index that has none, so that all indices have arguments of the same types: Triton 3.6
    may have a C compiler make a launcher for each list of types.
    """
    rows = unused if index.rows is None else index.rows
    return index.table, rows, index.shift if index.kind == "pages" else index.table.shape[0]
