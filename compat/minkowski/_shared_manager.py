"""The coordinate manager that tensors share if asked to."""

from __future__ import annotations

from torch import Tensor

from compat.minkowski._errors import MinkowskiError
from compat.minkowski.enums import (
    CoordinateMapType,
    GPUMemoryAllocatorType,
    MinkowskiAlgorithm,
    SparseTensorOperationMode,
)
from compat.minkowski.MinkowskiCoordinateManager import CoordinateManager
from tritonspconv.coords.row_tensor import bounds_of

_sparse_tensor_operation_mode = SparseTensorOperationMode.SEPARATE_COORDINATE_MANAGER
_global_coordinate_manager: CoordinateManager | None = None


def set_sparse_tensor_operation_mode(operation_mode: SparseTensorOperationMode) -> None:
    """Set whether tensors made from coordinates get a coordinate manager each, or share one."""
    global _sparse_tensor_operation_mode
    if not isinstance(operation_mode, SparseTensorOperationMode):
        raise MinkowskiError(f"expected a SparseTensorOperationMode; got {operation_mode!r}.")
    _sparse_tensor_operation_mode = operation_mode


def sparse_tensor_operation_mode() -> SparseTensorOperationMode:
    """Return the current mode."""
    return _sparse_tensor_operation_mode


def global_coordinate_manager() -> CoordinateManager | None:
    """Return the shared coordinate manager; None: there is none yet."""
    return _global_coordinate_manager


def set_global_coordinate_manager(coordinate_manager: CoordinateManager | None) -> None:
    """Set the shared coordinate manager."""
    global _global_coordinate_manager
    _global_coordinate_manager = coordinate_manager


def clear_global_coordinate_manager() -> None:
    """Forget the shared coordinate manager: to be called after every step that used it."""
    set_global_coordinate_manager(None)


def manager_for(
    coordinates: Tensor,
    allocator_type: GPUMemoryAllocatorType | None,
    minkowski_algorithm: MinkowskiAlgorithm | None,
) -> CoordinateManager:
    """Return the shared manager in the mode that shares one, else a new one."""
    shares = _sparse_tensor_operation_mode is SparseTensorOperationMode.SHARE_COORDINATE_MANAGER
    if shares and bounds_of(coordinates) is not None:
        raise MinkowskiError(
            "capture: tensors of a captured function cannot share a coordinate manager with later "
            "calls. Call set_sparse_tensor_operation_mode(SparseTensorOperationMode."
            "SEPARATE_COORDINATE_MANAGER), and pass coordinate_manager=x.coordinate_manager where "
            "tensors of one call share it."
        )
    if shares and _global_coordinate_manager is not None:
        return _global_coordinate_manager
    made = CoordinateManager(
        D=coordinates.shape[1] - 1,
        coordinate_map_type=CoordinateMapType.CUDA
        if coordinates.is_cuda
        else CoordinateMapType.CPU,
        allocator_type=allocator_type,
        minkowski_algorithm=minkowski_algorithm,
    )
    if shares:
        set_global_coordinate_manager(made)
    return made
