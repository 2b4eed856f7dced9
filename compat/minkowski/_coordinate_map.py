"""CoordinateMap: the engine's sites behind a key, in MinkowskiEngine's units."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compat.minkowski._errors import BATCH_INDEX_FIRST, MinkowskiError
from compat.minkowski._int32 import to_int32
from compat.minkowski._samples import check_samples
from tritonspconv.coords import ActiveSites, Grid, select_sites, unique_sites
from tritonspconv.coords.row_tensor import RowBounds, as_rows, bounds_of, plain, refusal
from tritonspconv.coords.site_plan import Report
from tritonspconv.guide import longer, more

IntTuple = tuple[int, ...]


class CoordinateMap:
    """Active sites and their unit: ``coordinates = unit * sites.coords``, the batch index apart.

    MinkowskiEngine keeps coordinates in input units at every tensor stride. The engine counts
    cells. The unit is the tensor stride where all coordinates are its multiples, and 1 otherwise.

    Args:
        sites: The active sites; an attribute.
        tensor_stride: The stride of the map's key, 0 for an origin; an attribute.
        unit: Input units per cell, per axis; an attribute.
        ascends: True: the batch index is known to ascend with the rows.

    Raises:
        MinkowskiError: Coordinates would not fit int32.
    """

    __slots__ = ("_batch_ascends", "_batch_rows", "_rescaled", "sites", "tensor_stride", "unit")

    def __init__(
        self,
        sites: ActiveSites,
        tensor_stride: IntTuple,
        unit: IntTuple,
        ascends: bool = False,
    ) -> None:
        if sites.num_rows:
            check_fits(sites.grid.lower, sites.grid.upper, unit)
        self.sites = sites
        self.unit = unit
        self.tensor_stride = tensor_stride
        self._batch_ascends: bool | None = None
        if sites.count is not None:
            self._batch_ascends = False  # The batch index of padding is -1.
        elif ascends or sites.grid.batch_size <= 1:
            self._batch_ascends = True
        self._batch_rows: list[Tensor] | None = None
        self._rescaled: dict[IntTuple, ActiveSites] = {}

    @classmethod
    def around(
        cls, coordinates: Tensor, tensor_stride: IntTuple
    ) -> tuple[CoordinateMap, Tensor, Tensor]:
        """Make a map of the distinct rows of ``coordinates`` int32 [N, 1 + D], first rows first.

        Returns:
            The map; the first row of each coordinate, int64 [U], ascending; and the position of
            every row's coordinate among them, int64 [N].

        Raises:
            MinkowskiError: A batch index is negative, or the box around the cells is too large.

        Waits for the device, unless rows are padded to a capacity. Padded rows are taken to be
        distinct; the run is reported if they are not.
        """
        bounds = bounds_of(coordinates)
        if bounds is not None:
            return cls._bounded(plain(coordinates), tensor_stride, bounds)
        unit = tuple(max(step, 1) for step in tensor_stride)
        cells = coordinates
        if max(unit) > 1:
            steps = coordinates.new_tensor((1, *unit))
            cells = coordinates.div(steps, rounding_mode="floor")
            if bool((cells * steps != coordinates).any()):
                unit, cells = (1,) * len(unit), coordinates
        try:
            grid = Grid.around(cells)
        except ValueError as error:
            raise MinkowskiError(longer(str(error), BATCH_INDEX_FIRST)) from error
        sites, rows, position = unique_sites(cells, grid)
        return cls(sites, tensor_stride, unit), rows, position

    @classmethod
    def _bounded(
        cls, coordinates: Tensor, tensor_stride: IntTuple, bounds: RowBounds
    ) -> tuple[CoordinateMap, Tensor, Tensor]:
        """Return the result of :meth:`around` for padded rows."""
        unit = tuple(max(step, 1) for step in tensor_stride)
        cells = coordinates
        if max(unit) > 1:
            cells = divided(coordinates, unit)
            off = (scaled(cells, unit) != coordinates).any(1)
            if bounds.plan.recall(lambda: bool(off.any()), assumed=True):
                unit, cells = (1,) * len(unit), coordinates
            elif (is_real := bounds.mask(coordinates.shape[0])) is not None:
                bounds.plan.report(Report.OUTSIDE, (off & is_real).any())
        rows = as_rows(cells.clone(), bounds)
        sites = ActiveSites(rows, Grid.around(rows, unit))
        if sites.has_repeats():
            raise MinkowskiError(
                "capture: the example's coordinates repeat, and the number of sites would depend "
                "on the call. Merge such rows before the captured function, as by "
                "utils.sparse_quantize or voxelize." + more("repeated-coords")
            )
        everything = as_rows(torch.arange(sites.num_rows, device=coordinates.device), bounds)
        return cls(sites, tensor_stride, unit), everything, everything.clone()

    @property
    def num_rows(self) -> int:
        """Number of sites."""
        return self.sites.num_rows

    @property
    def batch_index(self) -> Tensor:
        """Sample of each row, int32 [N]; of padding -1."""
        return self.sites.as_rows(self.sites.coords)[:, 0]

    @property
    def batch_is_known_to_ascend(self) -> bool:
        """True if the batch index is known to ascend; does not wait for the device."""
        return self._batch_ascends is True

    @property
    def batch_ascends(self) -> bool:
        """True if the batch index ascends with the rows. May wait for the device, once."""
        if self._batch_ascends is None:
            batch, bounds = self.batch_index, self.sites.bounds
            if bounds is not None and bounds.plan.show_rows is None:
                # If a recorder shows the rows, the recorder answers, so that it can refuse the
                # question.
                batch = plain(batch)
            self._batch_ascends = bool((batch[1:] >= batch[:-1]).all())
        return self._batch_ascends

    @property
    def batch_size(self) -> int:
        """One more than the largest batch index."""
        return self.sites.grid.batch_size

    def coordinates(self) -> Tensor:
        """Return a new tensor of the coordinates in input units, int32 [N, 1 + D]."""
        return self.sites.as_rows(scaled(self.sites.coords, self.unit))

    def sites_in(self, unit: IntTuple) -> ActiveSites:
        """Return the sites counted in another unit, a divisor of the map's own; made once."""
        if unit == self.unit:
            return self.sites
        if unit not in self._rescaled:
            factor = [own // new for own, new in zip(self.unit, unit, strict=True)]
            grid = self.sites.grid
            lower = [lo * f for lo, f in zip(grid.lower, factor, strict=True)]
            upper = [hi * f for hi, f in zip(grid.upper, factor, strict=True)]
            coords = scaled(self.sites.coords, tuple(factor))
            box = grid.with_box(lower, upper)
            self._rescaled[unit] = ActiveSites(coords, box, bounds=self.sites.bounds)
        return self._rescaled[unit]

    def rows_of(self, coordinates: Tensor) -> Tensor:
        """Return the row of each of ``coordinates`` int [M, 1 + D], int64 [M]; -1: none."""
        self.refuse_bounded("a search for coordinates")
        cells = divided(coordinates, self.unit)
        rows = self.sites.rows_of(cells)
        return rows.where((scaled(cells, self.unit) == coordinates).all(1), -1)

    def select(self, rows: Tensor) -> CoordinateMap:
        """Return the map of some rows, int64 [M], in their order."""
        self.refuse_bounded("a selection of rows")
        sites = select_sites(self.sites, rows)
        return CoordinateMap(sites, self.tensor_stride, self.unit, self.batch_is_known_to_ascend)

    def batch_rows(self) -> list[Tensor]:
        """Return the rows of every sample, int64, ascending. Waits for the device the first time.

        The tuple has ``batch_size`` entries; a sample without rows has an empty tensor.
        """
        if self._batch_rows is None:
            self.refuse_bounded("a list of the rows of each sample")
            check_samples(self.batch_size)
            batch = self.batch_index
            counts = torch.bincount(batch, minlength=self.batch_size).tolist()
            self._batch_rows = list(torch.sort(batch, stable=True)[1].split(counts))
        return self._batch_rows

    def refuse_bounded(self, what: str) -> None:
        """Raise if rows are padded to a capacity, or recorded for such a run.

        Args:
            what: Name of the result whose shape depends on the coordinates.

        Raises:
            RowwiseError: They are.
        """
        if self.sites.bounds is not None:
            raise refusal(what, "its size depends on the coordinates")


def scaled(coords: Tensor, factor: IntTuple) -> Tensor:
    """Return a copy of ``coords`` [N, 1 + D] with each axis multiplied; the batch index stays.

    No number is copied to the device: a copy would wait, and a graph cannot hold it.
    """
    if len({*factor}) > 1:
        axes = zip(coords[:, 1:].unbind(1), factor, strict=True)
        return torch.stack([coords[:, 0], *(axis * step for axis, step in axes)], dim=1)
    made = coords * factor[0] if factor[0] != 1 else coords.clone()
    made[:, 0] = coords[:, 0]
    return made


def divided(coords: Tensor, divisor: IntTuple) -> Tensor:
    """Return a copy of ``coords`` with each axis divided and rounded down, like :func:`scaled`."""
    if len({*divisor}) > 1:
        axes = zip(coords[:, 1:].unbind(1), divisor, strict=True)
        cells = [axis.div(step, rounding_mode="floor") for axis, step in axes]
        return torch.stack([coords[:, 0], *cells], dim=1)
    made = coords.div(divisor[0], rounding_mode="floor") if divisor[0] != 1 else coords.clone()
    made[:, 0] = coords[:, 0]
    return made


def check_fits(lower: IntTuple, upper: IntTuple, unit: IntTuple) -> None:
    """Check that the coordinates of a box of cells fit int32.

    Args:
        lower: Its smallest cell on every axis.
        upper: Its largest cell on every axis.
        unit: Input units per cell, per axis.

    Raises:
        MinkowskiError: They do not.
    """
    low = [cell * step for cell, step in zip(lower, unit, strict=True)]
    high = [cell * step for cell, step in zip(upper, unit, strict=True)]
    if min(low) < -(2**31) or max(high) > 2**31 - 1:
        raise MinkowskiError(
            f"the coordinates of this layer's output or map would reach from {low} to {high}, "
            "which int32 cannot hold. Shift the coordinates towards 0."
        )


def common_unit(first: IntTuple, second: IntTuple) -> IntTuple:
    """Return the largest unit of which both are multiples."""
    return tuple(math.gcd(a, b) for a, b in zip(first, second, strict=True))


def as_coordinates(coordinates: Tensor, ndim: int) -> Tensor:
    """Check integer coordinates [N, 1 + D] and return them as int32.

    Raises:
        MinkowskiError: They have another shape, are not of an integer type or do not fit int32.
    """
    if coordinates.ndim != 2 or coordinates.shape[1] != 1 + ndim:
        raise MinkowskiError(
            f"coordinates must have shape [N, {1 + ndim}], batch index first, for D={ndim}; got "
            f"{list(coordinates.shape)}."
        )
    if coordinates.is_floating_point():
        raise MinkowskiError(
            f"coordinates must be integers; got {coordinates.dtype}. Round them down first, "
            "coordinates.floor().int(), or make a TensorField." + more("int32-coords")
        )
    return to_int32(coordinates)
