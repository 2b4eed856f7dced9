"""TensorField: features at points of any coordinates."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor as TorchTensor

from compat.minkowski._errors import MinkowskiError
from compat.minkowski._fields import corners
from compat.minkowski._int32 import to_int32
from compat.minkowski._keys import CoordinateMapKey
from compat.minkowski._names import module_getattr
from compat.minkowski._quantization import REDUCTIONS, reduce_rows
from compat.minkowski._shared_manager import manager_for
from compat.minkowski.enums import (
    GPUMemoryAllocatorType,
    MinkowskiAlgorithm,
    SparseTensorQuantizationMode,
)
from compat.minkowski.MinkowskiCommon import StrideType, renamed_arguments
from compat.minkowski.MinkowskiCoordinateManager import CoordinateManager
from compat.minkowski.MinkowskiSparseTensor import SparseTensor
from compat.minkowski.MinkowskiTensor import Tensor, checked_inputs
from tritonspconv import ops

_MODES = (
    SparseTensorQuantizationMode.UNWEIGHTED_AVERAGE,
    SparseTensorQuantizationMode.UNWEIGHTED_SUM,
    SparseTensorQuantizationMode.RANDOM_SUBSAMPLE,
    SparseTensorQuantizationMode.MAX_POOL,
)


def create_splat_coordinates(coordinates: TorchTensor) -> TorchTensor:
    """Return the ``2^D`` corners of each point's unit cell, int32 [N * 2^D, 1 + D].

    Raises:
        MinkowskiError: A corner is not finite or lies beyond int32.
    """
    ndim = coordinates.shape[1] - 1
    bits = list(itertools.product((0, 1), repeat=ndim))
    offsets = torch.tensor([(0, *bit) for bit in bits], device=coordinates.device)
    lower = coordinates.detach().floor()
    lower[:, 0] = coordinates[:, 0].round()
    return to_int32((to_int32(lower)[:, None] + offsets).flatten(0, 1))


@renamed_arguments(
    feats="features",
    coords="coordinates",
    coords_manager="coordinate_manager",
)
class TensorField(Tensor):
    """Features [N, C] at points, which may share cells.

    Args:
        features: [N, C], floating point.
        coordinates: [N, 1 + D], floating point, batch index first, in voxels; kept as given.
        tensor_stride: Tensor stride of the key; int or one per axis.
        coordinate_field_map_key: Key of the points to use instead of coordinates.
        coordinate_manager: Manager of the points; a new one by default.
        quantization_mode: The rule of :meth:`sparse` for the points of a cell: UNWEIGHTED_AVERAGE,
            UNWEIGHTED_SUM, RANDOM_SUBSAMPLE (the first) or MAX_POOL.
        allocator_type, minkowski_algorithm: Labels of a new manager.
        requires_grad: True: the features require a gradient.
        device: Features and coordinates are moved to this device first.

    Attributes:
        unique_index: The first point of each cell, int64 [U], of the newest :meth:`sparse` without
            a key; there is none before.

    Raises:
        MinkowskiError: Arguments disagree.
    """

    unique_index: TorchTensor

    def __init__(
        self,
        features: TorchTensor,
        coordinates: TorchTensor | None = None,
        tensor_stride: StrideType = 1,
        coordinate_field_map_key: CoordinateMapKey | None = None,
        coordinate_manager: CoordinateManager | None = None,
        quantization_mode: SparseTensorQuantizationMode = (
            SparseTensorQuantizationMode.UNWEIGHTED_AVERAGE
        ),
        allocator_type: GPUMemoryAllocatorType | None = None,
        minkowski_algorithm: MinkowskiAlgorithm | None = None,
        requires_grad: bool | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if quantization_mode not in _MODES:
            raise MinkowskiError(
                f"TensorField: quantization_mode must be one of {[mode.name for mode in _MODES]}; "
                f"got {quantization_mode!r}."
            )
        features, coordinates = checked_inputs(features, coordinates, device)
        if coordinates is None:
            if coordinate_field_map_key is None or coordinate_manager is None:
                raise MinkowskiError(
                    "TensorField: give coordinates, or coordinate_field_map_key and "
                    "coordinate_manager."
                )
            # Raises where the key is not set.
            coordinate_field_map_key.value  # noqa: B018
        else:
            if coordinate_field_map_key is not None:
                raise MinkowskiError(
                    "TensorField: give coordinates or coordinate_field_map_key, not both."
                )
            if coordinate_manager is None:
                coordinate_manager = manager_for(coordinates, allocator_type, minkowski_algorithm)
            # Float64 holds every int32, float32 those up to 2**24.
            points = coordinates if coordinates.is_floating_point() else coordinates.double()
            coordinate_field_map_key = coordinate_manager.insert_field(points, tensor_stride, "")
        if requires_grad is not None:
            features.requires_grad_(requires_grad)
        self.quantization_mode = quantization_mode
        self._F = features
        self._C = coordinates
        self._D = coordinate_manager.D
        self._manager = coordinate_manager
        self._batch_rows = None
        self.coordinate_field_map_key = coordinate_field_map_key
        self._inverse_mapping: dict[CoordinateMapKey, TorchTensor] = {}
        self._splat: dict[CoordinateMapKey, tuple[TorchTensor, TorchTensor]] = {}

    @property
    def coordinate_key(self) -> CoordinateMapKey:
        """The key of the points."""
        return self.coordinate_field_map_key

    def _with_features(self, features: TorchTensor) -> TensorField:
        return TensorField(
            features,
            coordinate_field_map_key=self.coordinate_field_map_key,
            coordinate_manager=self._manager,
            quantization_mode=self.quantization_mode,
        )

    def _get_coordinates(self) -> TorchTensor:
        return self._get_coordinate_field()

    def _get_coordinate_field(self) -> TorchTensor:
        """Return a copy of the points of this field's key, [N, 1 + D]."""
        return self._manager.get_coordinate_field(self.coordinate_field_map_key)

    def _origin_map(self) -> list[TorchTensor]:
        return self._manager.origin_field_map(self.coordinate_field_map_key)[1]

    def sparse(
        self,
        tensor_stride: StrideType = 1,
        coordinate_map_key: CoordinateMapKey | None = None,
        quantization_mode: SparseTensorQuantizationMode | None = None,
    ) -> SparseTensor:
        """Return one row of features for every cell that holds points.

        Args:
            tensor_stride: Extent of the cells; int or one per axis.
            coordinate_map_key: Map whose sites to use instead; points in none of its cells are left
                out, and a site without points is 0.
            quantization_mode: The rule for the points of a cell; None: the rule of the field.

        Every call without a key adds a map. This call waits for the device. Differentiable.
        """
        mode = self.quantization_mode if quantization_mode is None else quantization_mode
        if coordinate_map_key is not None:
            return self._sparse_on(coordinate_map_key, mode)
        key, (rows, position) = self._manager.field_to_sparse_insert_and_map(
            self.coordinate_field_map_key, tensor_stride
        )
        self._inverse_mapping[key] = position
        self.unique_index = rows
        features = reduce_rows(self._F, rows, position, mode)
        return SparseTensor._on(features, key, self._manager)

    def _sparse_on(self, key: CoordinateMapKey, mode: SparseTensorQuantizationMode) -> SparseTensor:
        rows, points = self._manager.field_to_sparse_map(self.coordinate_field_map_key, key)
        n_sites = self._manager.size(key)
        if mode is SparseTensorQuantizationMode.RANDOM_SUBSAMPLE:
            first = torch.full((n_sites,), len(self._F), device=self.device)
            first.scatter_reduce_(0, rows, points, "amin")
            first = first.where(first < len(self._F), -1)[:, None]
            ones = torch.ones_like(first, dtype=self._F.dtype)
            features = ops.gather_weighted(self._F, first, ones)
        else:
            if mode not in REDUCTIONS:
                raise MinkowskiError(f"TensorField.sparse: no reduction of points; got {mode}.")
            features = ops.global_pool(self._F[points], rows, n_sites, REDUCTIONS[mode])
        return SparseTensor._on(features, key, self._manager)

    def splat(self) -> SparseTensor:
        """Return features spread to the ``2^D`` integer neighbours of each point, linearly.

        ``SparseTensor.interpolate`` with this field reads them back with the same weights.
        """
        key, _ = self._manager.insert_and_map(create_splat_coordinates(self.C))
        found = self._manager._map(key)
        rows, weights = corners(found, self.C)
        self._splat[key] = (rows, weights)
        features = ops.scatter_weighted(self._F, rows, weights, found.num_rows)
        return SparseTensor._on(features, key, self._manager)

    def inverse_mapping(self, sparse_tensor_map_key: CoordinateMapKey) -> TorchTensor:
        """Return the row of each point in a map, int64 [N]: the row of the point's cell.

        Works for every map of the manager, at any stride.

        Raises:
            MinkowskiError: Some point's cell is not in the map, as after pruning.
        """
        found = self._inverse_mapping.get(sparse_tensor_map_key)
        if found is None:
            rows, points = self._manager.field_to_sparse_map(
                self.coordinate_field_map_key, sparse_tensor_map_key
            )
            if len(points) < len(self._F):
                raise MinkowskiError(
                    f"{len(self._F) - len(points)} of {len(self._F)} points lie in no cell of "
                    f"{sparse_tensor_map_key}. Use interpolate(), which counts them as 0."
                )
            found = self._inverse_mapping[sparse_tensor_map_key] = rows
        return found

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(\n  coordinates={self.C}\n  features={self._F}\n"
            f"  coordinate_field_map_key={self.coordinate_field_map_key}\n"
            f"  coordinate_manager={self._manager}\n  spatial dimension={self._D})"
        )


Tensor._field_class = TensorField

__getattr__ = module_getattr(__name__)
