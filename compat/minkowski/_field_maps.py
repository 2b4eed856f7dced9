"""The fields of a manager: points of any coordinates, and the maps of their cells."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from compat.minkowski._coordinate_maps import CoordinateMaps
from compat.minkowski._errors import MinkowskiError
from compat.minkowski._fields import CoordinateField, corners
from compat.minkowski._keys import CoordinateMapKey, KeyValue
from compat.minkowski._samples import joined
from compat.minkowski.MinkowskiCommon import StrideType, convert_to_int_list


class FieldMaps(CoordinateMaps):
    """Coordinate maps, and points by keys of their own.

    Args:
        ndim: Number of spatial axes, D.
    """

    def __init__(self, ndim: int) -> None:
        super().__init__(ndim)
        self._fields: dict[KeyValue, CoordinateField] = {}
        self._field_maps: dict[tuple[KeyValue, KeyValue], tuple[Tensor, Tensor]] = {}

    def insert_field(
        self, coordinates: Tensor, tensor_stride: StrideType, string_id: str = ""
    ) -> CoordinateMapKey:
        """Add points, float [N, 1 + D], and return their key."""
        steps = tuple(convert_to_int_list(tensor_stride, self.D))
        value = self._fresh(self._fields, steps, string_id)
        self._fields[value] = CoordinateField(coordinates, self.D)
        return CoordinateMapKey.of(value)

    def field_to_sparse_insert_and_map(
        self,
        field_map_key: CoordinateMapKey,
        sparse_tensor_stride: StrideType,
        sparse_tensor_string_id: str = "",
    ) -> tuple[CoordinateMapKey, tuple[Tensor, Tensor]]:
        """Add the cells of a tensor stride that hold points; see :meth:`insert_and_map`."""
        steps = tuple(convert_to_int_list(sparse_tensor_stride, self.D))
        if min(steps) < 1:
            raise MinkowskiError(
                f"the tensor stride of a field's cells must be at least 1; got {list(steps)}."
            )
        cells = self._field(field_map_key).cells(steps)
        key, mapping = self.insert_and_map(cells, steps, sparse_tensor_string_id)
        self._field_maps[field_map_key.value, key.value] = mapping
        return key, mapping

    def exists_field_to_sparse(
        self, field_map_key: CoordinateMapKey, sparse_map_key: CoordinateMapKey
    ) -> bool:
        """Return whether the map was made from the points."""
        return (field_map_key.value, sparse_map_key.value) in self._field_maps

    def field_to_sparse_keys(self, field_map_key: CoordinateMapKey) -> list[CoordinateMapKey]:
        """Return the keys of the maps made from the points."""
        made = [sparse for field, sparse in self._field_maps if field == field_map_key.value]
        return [CoordinateMapKey.of(value) for value in made]

    def get_field_to_sparse_map(
        self, field_map_key: CoordinateMapKey, sparse_map_key: CoordinateMapKey
    ) -> tuple[Tensor, Tensor]:
        """Return first points and map rows of :meth:`field_to_sparse_insert_and_map` again."""
        return self._field_maps[field_map_key.value, sparse_map_key.value]

    def field_to_sparse_map(
        self, field_map_key: CoordinateMapKey, sparse_map_key: CoordinateMapKey
    ) -> tuple[Tensor, Tensor]:
        """Return map rows and points, int64 [n] each, of the points that lie in a map's cells."""
        found = self._map(sparse_map_key)
        rows = found.rows_of(self._field(field_map_key).cells(found.tensor_stride))
        known = (rows >= 0).nonzero().squeeze(1)
        return rows[known], known

    def get_coordinate_field(self, coords_key_or_tensor_strides: Any) -> Tensor:
        """Return a copy of the coordinates of points, float [N, 1 + D]."""
        return self._field(coords_key_or_tensor_strides).coordinates.clone()

    def origin_field(self) -> CoordinateMapKey:
        """Return the key of the origin, with a site for every sample of every field. May wait."""
        fields = list(self._fields.values())
        samples = functools.reduce(joined, (field.samples() for field in fields), self._samples)
        device = fields[0].coordinates.device if fields else torch.device("cpu")
        return self._origin(samples, device)

    def origin_field_map(self, key: CoordinateMapKey) -> tuple[Tensor, list[Tensor]]:
        """Return the batch indices and the points of each sample; see :meth:`origin_map`."""
        rows = self._field(key).batch_rows()
        return torch.arange(len(rows), device="cpu"), list(rows)

    def _is_field(self, key: CoordinateMapKey, n_rows: int) -> bool:
        """Return whether a key with this number of features belongs to a field, not to a map."""
        if key.value not in self._fields:
            return False
        found = self._maps.get(key.value)
        return found is None or found.num_rows != n_rows

    def _field(self, key: CoordinateMapKey) -> CoordinateField:
        found = self._fields.get(key.value)
        if found is None:
            raise MinkowskiError(f"{key} is not a field of this coordinate manager: {self}.")
        return found

    def interpolation_map_weight(
        self, key: CoordinateMapKey, samples: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows and weights of a linear interpolation at points.

        Args:
            key: The map to read.
            samples: Points, float [M, 1 + D]; the batch index is rounded.

        Returns:
            Map rows, int32 [n]; samples, int32 [n]; weights [n] in the samples' dtype. There is one
            entry for each corner of a sample's cell that is in the map.

        This call waits for the device.
        """
        rows, weights = corners(self._map(key), samples)
        sample, corner = (rows >= 0).nonzero(as_tuple=True)
        return rows[sample, corner].int(), sample.int(), weights[sample, corner]
