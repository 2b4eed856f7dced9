"""Sites and tables in torch operations of fixed shapes; the host reads no values.

Every function here can be recorded: it sorts, searches and gathers, and the shapes of its results
follow from the shapes of its arguments. A kernel loops over axes and taps; these functions use few
operations on larger tensors instead, because export and compilation take time for each operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tritonspconv.coords import Grid
from tritonspconv.kernels.window import Window, reach_steps

IntTuple = tuple[int, ...]

# The key of no site, and of padding; it comes last in order.
_LAST = 2**63 - 1
# This key is so small that no tap can turn it into the key of a site.
_NEVER = -(2**62)
# Cells beside the grid on every axis. Windows that reach no further find no wrong key.
_ROOM = 16
_MAX_CELLS = 2**61


class RoomyKeys:
    """Keys of the cells of a grid, and of cells beside it, so that a tap adds a constant to a key.

    The room at the upper end of an axis serves both ends. A cell below the lower end has the key of
    a cell in the room of the line before it, and this room has no sites. Keys ascend in the same
    order as the keys of the grid.

    Args:
        grid: The grid.

    Raises:
        ValueError: There are too many cells for int64 keys.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        extents = [extent + _ROOM for extent in grid.shape]
        self._extents = [max(grid.batch_size, 1), *extents]
        # The steps of a key: one for the batch index and one for each coordinate.
        self._units = [math.prod(extents[axis:]) for axis in range(len(extents) + 1)]
        self._lower = [0, *grid.lower]
        self._upper = [grid.batch_size - 1, *grid.upper]
        if math.prod(self._extents) > _MAX_CELLS:
            raise ValueError(
                f"a program numbers the cells of a grid by int64; {grid} has too many. Pass a "
                "smaller box or spatial shape."
            )

    def contains(self, coords: Tensor) -> Tensor:
        """Return which rows of ``coords`` [N, 1 + D] lie in the grid, bool [N]."""
        lower, upper = _numbers(self._lower, coords), _numbers(self._upper, coords)
        return ((coords >= lower) & (coords <= upper)).all(1)

    def of(self, coords: Tensor, stride: IntTuple | None = None) -> Tensor:
        """Return the keys of ``stride * coords``, int64 [N]."""
        steps = (1, *(stride or (1,) * self.grid.ndim))
        factors = [unit * step for unit, step in zip(self._units, steps, strict=True)]
        return (coords * _numbers(factors, coords)).sum(1) - self._first

    def steps(self, offsets: Sequence[IntTuple], like: Tensor) -> Tensor:
        """Return the change of a key for each offset, int64 [V]."""
        units = self._units[1:]
        steps = [sum(x * unit for x, unit in zip(offset, units, strict=True)) for offset in offsets]
        return _numbers(steps, like)

    def of_cells(self, batch: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys of cells int64 [N, V, D] in samples [N], and which lie in the grid."""
        lower, upper = _numbers(self._lower[1:], batch), _numbers(self._upper[1:], batch)
        inside = ((cells >= lower) & (cells <= upper)).all(2)
        key = (cells * _numbers(self._units[1:], batch)).sum(2)
        return key + (batch.long() * self._units[0] - self._first)[:, None], inside

    def coords(self, keys: Tensor) -> Tensor:
        """Return int32 coordinates [N, 1 + D]; batch index and coordinates -1 for no site."""
        rest = torch.div(keys[:, None], _numbers(self._units, keys), rounding_mode="floor")
        cells = rest % _numbers(self._extents, keys) + _numbers(self._lower, keys)
        return torch.where(keys[:, None] < _LAST, cells, -1).int()

    def holds_window(self, coarse: Grid, offsets: Sequence[IntTuple], stride: IntTuple) -> bool:
        """Return whether the room is enough for a window around ``stride`` times coarse sites."""
        for axis, step in enumerate(stride):
            taps = [offset[axis] for offset in offsets]
            first = coarse.lower[axis] * step + min(taps)
            last = coarse.upper[axis] * step + max(taps)
            if max(self.grid.lower[axis] - first, last - self.grid.upper[axis]) > _ROOM:
                return False
        return True

    @property
    def _first(self) -> int:
        """The key that the grid's lowest cell would have if keys began at the origin."""
        return sum(lower * unit for lower, unit in zip(self._lower, self._units, strict=True))


class SortedSites(NamedTuple):
    """The lookup structure of a set of sites.

    Attributes:
        numbering: The keys.
        keys: int64 [N], ascending; keys of no site come last.
        rows: int64 [N], the row of each key; None: its place.
    """

    numbering: RoomyKeys
    keys: Tensor
    rows: Tensor | None

    @classmethod
    def of(cls, coords: Tensor, grid: Grid) -> SortedSites:
        """Sort given sites, ``coords`` int32 [N, 1 + D]; rows outside the grid are left out."""
        numbering = RoomyKeys(grid)
        keys = torch.where(numbering.contains(coords), numbering.of(coords), _LAST)
        return cls(numbering, *torch.sort(keys, stable=True))

    def find(self, wanted: Tensor) -> Tensor:
        """Return the lowest row of each key, int64 like ``wanted``; -1 where there is none."""
        place = torch.searchsorted(self.keys, wanted).clamp(max=self.keys.shape[0] - 1)
        is_found = (self.keys[place] == wanted) & (wanted < _LAST)
        return torch.where(is_found, place if self.rows is None else self.rows[place], -1)

    def num_sites(self) -> Tensor:
        """Return the number of rows in the grid, int64 []."""
        return (self.keys < _LAST).sum()

    def num_repeats(self) -> Tensor:
        """Return how many rows repeat the site of an earlier row, int64 []."""
        return ((self.keys[1:] == self.keys[:-1]) & (self.keys[1:] < _LAST)).sum()


class Reached(NamedTuple):
    """The sites that a window reaches.

    Attributes:
        coords: int32 [capacity, 1 + D], ascending by key; the batch index of padding is -1.
        index: Their lookup structure.
        count: int64 [], the number of sites.
        lacking: int64 [], the number of sites for which there is no room.
    """

    coords: Tensor
    index: SortedSites
    count: Tensor
    lacking: Tensor


def reached_sites(
    coords: Tensor,
    is_inside: Tensor,
    offsets: Window,
    stride: IntTuple,
    divide: bool,
    grid: Grid,
    capacity: int | None,
) -> Reached:
    """Find the sites of ``grid`` that a window reaches from ``coords`` [N, 1 + D].

    Args:
        coords: int32 [N, 1 + D].
        is_inside: bool [N]; other rows reach nothing.
        offsets: See :func:`tritonspconv.kernels.sites.reached_sites`, like the next three.
        stride: Fine sites per coarse site.
        divide: True: ``coords`` are the fine sites.
        grid: The target grid.
        capacity: Rows of the result; None: as many as there are sites, read on the host.
    """
    numbering = RoomyKeys(grid)
    steps = reach_steps(offsets, stride, divide)
    own = coords[:, None, 1:].long()
    taps, factor = _numbers([offset for offset, _ in steps], coords), _numbers(stride, coords)
    if divide:
        moved = own - taps
        cells = torch.div(moved, factor, rounding_mode="floor")
        limits = _numbers([limit for _, limit in steps], coords)
        exists = (moved - cells * factor < limits).all(2) & is_inside[:, None]
    else:
        cells = own * factor + taps
        exists = is_inside[:, None]
    keys, inside = numbering.of_cells(coords[:, 0], cells)
    ordered = torch.sort(torch.where(exists & inside, keys, _LAST).flatten()).values
    # A key counts if it differs from the key before it and is not -1.
    before = torch.cat([ordered.new_full((1,), -1), ordered[:-1]])
    number = ((ordered != before) & (ordered < _LAST)).cumsum(0)
    found = number[-1]
    if capacity is None:
        capacity = max(int(found), 1)
    wanted = torch.arange(1, capacity + 1, device=coords.device)
    place = torch.searchsorted(number, wanted).clamp(max=ordered.shape[0] - 1)
    made = torch.where(wanted <= found, ordered[place], _LAST)
    count = found.clamp(max=capacity)
    index = SortedSites(numbering, made, None)
    return Reached(numbering.coords(made), index, count, found - count)


def neighbor_rows(
    out_coords: Tensor,
    out_grid: Grid,
    offsets: tuple[IntTuple, ...],
    stride: IntTuple,
    divide: bool,
    inputs: SortedSites,
) -> Tensor:
    """Return the input row that each output meets through each tap, int64 [n_out, V]; -1: none.

    Args:
        out_coords: int32 [n_out, 1 + D]; padding is -1 everywhere and meets nothing.
        out_grid: Grid of the outputs.
        offsets: V tap offsets.
        stride: Fine sites per coarse site.
        divide: True: the inputs are the fine sites.
        inputs: The input sites.
    """
    numbering = inputs.numbering
    if divide and numbering.holds_window(out_grid, offsets, stride):
        own = torch.where(out_coords[:, 0] >= 0, numbering.of(out_coords, stride), _NEVER)
        return inputs.find(own[:, None] + numbering.steps(offsets, out_coords))
    own = out_coords[:, None, 1:].long()
    taps, factor = _numbers(offsets, out_coords), _numbers(stride, out_coords)
    exists = out_coords[:, :1] >= 0
    if divide:
        cells = own * factor + taps
    else:
        moved = own - taps
        cells = torch.div(moved, factor, rounding_mode="floor")
        exists = exists & (moved == cells * factor).all(2)
    keys, inside = numbering.of_cells(out_coords[:, 0], cells)
    return inputs.find(torch.where(exists & inside, keys, -1))


def inverted_rows(rows: Tensor, n_in: int) -> Tensor:
    """Return the output that each input feeds through each tap, int64 [n_in, V]; -1: none.

    Args:
        rows: int64 [n_out, V], the input of each output and tap.
        n_in: Number of inputs. Through one tap, an input feeds one output at most.
    """
    out_rows = torch.arange(rows.shape[0], device=rows.device)[:, None].expand_as(rows)
    # Absent entries are written to a spare row behind the last one.
    made = torch.full((n_in + 1, rows.shape[1]), -1, dtype=torch.int64, device=rows.device)
    return made.scatter(0, torch.where(rows < 0, n_in, rows), out_rows)[:n_in]


def _numbers(numbers: Sequence[int] | Sequence[IntTuple], like: Tensor) -> Tensor:
    """Return numbers as int64, on the device of ``like``."""
    return torch.tensor(numbers, dtype=torch.int64, device=like.device)
