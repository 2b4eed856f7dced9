"""SparseTensor: features at the sites of a coordinate map."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor as TorchTensor

from compat.minkowski._coordinate_map import CoordinateMap
from compat.minkowski._dense import to_dense, to_torch_sparse
from compat.minkowski._errors import MinkowskiError
from compat.minkowski._int32 import to_int32
from compat.minkowski._keys import CoordinateMapKey
from compat.minkowski._names import module_getattr
from compat.minkowski._point_features import PointFeatures
from compat.minkowski._quantization import reduce_rows
from compat.minkowski._shared_manager import manager_for
from compat.minkowski.enums import (
    GPUMemoryAllocatorType,
    MinkowskiAlgorithm,
    SparseTensorQuantizationMode,
)
from compat.minkowski.MinkowskiCommon import StrideType, renamed_arguments
from compat.minkowski.MinkowskiCoordinateManager import CoordinateManager
from compat.minkowski.MinkowskiTensor import Tensor, checked_inputs
from compat.minkowski.sparse_matrix_functions import (
    MinkowskiSPMMAverageFunction as MinkowskiSPMMAverageFunction,
)
from compat.minkowski.sparse_matrix_functions import (
    MinkowskiSPMMFunction as MinkowskiSPMMFunction,
)
from tritonspconv.coords import ActiveSites
from tritonspconv.coords.row_tensor import bounds_of

if TYPE_CHECKING:
    from typing_extensions import Self


@renamed_arguments(
    feats="features",
    coords="coordinates",
    coords_key="coordinate_map_key",
    coords_manager="coordinate_manager",
    force_creation="nothing: a key that is taken gets a fresh id",
    allow_duplicate_coords="quantization_mode",
)
class SparseTensor(PointFeatures):
    """Features [N, C] at distinct sites, from coordinates or on a coordinate map there is.

    Args:
        features: [N, C], any dtype.
        coordinates: int32 [N, 1 + D], batch index first, in input units, negative or not. Other
            types are rounded down, with a warning.
        tensor_stride: Input units between neighbouring sites; int or one per axis.
        coordinate_map_key: Key of the map to use instead of coordinates.
        coordinate_manager: Manager of the map; a new one by default.
        quantization_mode: The rule for features whose coordinates repeat: RANDOM_SUBSAMPLE, the
            first is kept; UNWEIGHTED_AVERAGE, UNWEIGHTED_SUM, MAX_POOL; NO_QUANTIZATION, none may
            repeat.
        allocator_type, minkowski_algorithm: Labels of a new manager.
        requires_grad: True: the features require a gradient.
        device: Features and coordinates are moved to this device first.

    Attributes:
        unique_index: Rows of ``features`` whose coordinates were kept, int64 [U], ascending. Only
            of a tensor made from coordinates.
        inverse_mapping: Row of this tensor for each of the N, int64. Only of a tensor made from
            coordinates.

    Raises:
        MinkowskiError: Arguments disagree, coordinates are no int32 or their batch index is
            negative, or they repeat with NO_QUANTIZATION.

    The constructor waits for the device if it gets coordinates.
    """

    unique_index: TorchTensor

    def __init__(
        self,
        features: TorchTensor,
        coordinates: TorchTensor | None = None,
        tensor_stride: StrideType = 1,
        coordinate_map_key: CoordinateMapKey | None = None,
        coordinate_manager: CoordinateManager | None = None,
        quantization_mode: SparseTensorQuantizationMode = (
            SparseTensorQuantizationMode.RANDOM_SUBSAMPLE
        ),
        allocator_type: GPUMemoryAllocatorType | None = None,
        minkowski_algorithm: MinkowskiAlgorithm | None = None,
        requires_grad: bool | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(quantization_mode, SparseTensorQuantizationMode):
            raise MinkowskiError(
                f"quantization_mode must be a SparseTensorQuantizationMode; got "
                f"{quantization_mode!r}."
            )
        features, coordinates = checked_inputs(features, coordinates, device)
        self.quantization_mode = quantization_mode
        if coordinates is None:
            if coordinate_map_key is None or coordinate_manager is None:
                raise MinkowskiError(
                    "SparseTensor: give coordinates, or coordinate_map_key and coordinate_manager."
                )
            # Raises where the key is not set.
            coordinate_map_key.value  # noqa: B018
        else:
            if coordinate_map_key is not None:
                raise MinkowskiError(
                    "SparseTensor: give coordinates or coordinate_map_key, not both."
                )
            if coordinate_manager is None:
                coordinate_manager = manager_for(coordinates, allocator_type, minkowski_algorithm)
            coordinate_map_key, features = self._insert(
                coordinates, features, tensor_stride, coordinate_manager
            )
        if requires_grad is not None:
            features.requires_grad_(requires_grad)
        self._set(features, coordinate_map_key, coordinate_manager)

    def _set(
        self, features: TorchTensor, key: CoordinateMapKey, manager: CoordinateManager
    ) -> None:
        self._F = features
        self._C = None
        self._D = manager.D
        self._manager = manager
        self._batch_rows = None
        self.coordinate_map_key = key

    @classmethod
    def _on(
        cls, features: TorchTensor, key: CoordinateMapKey, manager: CoordinateManager
    ) -> SparseTensor:
        """Return a tensor of features on a map. Layers call this; nothing is checked."""
        made = SparseTensor.__new__(SparseTensor)
        made.quantization_mode = SparseTensorQuantizationMode.RANDOM_SUBSAMPLE
        made._set(features, key, manager)
        return made

    def _insert(
        self,
        coordinates: TorchTensor,
        features: TorchTensor,
        tensor_stride: StrideType,
        manager: CoordinateManager,
        string_id: str = "",
    ) -> tuple[CoordinateMapKey, TorchTensor]:
        """Add a map of ``coordinates``; return its key and the features of its rows."""
        if coordinates.dtype != torch.int32:
            warnings.warn(
                f"coordinates are rounded down from {coordinates.dtype} to int32; pass "
                "coordinates.floor().int() to silence this.",
                stacklevel=4,
            )
            coordinates = to_int32(coordinates)
        key, (rows, position) = manager.insert_and_map(coordinates, tensor_stride, string_id)
        self.unique_index = rows
        self.inverse_mapping = position
        return key, reduce_rows(features, rows, position, self.quantization_mode)

    def initialize_coordinates(
        self,
        coordinates: TorchTensor,
        features: TorchTensor,
        coordinate_map_key: CoordinateMapKey,
    ) -> tuple[TorchTensor, TorchTensor, CoordinateMapKey]:
        """Add a map of coordinates to this tensor's manager, as the constructor does.

        Args:
            coordinates: [N, 1 + D], batch index first.
            features: [N, C], combined by the quantisation mode of this tensor.
            coordinate_map_key: Tensor stride and id that the map is to have, set.

        Returns:
            Coordinates and features of the map's rows, and its key. ``unique_index`` and
            ``inverse_mapping`` of this tensor are those of the new rows.
        """
        tensor_stride, string_id = coordinate_map_key.get_key()
        key, features = self._insert(coordinates, features, tensor_stride, self._manager, string_id)
        return self._manager.get_coordinates(key), features, key

    def _row_tensors(self) -> tuple[TorchTensor, TorchTensor]:
        """Return features and coordinates; see :class:`tritonspconv.has_rows.HasRows`."""
        return self.F, self.C

    def _grid_of_rows(self) -> str:
        """Return the tensor stride; every run finds the box around its coordinates itself."""
        return f"tensor_stride {self.tensor_stride}"

    def _with_row_tensors(self, feats: TorchTensor, coords: TorchTensor) -> SparseTensor:
        """Return other rows of the same tensor stride, in a manager of their own.

        Padded rows of a run make a map as the constructor does. Other rows, such as those of a
        result, are known to be distinct and in the box of this tensor: the host does not wait.
        """
        bounds = bounds_of(coords)
        if bounds is not None and bounds.plan.is_running:
            made = SparseTensor(feats, coords, self.tensor_stride)
            made.quantization_mode = self.quantization_mode
            return made
        manager = CoordinateManager(D=self._D)
        key = manager._insert_distinct(coords, self._manager, self.coordinate_map_key)
        return SparseTensor._on(feats, key, manager)

    def _rows_in_cells(self) -> tuple[TorchTensor, ActiveSites]:
        """Return features and sites.

        Raises:
            MinkowskiError: The tensor stride does not divide the coordinates.
        """
        found = self._manager._map(self.coordinate_map_key)
        if found.unit != found.tensor_stride:
            raise MinkowskiError(
                f"the coordinates are not multiples of the tensor stride {self.tensor_stride}, so "
                "that they have no cells. Divide them, and use tensor_stride=1."
            )
        return self.F, found.sites

    def _with_rows_in_cells(self, feats: TorchTensor, coords: TorchTensor) -> SparseTensor:
        """Return rows at other cells of the same size, in a manager of their own."""
        old = self._manager._map(self.coordinate_map_key)
        sites = ActiveSites(coords, old.sites.grid)
        manager = CoordinateManager(D=self._D)
        key = manager._add(CoordinateMap(sites, old.tensor_stride, old.unit), "")
        return SparseTensor._on(feats, key, manager)

    @property
    def coordinate_key(self) -> CoordinateMapKey:
        """The key of the coordinates."""
        return self.coordinate_map_key

    def _with_features(self, features: TorchTensor) -> Self:
        return type(self)(
            features,
            coordinate_map_key=self.coordinate_map_key,
            coordinate_manager=self._manager,
        )

    def _get_coordinates(self) -> TorchTensor:
        return self._manager.get_coordinates(self.coordinate_map_key)

    def _origin_map(self) -> list[TorchTensor]:
        return self._manager.origin_map(self.coordinate_map_key)[1]

    def _has_rows_of(self, other: Tensor) -> bool:
        return self._manager._have_equal_rows(self.coordinate_key, other.coordinate_key)

    def _on_union(self, other: Tensor, function: Callable[[Any, Any], TorchTensor]) -> Self:
        """Combine two tensors on the union of their coordinates.

        ``function`` is applied at the rows of ``other``; this tensor counts as 0 where it has no
        row. Rows that only this tensor has keep their features, for every function.
        """
        key = CoordinateMapKey(1 + self._D)
        own, others = self._manager.union_map([self.coordinate_key, other.coordinate_key], key)
        dtype = torch.promote_types(self.dtype, other.dtype)
        start = self._F.new_zeros(self._manager.size(key), self._F.shape[1], dtype=dtype)
        start = start.index_copy(0, own[1], self._F.to(dtype))
        changed = function(start.index_select(0, others[1]), other.F)
        return type(self)(
            start.index_copy(0, others[1], changed),
            coordinate_map_key=key,
            coordinate_manager=self._manager,
        )

    def to(self, *args: Any, **kwargs: Any) -> SparseTensor:
        """Return features converted as :meth:`torch.Tensor.to` does it.

        On another device the coordinates are in a new manager, which knows none of the old maps.
        """
        features = self._F.to(*args, **kwargs)
        if features.device == self.device:
            return SparseTensor._on(features, self.coordinate_map_key, self._manager)
        manager = CoordinateManager(D=self._D)
        key, _ = manager.insert_and_map(
            self.C.to(features.device), *self.coordinate_map_key.get_key()
        )
        return SparseTensor._on(features, key, manager)

    def cpu(self) -> SparseTensor:
        """Return the tensor on the CPU; see :meth:`to`."""
        return self.to("cpu")

    def cuda(self, device: torch.device | str | int | None = None) -> SparseTensor:
        """Return the tensor on a GPU; see :meth:`to`."""
        return self.to(torch.device("cuda") if device is None else device)

    # Conversions

    def dense(
        self,
        shape: torch.Size | None = None,
        min_coordinate: TorchTensor | None = None,
        contract_stride: bool = True,
    ) -> tuple[TorchTensor, TorchTensor, TorchTensor]:
        """Return a dense tensor, zero where there is no site.

        Args:
            shape: ``[B, C, *spatial]``; C follows the features. None: up to the largest coordinate.
            min_coordinate: Coordinate of the first cell, int32 [D], a multiple of the tensor
                stride. None: the origin; then no coordinate may be negative.
            contract_stride: One cell for each step of the tensor stride, else for each input unit.

        Returns:
            ``[B, C, *spatial]``; ``min_coordinate`` or the least coordinate, int32 [1, D]; the
            tensor stride, int32 [D].

        Raises:
            MinkowskiError: A coordinate lies outside, or ``min_coordinate`` off the stride's grid.

        Waits for the device. Differentiable.
        """
        return to_dense(self.F, self.C, self.tensor_stride, shape, min_coordinate, contract_stride)

    def sparse(
        self,
        min_coords: TorchTensor | None = None,
        max_coords: TorchTensor | None = None,
        contract_coords: bool = True,
    ) -> tuple[TorchTensor, TorchTensor, TorchTensor]:
        """Return a torch sparse COO tensor ``[B, *spatial, C]``.

        Args:
            min_coords: Coordinate of the first cell, int32 [D]. None: the least coordinate.
            max_coords: Coordinate of the last cell, int32 [D]. None: the largest coordinate.
            contract_coords: Count cells in steps of the tensor stride.

        Returns:
            The sparse tensor; the first cell's coordinate, in cells if contracted, int32 [1, D];
            the tensor stride, int32 [D].

        Waits for the device. Differentiable.
        """
        return to_torch_sparse(
            self.F, self.C, self.tensor_stride, min_coords, max_coords, contract_coords
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(\n  coordinates={self.C}\n  features={self._F}\n"
            f"  coordinate_map_key={self.coordinate_map_key}\n"
            f"  coordinate_manager={self._manager}\n  spatial dimension={self._D})"
        )


Tensor._sparse_class = SparseTensor

# The sites at which a layer computes its outputs.
Coordinates = TorchTensor | CoordinateMapKey | SparseTensor


def _get_coordinate_map_key(
    input: SparseTensor,
    coordinates: Coordinates | None = None,
    tensor_stride: StrideType = 1,
    expand_coordinates: bool = False,
) -> CoordinateMapKey:
    """Return the key that a layer's ``coordinates`` argument stands for.

    Args:
        input: The layer's input.
        coordinates: A tensor or a key of the input's manager; or integer coordinates, which are
            inserted into it. None: a key that is not set, for a function to set.
        tensor_stride: Tensor stride of inserted coordinates.
        expand_coordinates: True: return a key that is not set, for any ``coordinates``.
    """
    if coordinates is None or expand_coordinates:
        return CoordinateMapKey(1 + input.D)
    if isinstance(coordinates, CoordinateMapKey):
        return coordinates
    if isinstance(coordinates, SparseTensor):
        input._check_manager(coordinates)
        return coordinates.coordinate_map_key
    if isinstance(coordinates, TorchTensor):
        return input._manager.insert_and_map(coordinates, tensor_stride)[0]
    raise MinkowskiError(
        "coordinates must be a SparseTensor, a CoordinateMapKey or an integer torch.Tensor; got "
        f"{type(coordinates).__name__}."
    )


__getattr__ = module_getattr(__name__)
