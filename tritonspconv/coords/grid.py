"""Grid: the box of cells that coordinates live in, and the bijection coordinates <-> int64 keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspconv.arguments import whole_number, whole_numbers
from tritonspconv.coords.row_tensor import RowBounds, bounds_of, plain
from tritonspconv.coords.site_plan import Report
from tritonspconv.guide import more
from tritonspconv.kernels.keys import coord_keys, key_coords
from tritonspconv.waits import wait_for_values

if TYPE_CHECKING:
    from jaxtyping import Bool, Int, Int32, Int64

_MAX_CELLS = 2**62
# A margin must not make the grid larger than this: an index of so many cells takes 16 MiB.
_MAX_CELLS_WITH_MARGIN = 2**26
_INT32 = 2**31


@dataclass(frozen=True)
class Grid:
    """A box of ``batch_size * prod(shape)`` cells whose keys ascend with (batch, coordinates).

    spconv's grid has ``lower = 0`` and a shape that the user gives. MinkowskiEngine's space is
    unbounded: its grid is the box around the coordinates, which may be negative. The two differ in
    nothing else.

    Attributes:
        lower: Smallest coordinate of each spatial axis, inclusive.
        shape: Number of cells along each spatial axis.
        batch_size: Number of samples.
        bounded: True: outputs beyond the box are dropped, and output shapes follow the formula of
            dense layers. False: the box grows with the outputs.
    """

    lower: tuple[int, ...]
    shape: tuple[int, ...]
    batch_size: int
    bounded: bool = True

    def __post_init__(self) -> None:
        """Check extents and that every key fits an int64.

        Raises:
            TypeError: An entry is no whole number.
            ValueError: An extent or the batch size is negative, or there are too many cells.
        """
        if {*map(type, self.lower), *map(type, self.shape), type(self.batch_size)} != {int}:
            # Keep Python's ints: arithmetic on a caller's tensor would write to it.
            for name in ("lower", "shape"):
                object.__setattr__(self, name, whole_numbers(f"Grid: {name}", getattr(self, name)))
            batch_size = whole_number("Grid: batch_size", self.batch_size)
            object.__setattr__(self, "batch_size", batch_size)
        if len(self.lower) != len(self.shape):
            raise ValueError(f"lower {self.lower} and shape {self.shape} differ in length.")
        if min(self.shape, default=1) < 0 or self.batch_size < 0:
            raise ValueError(
                f"spatial shape and batch size must not be negative; got shape {self.shape}, "
                f"batch size {self.batch_size}."
            )
        if self.num_cells > _MAX_CELLS:
            raise ValueError(
                f"a grid may have at most 2**62 cells; got shape {self.shape} x batch "
                f"{self.batch_size} = {self.num_cells}. Use larger voxels or crop the range."
                + more("too-many-cells")
            )

    @classmethod
    def around(cls, coords: Int32[Tensor, "N axes"], unit: tuple[int, ...] | None = None) -> Grid:
        """Return the unbounded grid around ``coords`` [N, 1 + D]. Waits for the device once.

        Rows that are padded to a capacity do not wait: their grid is the box of the plan, or that
        of the example which the plan recorded, with a margin. Rows outside are reported.

        Args:
            coords: The coordinates, in cells.
            unit: Input units that one cell spans along each axis; None: 1.
        """
        bounds = bounds_of(coords)
        if bounds is not None:
            return _bounded_grid(plain(coords), bounds, unit or (1,) * (coords.shape[1] - 1))
        ndim = coords.shape[1] - 1
        if coords.shape[0] == 0:
            return cls((0,) * ndim, (0,) * ndim, 0, bounded=False)
        lower, upper = wait_for_values(torch.stack(torch.aminmax(coords, dim=0)))
        if lower[0] < 0:
            raise ValueError(f"batch indices must not be negative; got {lower[0]}.")
        shape = tuple(hi - lo + 1 for lo, hi in zip(lower[1:], upper[1:], strict=True))
        return cls(tuple(lower[1:]), shape, upper[0] + 1, bounded=False)

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.shape)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Keep the hash: every search for a kernel map needs it.
        return hash((self.lower, self.shape, self.batch_size, self.bounded))

    @property
    def num_cells(self) -> int:
        """Number of cells of all samples."""
        cells = self.batch_size
        for extent in self.shape:
            cells *= extent
        return cells

    @property
    def upper(self) -> tuple[int, ...]:
        """Largest coordinate of each spatial axis, inclusive."""
        return tuple(lo + n - 1 for lo, n in zip(self.lower, self.shape, strict=True))

    def contains(self, coords: Int[Tensor, "N axes"]) -> Bool[Tensor, "N"]:
        """Return a bool [N]: which rows of ``coords`` [N, 1 + D] lie in the grid."""
        return self.keys(coords) >= 0

    def keys(self, coords: Int[Tensor, "N axes"]) -> Int64[Tensor, "N"]:
        """Return int64 keys [N] of ``coords`` [N, 1 + D]; -1 for rows outside the grid."""
        return coord_keys(coords, self)

    def coords(self, keys: Int64[Tensor, "N"]) -> Int32[Tensor, "N axes"]:
        """Return int32 coordinates [N, 1 + D] of ``keys`` [N]; the inverse of :meth:`keys`."""
        return key_coords(keys, self)

    def with_box(self, lower: Sequence[int], upper: Sequence[int]) -> Grid:
        """Return a grid of the same batch over the inclusive box ``[lower, upper]``."""
        shape = tuple(max(hi - lo + 1, 0) for lo, hi in zip(lower, upper, strict=True))
        return Grid(tuple(lower), shape, self.batch_size, self.bounded)

    def with_margin(self) -> Grid:
        """Return a grid whose box is larger on every side, by half its extent if that fits memory.

        The margin is halved until the grid has at most ``2**26`` cells; it is one cell at least.
        """
        most = max(self.shape, default=0)
        part = 2
        while True:
            margins = [max(extent // part, 1) for extent in self.shape]
            lower = [max(lo - m, -_INT32) for lo, m in zip(self.lower, margins, strict=True)]
            upper = [min(hi + m, _INT32 - 1) for hi, m in zip(self.upper, margins, strict=True)]
            made = self.with_box(lower, upper)
            if made.num_cells <= _MAX_CELLS_WITH_MARGIN or part > most:
                return made
            part *= 2


def _bounded_grid(coords: Tensor, bounds: RowBounds, unit: tuple[int, ...]) -> Grid:
    """Return the grid of padded rows, and report real rows outside of it."""
    plan = bounds.plan
    found: Grid = plan.recall(lambda: Grid.around(coords), assumed=plan.grid)
    box = plan.grid
    if box is not None and box.ndim != found.ndim:
        raise ValueError(
            f"box must have {found.ndim} axes, as the coordinates have; got {box.ndim}: lower "
            f"{box.lower}, upper {box.upper}."
        )
    if box is None:
        grid = found if plan.records else found.with_margin()
    else:
        lower, upper = (
            [at // step for at, step in zip(corner, unit, strict=True)]
            for corner in (box.lower, box.upper)
        )
        grid = found.with_box(lower, upper)
    is_real = bounds.mask(coords.shape[0])
    if is_real is None:
        if box is not None and not (_holds(grid.lower, found.lower, found.upper, grid.upper)):
            raise ValueError(
                f"box reaches from {grid.lower} to {grid.upper}, but the example has coordinates "
                f"from {found.lower} to {found.upper}. Choose a box with room for every call."
            )
        return grid
    first, last = plan.constant((0, *grid.lower), (grid.batch_size - 1, *grid.upper))
    outside = ((coords < first) | (coords > last)).any(1)
    plan.report(Report.OUTSIDE, (outside & is_real).any())
    return grid


def _holds(*corners: tuple[int, ...]) -> bool:
    """Return whether the corners' coordinates ascend on every axis."""
    return all(list(axis) == sorted(axis) for axis in zip(*corners, strict=True))
