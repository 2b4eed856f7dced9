"""CoordinateManager: coordinate maps by key, and the kernel maps between them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Container
from typing import Any, NoReturn

import torch
from torch import Tensor

from compat.minkowski import _maps
from compat.minkowski._coordinate_map import CoordinateMap, IntTuple, as_coordinates, common_unit
from compat.minkowski._errors import MinkowskiError
from compat.minkowski._fields import CoordinateField, corners
from compat.minkowski._keys import CoordinateMapKey, KeyValue
from compat.minkowski.enums import (
    CoordinateMapType,
    GPUMemoryAllocatorType,
    MinkowskiAlgorithm,
    RegionType,
)
from compat.minkowski.MinkowskiCommon import StrideType, convert_to_int_list
from compat.minkowski.MinkowskiKernelGenerator import KernelGenerator, Window
from tritonspconv.coords import ActiveSites, Grid, union_sites
from tritonspconv.kernel_map import KernelMap

_allocator_type = GPUMemoryAllocatorType.PYTORCH
_coordinate_map_type: CoordinateMapType | None = None


def set_coordinate_map_type(coordinate_map_type: CoordinateMapType) -> None:
    """Set the label that new managers get; maps live where their coordinates are."""
    global _coordinate_map_type
    _coordinate_map_type = coordinate_map_type


def set_gpu_allocator(backend: GPUMemoryAllocatorType) -> None:
    """Set the label that new managers get; torch allocates all memory."""
    global _allocator_type
    if not isinstance(backend, GPUMemoryAllocatorType):
        raise MinkowskiError(f"expected a GPUMemoryAllocatorType; got {backend!r}.")
    _allocator_type = backend


def set_memory_manager_backend(backend: GPUMemoryAllocatorType) -> None:
    """Call :func:`set_gpu_allocator`, the function's name since 0.5."""
    warnings.warn("set_memory_manager_backend is now set_gpu_allocator.", stacklevel=2)
    set_gpu_allocator(backend)


class CoordsManager:
    """The name of :class:`CoordinateManager` in MinkowskiEngine 0.4; raises."""

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise DeprecationWarning("CoordsManager is MinkowskiEngine 0.4; use CoordinateManager.")


