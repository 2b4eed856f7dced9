"""The coordinate maps of a manager, by key."""

from __future__ import annotations

import functools
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from compat.minkowski import _relations
from compat.minkowski._coordinate_map import (
    CoordinateMap,
    IntTuple,
    as_coordinates,
    common_unit,
    divided,
    scaled,
)
from compat.minkowski._errors import MinkowskiError
from compat.minkowski._keys import CoordinateMapKey, KeyValue
from compat.minkowski._samples import Samples, check_samples, joined, occurring, report_others
from compat.minkowski.MinkowskiCommon import StrideType, convert_to_int_list
from tritonspconv.coords import ActiveSites, Grid, union_sites
from tritonspconv.coords.row_tensor import bounds_of, plain
from tritonspconv.opaque_types import OpaqueMeta


class CoordinateMaps(metaclass=OpaqueMeta):
    """Coordinate maps by key: inserted, strided, pruned, merged; and the rows they share.

    Args:
        ndim: Number of spatial axes, D.

    Raises:
        MinkowskiError: There are none.
    """

    def __init__(self, ndim: int) -> None:
        if ndim < 1:
            raise MinkowskiError(f"D, the number of spatial axes, must be at least 1; got {ndim}.")
        self.D = ndim
        self._maps: dict[KeyValue, CoordinateMap] = {}
        self._strided: dict[tuple[KeyValue, IntTuple, str], CoordinateMapKey] = {}
        self._rows_of_cells: dict[tuple[KeyValue, KeyValue], Tensor] = {}
        self._unions: dict[tuple[KeyValue, ...], tuple[CoordinateMapKey, list[Tensor]]] = {}
        self._equal_rows: dict[frozenset[KeyValue], bool] = {}
        self._next_id = 0
        # The samples of every map are samples of the inserted maps.
        self._samples: Samples = range(0)
        self._origins: dict[CoordinateMapKey, Samples] = {}
        # Maps whose samples are known only from an example.
        self._bounded_inputs: list[CoordinateMap] = []

    def insert_and_map(
        self, coordinates: Tensor, tensor_stride: StrideType = 1, string_id: str = ""
    ) -> tuple[CoordinateMapKey, tuple[Tensor, Tensor]]:
        """Add the distinct rows of integer coordinates [N, 1 + D] as a map.

        Args:
            coordinates: Batch index first, in input units; kept as they are at every stride.
            tensor_stride: Tensor stride of the key; int or one per axis.
            string_id: Id of the key; replaced by a fresh one where the key is in use.

        Returns:
            The key; the first row of each coordinate, int64 [U], ascending, which is the order of
            the map; and the map's row of each of the N, int64.

        Raises:
            MinkowskiError: The coordinates are no integers [N, 1 + D] that fit int32, a batch index
                is negative, or so is the tensor stride.

        Waits for the device.
        """
        steps = tuple(convert_to_int_list(tensor_stride, self.D))
        if min(steps) < 0:
            raise MinkowskiError(f"tensor_stride must not be negative; got {list(steps)}.")
        coordinates = as_coordinates(coordinates, self.D)
        made, rows, position = CoordinateMap.around(coordinates, steps)
        bounds, batch_index = made.sites.bounds, plain(made.batch_index)
        if bounds is None:
            samples = occurring(batch_index, made.batch_size)
        else:
            samples = bounds.plan.recall(
                lambda: occurring(batch_index, made.batch_size), assumed=range(made.batch_size)
            )
            self._bounded_inputs.append(made)
        self._samples = joined(self._samples, samples)
        return self._add(made, string_id), (rows, position)

    def _insert_distinct(
        self, coordinates: Tensor, source: CoordinateMaps, key: CoordinateMapKey
    ) -> CoordinateMapKey:
        """Add distinct coordinates in the box of a map of another manager, under its key."""
        found = source._map(key)
        self._samples = source._samples
        cells = divided(plain(coordinates), found.unit)
        sites = ActiveSites(cells, found.sites.grid, bounds=bounds_of(coordinates))
        sites.note_repeats(False)
        made = CoordinateMap(sites, found.tensor_stride, found.unit)
        return self._add(made, key.value[1])

    def stride(
        self, coordinate_map_key: CoordinateMapKey, stride: StrideType, string_id: str = ""
    ) -> CoordinateMapKey:
        """Return the key of the occupied cells of a ``stride`` times coarser map.

        It has the id of the given key, or ``string_id``. A map that has that key already is used as
        it is.
        """
        steps = tuple(convert_to_int_list(stride, self.D))
        key = self._get_coordinate_map_key(coordinate_map_key)
        return self._strided_key(key, steps, string_id)

    def _strided_key(
        self, key: CoordinateMapKey, steps: IntTuple, string_id: str = ""
    ) -> CoordinateMapKey:
        found = self._strided.get((key.value, steps, string_id))
        if found is not None:
            return found
        tensor_stride, own_id = key.value
        coarser = tuple(ts * step for ts, step in zip(tensor_stride, steps, strict=True))
        value = (coarser, string_id or own_id)
        if value not in self._maps:
            self._maps[value] = _relations.strided_sites(self._map(key), coarser)
        found = self._strided[key.value, steps, string_id] = CoordinateMapKey.of(value)
        return found

    def origin(self) -> CoordinateMapKey:
        """Return the key of the map with one site per sample, at 0, of tensor stride 0.

        Samples are the batch indices that occurred in the coordinates of any map. If samples join
        the manager later, the origin with them is another map, and tensors on the first keep it.
        """
        device = next((found.sites.device for found in self._maps.values()), torch.device("cpu"))
        return self._origin(self._samples, device)

    def _origin(self, samples: Samples, device: torch.device) -> CoordinateMapKey:
        """Return the key of the newest origin, with a site for each of ``samples`` at least."""
        newest = next(reversed(self._origins), None)
        if newest is not None:
            samples = joined(samples, self._origins[newest])
            if samples == self._origins[newest]:
                return newest
        batch_size = samples[-1] + 1 if samples else 0
        check_samples(batch_size)
        if self._bounded_inputs:
            self._report_other_samples(samples)
        coords = torch.zeros(len(samples), 1 + self.D, dtype=torch.int32, device=device)
        if isinstance(samples, range):
            # A graph cannot copy numbers to the device.
            coords[:, 0] = torch.arange(batch_size, dtype=torch.int32, device=device)
        else:
            coords[:, 0] = torch.tensor(samples, dtype=torch.int32, device=device)
        zeros, ones = (0,) * self.D, (1,) * self.D
        grid = Grid(zeros, ones, batch_size, bounded=False)
        key = self._add(CoordinateMap(ActiveSites(coords, grid), zeros, ones, True), "")
        self._origins[key] = samples
        return key

    def _report_other_samples(self, samples: Samples) -> None:
        bounds = self._bounded_inputs[0].sites.bounds
        assert bounds is not None, "these maps are bounded"
        batch_index = [plain(found.batch_index) for found in self._bounded_inputs]
        report_others(torch.cat(batch_index), samples, bounds.plan)

    def _samples_at(self, origin: CoordinateMapKey) -> Samples | None:
        """Return the batch index of each row of an origin; None: the key is of another map."""
        return self._origins.get(origin)

    def size(self, coordinate_map_key: CoordinateMapKey) -> int:
        """Return the number of sites of a map."""
        return self._map(coordinate_map_key).num_rows

    def get_coordinates(self, coords_key_or_tensor_strides: Any) -> Tensor:
        """Return the coordinates of a key, or of the first map of a tensor stride, int32."""
        key = self._get_coordinate_map_key(coords_key_or_tensor_strides)
        return self._map(key).coordinates()

    def number_of_unique_batch_indices(self) -> int:
        """Return the number of samples."""
        return len(self.get_batch_indices())

    def get_batch_indices(self) -> list[int]:
        """Return the batch indices that occur, ascending."""
        newest = next(reversed(self._origins.values()), range(0))
        return list(joined(self._samples, newest))

    def get_unique_coordinate_map_key(self, tensor_stride: StrideType) -> CoordinateMapKey:
        """Return a key of a tensor stride that no map has."""
        steps = tuple(convert_to_int_list(tensor_stride, self.D))
        return CoordinateMapKey.of(self._fresh(self._maps, steps, ""))

    def _get_coordinate_map_key(self, key_or_tensor_strides: Any) -> CoordinateMapKey:
        if isinstance(key_or_tensor_strides, CoordinateMapKey):
            return key_or_tensor_strides
        if isinstance(getattr(key_or_tensor_strides, "coordinate_key", None), CoordinateMapKey):
            raise MinkowskiError(
                f"expected a CoordinateMapKey or a tensor stride; got a "
                f"{type(key_or_tensor_strides).__name__}. Pass its coordinate_map_key."
            )
        steps = tuple(convert_to_int_list(key_or_tensor_strides, self.D))
        for value in self._maps:
            if value[0] == steps:
                return CoordinateMapKey.of(value)
        raise MinkowskiError(f"no map has tensor stride {list(steps)}; there are {self}.")

    def _map(self, key: CoordinateMapKey) -> CoordinateMap:
        found = self._maps.get(key.value)
        if found is None:
            raise MinkowskiError(
                f"{key} is not in this coordinate manager: {self}. Pass the coordinate_manager of "
                "the tensor that the key is from."
            )
        return found

    def _add(self, made: CoordinateMap, string_id: str) -> CoordinateMapKey:
        value = self._fresh(self._maps, made.tensor_stride, string_id)
        self._maps[value] = made
        return CoordinateMapKey.of(value)

    def _fresh(
        self, taken: Container[KeyValue], tensor_stride: IntTuple, string_id: str
    ) -> KeyValue:
        """Return a key value that is free: with the id itself, or with a number after it."""
        value = (tensor_stride, string_id)
        while value in taken:
            number = f"{self._next_id:05d}"
            self._next_id += 1
            value = (tensor_stride, f"{string_id}-{number}" if string_id else number)
        return value

    def _prune(self, key: CoordinateMapKey, mask: Tensor) -> tuple[CoordinateMapKey, Tensor]:
        """Return the key of the rows with True, and these rows, int64."""
        rows = mask.nonzero().squeeze(1)
        return self._add(self._map(key).select(rows), "pruned"), rows

    def origin_map(self, key: CoordinateMapKey) -> tuple[Tensor, list[Tensor]]:
        """Return the batch indices, int64 [B], and the rows of each sample, int64, ascending."""
        rows = self._map(key).batch_rows()
        return torch.arange(len(rows), device="cpu"), list(rows)

    def stride_map(
        self, in_key: CoordinateMapKey, stride_key: CoordinateMapKey
    ) -> tuple[Tensor, Tensor]:
        """Return rows of a map and the rows of the coarser cells that they are in, int64 [n] each.

        Rows whose cell is not in the coarser map are left out. Waits for the device.
        """
        rows = self._cell_rows(in_key, stride_key)
        known = (rows >= 0).nonzero().squeeze(1)
        return known, rows[known]

    def _cell_rows(self, in_key: CoordinateMapKey, stride_key: CoordinateMapKey) -> Tensor:
        """Return for each row the row of the coarser cell that it is in, int64; -1: none. Kept."""
        values = in_key.value, stride_key.value
        if values not in self._rows_of_cells:
            # A floor may lie below the range of int32.
            coarse, coordinates = self._map(stride_key), self._map(in_key).coordinates().long()
            coarse.refuse_bounded("a search for cells")
            steps = tuple(max(ts, 1) for ts in coarse.tensor_stride)
            cells = scaled(divided(coordinates, steps), steps)
            self._rows_of_cells[values] = coarse.rows_of(cells)
        return self._rows_of_cells[values]

    def union_map(self, in_keys: list[CoordinateMapKey], out_key: CoordinateMapKey) -> list[Tensor]:
        """Set ``out_key`` to the union of maps; its tensor stride is the least of each axis.

        The rows of the first map come first, then those of each next map that are new, in their
        order. Maps that were united before, in the same order, give the same key.

        Returns:
            For each map, int64 [2, n]: its rows, and the union's rows of the same sites.

        Waits for the device.
        """
        values = tuple(key.value for key in in_keys)
        if values not in self._unions:
            self._unions[values] = self._unite([self._map(key) for key in in_keys])
        key, rows = self._unions[values]
        out_key.set_key(*key.get_key())
        return [torch.stack([torch.arange(len(r), device=r.device), r]) for r in rows]

    def _unite(self, maps: list[CoordinateMap]) -> tuple[CoordinateMapKey, list[Tensor]]:
        """Add the union of maps; return its key, and its row of each row of each map."""
        for found in maps:
            found.refuse_bounded("a union of coordinates")
        unit = functools.reduce(common_unit, (found.unit for found in maps))
        union, rows = union_sites([found.sites_in(unit) for found in maps], ascending=False)
        least = tuple(map(min, zip(*(found.tensor_stride for found in maps), strict=True)))
        return self._add(CoordinateMap(union, least, unit), "merge"), rows

    def _have_equal_rows(self, first: CoordinateMapKey, second: CoordinateMapKey) -> bool:
        """Return whether two keys stand for the same coordinates in the same order.

        Waits for the device where the keys differ and their maps have the same tensor stride and
        number of rows; once for each pair of maps.
        """
        if first == second:
            return True
        one, other = self._maps.get(first.value), self._maps.get(second.value)
        if one is None or other is None:
            return False
        one.refuse_bounded(f"a comparison of the coordinates of {first} and {second}")
        if (one.tensor_stride, one.num_rows) != (other.tensor_stride, other.num_rows):
            return False
        pair = frozenset((first.value, second.value))
        if pair not in self._equal_rows:
            self._equal_rows[pair] = torch.equal(one.coordinates(), other.coordinates())
        return self._equal_rows[pair]

    def __repr__(self) -> str:
        lines = [
            f"\t{list(steps)}{f'-{name}' if name else ''}:\t{found.num_rows}x{1 + self.D}"
            for (steps, name), found in self._maps.items()
        ]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])
