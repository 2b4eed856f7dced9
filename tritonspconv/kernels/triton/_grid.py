"""Host-side helpers of the map launchers: grids, taps and indices as kernel arguments."""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from tritonspconv.kernels.index import CellGrid, SiteIndex
from tritonspconv.kernels.window import reach_steps

# In a narrow grid keys are int32, and cells and offsets stay below `_index._FAR`.
_NARROW_CELLS, _NARROW_EXTENT, _NARROW_OFFSET = 2**31, 2**30, 2**29

IntTuple = tuple[int, ...]
Offsets = tuple[IntTuple, ...]


class Taps(NamedTuple):
    """Up to 32 taps as kernel constants.

    Attributes:
        constants: Offset and limit of each on every axis, flat; see ``window.reach_steps``.
        volume: How many.
        first: Number of the first one in the window.
    """

    constants: IntTuple
    volume: int
    first: int


def _taps(steps: tuple[tuple[IntTuple, IntTuple], ...]) -> list[Taps]:
    parts = []
    for first in range(0, len(steps), 32):
        part = steps[first : first + 32]
        constants = tuple(x for offset, limit in part for x in (*offset, *limit))
        parts.append(Taps(constants, len(part), first))
    return parts


def window_taps(offsets: Offsets) -> list[Taps]:
    """Return the taps of a window, 32 at a time."""
    return _taps(tuple((offset, (1,) * len(offset)) for offset in offsets))


def window_steps(offsets: Offsets, stride: IntTuple, divide: bool) -> list[Taps]:
    """Return the steps that reach what a window reaches, 32 at a time."""
    return _taps(reach_steps(offsets, stride, divide))


@functools.lru_cache(maxsize=512)
def _seal(values: IntTuple) -> IntTuple:
    return tuple(4 * x + 2 for x in values)


def box_args(grid: CellGrid) -> tuple[IntTuple, IntTuple]:
    """Return a grid's lower corner and shape as kernel arguments, sealed; kernels ``unseal`` them.

    Sealed, Triton does not specialise on them. ``do_not_specialize`` does not reach into tuples: an
    entry that is 1 or a multiple of 16 would compile a kernel of its own, and scenes differ in
    their extents. ``4 * value + 2`` is neither.
    """
    return _seal(grid.lower), _seal(grid.shape)


@functools.lru_cache(maxsize=512)
def _is_near(offsets: Offsets) -> bool:
    return all(abs(x) < _NARROW_OFFSET for offset in offsets for x in offset)


def is_narrow(grid: CellGrid, offsets: Offsets) -> bool:
    """Return whether int32 hold the keys of ``grid``, also while taps are added to them."""
    small = grid.num_cells < _NARROW_CELLS and max(grid.shape) < _NARROW_EXTENT
    return small and _is_near(offsets)


def index_args(index: SiteIndex) -> tuple[Tensor | int | None, ...]:
    """Return an index as kernel arguments: its table, its rows, and its size.

    The size is log2 of a block's keys, or the number of sorted keys.
    """
    return index.table, index.rows, index.shift if index.kind == "blocks" else len(index.table)