class CoordinateManager:
    """Coordinate maps by key, and the maps between them; shared by the tensors made from one.

    Args:
        D: Number of spatial axes.
        num_threads: Accepted; torch's setting holds.
        coordinate_map_type, allocator_type, minkowski_algorithm: Kept as labels.

    Raises:
        MinkowskiError: ``D`` is less than 1.
    """

    def __init__(
        self,
        D: int = 0,
        num_threads: int = -1,
        coordinate_map_type: CoordinateMapType | None = None,
        allocator_type: GPUMemoryAllocatorType | None = None,
        minkowski_algorithm: MinkowskiAlgorithm | None = None,
    ) -> None:
        if D < 1:
            raise MinkowskiError(f"D, the number of spatial axes, must be at least 1; got {D}.")
        self.D = D
        self.coordinate_map_type = coordinate_map_type or _coordinate_map_type
        self.allocator_type = allocator_type or _allocator_type
        self.minkowski_algorithm = minkowski_algorithm or MinkowskiAlgorithm.DEFAULT
        self._maps: dict[KeyValue, CoordinateMap] = {}
        self._fields: dict[KeyValue, CoordinateField] = {}
        self._field_maps: dict[tuple[KeyValue, KeyValue], tuple[Tensor, Tensor]] = {}
        self._kernel_maps: dict[Any, KernelMap] = {}
        self._strided: dict[tuple[KeyValue, IntTuple, str], CoordinateMapKey] = {}
        self._ids = itertools.count()

    # Coordinate maps

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

        Waits for the device.
        """
        steps = tuple(convert_to_int_list(tensor_stride, self.D))
        coordinates = as_coordinates(coordinates, self.D)
        made, rows, position = CoordinateMap.around(coordinates, steps)
        return self._add(made, string_id), (rows, position)

    def stride(
        self, coordinate_map_key: CoordinateMapKey, stride: StrideType, string_id: str = ""
    ) -> CoordinateMapKey:
        """Return the key of the occupied cells of a ``stride`` times coarser map.

        It has the id of the given key, or ``string_id``. A map that has that key already is used as
        it is.
        """
        steps = tuple(convert_to_int_list(stride, self.D))
        return self._strided_key(coordinate_map_key, steps, string_id)

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
            self._maps[value] = _maps.strided_sites(self._map(key), coarser)
        found = self._strided[key.value, steps, string_id] = CoordinateMapKey.of(value)
        return found

    def origin(self) -> CoordinateMapKey:
        """Return the key of the map with one site per sample, at 0, of tensor stride 0."""
        return self._origin(
            max((found.batch_size for found in self._maps.values()), default=0),
            next((found.sites.device for found in self._maps.values()), torch.device("cpu")),
        )

    def _origin(self, batch_size: int, device: torch.device) -> CoordinateMapKey:
        value = ((0,) * self.D, "")
        known = self._maps.get(value)
        if known is None or known.num_rows < batch_size:
            coords = torch.zeros(batch_size, 1 + self.D, dtype=torch.int32, device=device)
            coords[:, 0] = torch.arange(batch_size, device=device)
            grid = Grid((0,) * self.D, (1,) * self.D, batch_size, bounded=False)
            ones = (1,) * self.D
            self._maps[value] = CoordinateMap(ActiveSites(coords, grid), value[0], ones)
        return CoordinateMapKey.of(value)

    def size(self, coordinate_map_key: CoordinateMapKey) -> int:
        """Return the number of sites of a map."""
        return self._map(coordinate_map_key).num_rows

    def get_coordinates(self, coords_key_or_tensor_strides: Any) -> Tensor:
        """Return the coordinates of a key, or of the first map of a tensor stride, int32."""
        key = self._get_coordinate_map_key(coords_key_or_tensor_strides)
        return self._map(key).coordinates()

    def number_of_unique_batch_indices(self) -> int:
        """Return the number of samples: one more than the largest batch index."""
        return self.size(self.origin())

    def get_batch_indices(self) -> list[int]:
        """Return the batch indices, ascending."""
        return list(range(self.number_of_unique_batch_indices()))

    def get_unique_coordinate_map_key(self, tensor_stride: StrideType) -> CoordinateMapKey:
        """Return a key of a tensor stride that no map has."""
        steps = tuple(convert_to_int_list(tensor_stride, self.D))
        return CoordinateMapKey.of(self._fresh(self._maps, steps, ""))

    def _get_coordinate_map_key(self, key_or_tensor_strides: Any) -> CoordinateMapKey:
        if isinstance(key_or_tensor_strides, CoordinateMapKey):
            return key_or_tensor_strides
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
            number = f"{next(self._ids):05d}"
            value = (tensor_stride, f"{string_id}-{number}" if string_id else number)
        return value

    # Maps that layers write

    def _convolution_key(
        self,
        in_key: CoordinateMapKey,
        generator: KernelGenerator,
        is_transpose: bool,
        in_cells: bool = False,
    ) -> CoordinateMapKey:
        """Return the output key of a convolution, whose sites are generated where need be."""
        if not is_transpose and not generator.expand_coordinates:
            return self._strided_key(in_key, generator._stride)
        tensor_stride, _ = in_key.value
        axes = list(zip(tensor_stride, generator.kernel_stride, strict=True))
        if not is_transpose:
            coarser = tuple(ts * step for ts, step in axes)
            made = _maps.expanded_sites(self._map(in_key), coarser, generator._window)
            return self._add(made, "")
        finer = tuple(ts // step for ts, step in axes)
        if any(ts % step or not ts for ts, step in axes):
            raise MinkowskiError(
                f"a transposed layer needs a tensor stride that its stride divides; got tensor "
                f"stride {list(tensor_stride)} and stride {generator.kernel_stride}."
            )
        if not generator.expand_coordinates and (finer, "") in self._maps:
            return CoordinateMapKey.of((finer, ""))
        window = generator._window.cells() if in_cells else generator._window
        made = _maps.generated_sites(self._map(in_key), finer, window)
        return self._add(made, "")

    def _prune(self, key: CoordinateMapKey, mask: Tensor) -> tuple[CoordinateMapKey, Tensor]:
        """Return the key of the rows with True, and these rows, int64."""
        rows = mask.nonzero().squeeze(1)
        return self._add(self._map(key).select(rows), "pruned"), rows

    # Kernel maps

    def _kernel_map(
        self,
        in_key: CoordinateMapKey,
        out_key: CoordinateMapKey,
        window: Window,
        is_transpose: bool = False,
        in_cells: bool = False,
    ) -> KernelMap:
        """Return the kernel map of a window, or of the cells of the coarser side."""
        values = (in_key.value, out_key.value)
        cache_key = (*values, window, is_transpose, in_cells)
        found = self._kernel_maps.get(cache_key)
        if found is not None:
            return found
        ends = self._map(in_key), self._map(out_key)
        if not is_transpose:
            found = _maps.cell_map_between(*ends) if in_cells else _maps.map_between(*ends, window)
        else:
            downwards = self._kernel_maps.get((*values[::-1], window, False, in_cells))
            if downwards is not None:
                found = downwards.inverse()
            elif in_cells:
                found = _maps.cell_map_between(*ends[::-1]).inverse()
            else:
                found = _maps.transposed_map_between(*ends, window)
        self._kernel_maps[cache_key] = found
        return found

    def kernel_map(
        self,
        in_key: Any,
        out_key: Any,
        stride: StrideType = 1,
        kernel_size: StrideType = 3,
        dilation: StrideType = 1,
        region_type: RegionType = RegionType.HYPER_CUBE,
        region_offset: Tensor | None = None,
        is_transpose: bool = False,
        is_pool: bool = False,
    ) -> dict[int, Tensor]:
        """Return int32 [2, n] of (input rows, output rows) by tap; taps without pairs are absent.

        Args:
            in_key: Key of the input, or its tensor stride.
            out_key: Key of the output, or its tensor stride.
            stride: With ``is_pool``, a stride equal to the kernel size means cells: one entry, 0.
            kernel_size: Extent of the window; int or one per axis.
            dilation: Step between taps; int or one per axis.
            region_type: Shape of the window.
            region_offset: Taps of a CUSTOM region.
            is_transpose: Whether the output is the finer side.
            is_pool: Whether the map is a pool's.

        Waits for the device.
        """
        generator = KernelGenerator(
            kernel_size, stride, dilation, False, region_type, region_offset, dimension=self.D
        )
        in_cells = is_pool and generator.kernel_size == generator.kernel_stride
        keys = self._get_coordinate_map_key(in_key), self._get_coordinate_map_key(out_key)
        found = self._kernel_map(*keys, generator._window, is_transpose, in_cells)
        in_rows, out_rows, tap_ptr = found.pairs()
        pairs = torch.stack([in_rows.int(), out_rows.int()])
        if in_cells:
            return {0: pairs} if pairs.shape[1] else {}
        by_tap = enumerate(pairs.split(tap_ptr.diff().tolist(), dim=1))
        return {tap: part.contiguous() for tap, part in by_tap if part.shape[1]}

    def get_kernel_map(self, *args: Any, **kwargs: Any) -> dict[int, Tensor]:
        """Call :meth:`kernel_map`, the method's name since 0.5."""
        warnings.warn("get_kernel_map is now kernel_map.", stacklevel=2)
        return self.kernel_map(*args, **kwargs)

    def origin_map(self, key: CoordinateMapKey) -> tuple[Tensor, list[Tensor]]:
        """Return the batch indices, int64 [B], and the rows of each sample, int64, ascending."""
        rows = self._map(key).batch_rows()
        return torch.arange(len(rows)), list(rows)

    def stride_map(
        self, in_key: CoordinateMapKey, stride_key: CoordinateMapKey
    ) -> tuple[Tensor, Tensor]:
        """Return rows of a map and the rows of the coarser cells that they are in, int64 [n] each.

        Rows whose cell is not in the coarser map are left out. Waits for the device.
        """
        fine, coarse = self._map(in_key), self._map(stride_key)
        coordinates = fine.coordinates()
        steps = coordinates.new_tensor((1, *(max(ts, 1) for ts in coarse.tensor_stride)))
        cells = coordinates.div(steps, rounding_mode="floor") * steps
        rows = coarse.rows_of(cells)
        known = (rows >= 0).nonzero().squeeze(1)
        return known, rows[known]

    def union_map(self, in_keys: list[CoordinateMapKey], out_key: CoordinateMapKey) -> list[Tensor]:
        """Set ``out_key`` to the union of maps; its tensor stride is the least of each axis.

        Returns:
            For each map, int64 [2, n]: its rows, and the union's rows of the same sites.

        Waits for the device.
        """
        maps = [self._map(key) for key in in_keys]
        unit = maps[0].unit
        for other in maps[1:]:
            unit = common_unit(unit, other.unit)
        union, rows = union_sites([found.sites_in(unit) for found in maps])
        least = tuple(map(min, zip(*(found.tensor_stride for found in maps), strict=True)))
        value = self._fresh(self._maps, least, "merge")
        self._maps[value] = CoordinateMap(union, least, unit)
        out_key.set_key(*value)
        return [torch.stack([torch.arange(len(r), device=r.device), r]) for r in rows]

    # Fields: points of any coordinates

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
        """Return what :meth:`field_to_sparse_insert_and_map` returned: first points, map rows."""
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
        """Return the coordinates of points, float [N, 1 + D]."""
        return self._field(coords_key_or_tensor_strides).coordinates

    def origin_field(self) -> CoordinateMapKey:
        """Return the key of the origin, with a site for every sample of every field. May wait."""
        fields = self._fields.values()
        return self._origin(
            max((len(field.batch_rows()) for field in fields), default=0),
            next((field.coordinates.device for field in fields), torch.device("cpu")),
        )

    def origin_field_map(self, key: CoordinateMapKey) -> tuple[Tensor, list[Tensor]]:
        """Return the batch indices and the points of each sample; see :meth:`origin_map`."""
        rows = self._field(key).batch_rows()
        return torch.arange(len(rows)), list(rows)

    def _field(self, key: CoordinateMapKey) -> CoordinateField:
        found = self._fields.get(key.value)
        if found is None:
            raise MinkowskiError(f"{key} is not a field of this coordinate manager: {self}.")
        return found

    def interpolation_map_weight(
        self, key: CoordinateMapKey, samples: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what linear interpolation at points reads.

        Args:
            key: The map to read.
            samples: Points, float [M, 1 + D]; the batch index is rounded.

        Returns:
            Map rows, int32 [n]; samples, int32 [n]; weights [n] in the samples' dtype. One entry
            for each corner of a sample's cell that is in the map.

        Waits for the device.
        """
        rows, weights = corners(self._map(key), samples)
        sample, corner = (rows >= 0).nonzero(as_tuple=True)
        return rows[sample, corner].int(), sample.int(), weights[sample, corner]

    def __repr__(self) -> str:
        lines = [
            f"\t{list(steps)}{f'-{name}' if name else ''}:\t{found.num_rows}x{1 + self.D}"
            for (steps, name), found in self._maps.items()
        ]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])
