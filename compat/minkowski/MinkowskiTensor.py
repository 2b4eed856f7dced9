"""The base of sparse tensors and fields."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor as TorchTensor

from compat.minkowski._errors import MinkowskiError
from compat.minkowski._keys import CoordinateMapKey
from compat.minkowski._names import module_getattr
from compat.minkowski._shared_manager import (
    clear_global_coordinate_manager,
    global_coordinate_manager,
    set_global_coordinate_manager,
    set_sparse_tensor_operation_mode,
    sparse_tensor_operation_mode,
)
from compat.minkowski._traced import derive, have_one_map, is_plain
from compat.minkowski.enums import SparseTensorOperationMode, SparseTensorQuantizationMode
from compat.minkowski.MinkowskiCommon import renamed_attribute
from compat.minkowski.MinkowskiCoordinateManager import CoordinateManager
from tritonspconv.graph_capture import is_traced, refuse_capture, run_untraced
from tritonspconv.guide import more

if TYPE_CHECKING:
    from typing_extensions import Self

    from compat.minkowski.MinkowskiSparseTensor import SparseTensor
    from compat.minkowski.MinkowskiTensorField import TensorField

__all__ = [
    "COORDINATE_KEY_DIFFERENT_ERROR",
    "COORDINATE_MANAGER_DIFFERENT_ERROR",
    "SparseTensorOperationMode",
    "SparseTensorQuantizationMode",
    "Tensor",
    "clear_global_coordinate_manager",
    "global_coordinate_manager",
    "set_global_coordinate_manager",
    "set_sparse_tensor_operation_mode",
    "sparse_tensor_operation_mode",
]

COORDINATE_MANAGER_DIFFERENT_ERROR = (
    "tensors must share a coordinate manager: make the second with "
    "coordinate_manager=first.coordinate_manager, or share one manager by "
    "set_sparse_tensor_operation_mode(SparseTensorOperationMode.SHARE_COORDINATE_MANAGER)."
)
COORDINATE_KEY_DIFFERENT_ERROR = "tensors must have the same coordinate_map_key"

_NAMES_SINCE_0_5 = {
    "coords": "coordinates",
    "feats": "features",
    "coords_key": "coordinate_map_key",
    "coords_man": "coordinate_manager",
}


def checked_inputs(
    features: Any, coordinates: Any, device: torch.device | str | None
) -> tuple[TorchTensor, TorchTensor | None]:
    """Return features and coordinates on the device of the tensor that is made of them.

    Raises:
        MinkowskiError: Types, shapes or devices disagree.
    """
    refuse_capture("SparseTensor")
    features = _matrix("features", "[N, C]", features, device)
    if coordinates is None:
        return features, None
    coordinates = _matrix("coordinates", "[N, 1 + D], batch index first", coordinates, device)
    if features.shape[0] != coordinates.shape[0]:
        raise MinkowskiError(
            f"features and coordinates must have the same number of rows; got "
            f"{features.shape[0]} and {coordinates.shape[0]}."
        )
    if features.device != coordinates.device:
        raise MinkowskiError(
            f"features and coordinates must be on one device; got {features.device} and "
            f"{coordinates.device}. Pass device= to move both."
        )
    return features, coordinates


def _matrix(name: str, shape: str, given: Any, device: torch.device | str | None) -> TorchTensor:
    if not isinstance(given, TorchTensor):
        raise MinkowskiError(
            f"{name} must be a torch.Tensor of shape {shape}; got {type(given).__name__}. Convert "
            "with torch.as_tensor."
        )
    if given.ndim != 2:
        raise MinkowskiError(
            f"{name} must be a torch.Tensor of shape {shape}; got {list(given.shape)}."
        )
    return given if device is None else given.to(device)


class Tensor:
    """Features ``F`` [N, C] at coordinates ``C`` [N, 1 + D], batch index first.

    The base of :class:`SparseTensor` and :class:`TensorField`.
    """

    # The class of fields. Its module sets it, so that sparse tensors make fields without an import
    # of the module that imports theirs.
    _field_class: ClassVar[type[TensorField]]
    # The class of sparse tensors; its module sets it.
    _sparse_class: ClassVar[type[SparseTensor]]
    # A tensor of a compiled graph: for each map that led to it, an empty tensor with its rows.
    _rows_of_maps: dict[str, TorchTensor] | None = None

    quantization_mode: SparseTensorQuantizationMode
    _F: TorchTensor
    _C: TorchTensor | None
    _D: int
    _manager: CoordinateManager
    _batch_rows: list[TorchTensor] | None

    @property
    def coordinate_key(self) -> CoordinateMapKey:
        """The key of the coordinates."""
        raise NotImplementedError

    def _with_features(self, features: TorchTensor) -> Self:
        """Return other features on these coordinates."""
        raise NotImplementedError

    def _get_coordinates(self) -> TorchTensor:
        raise NotImplementedError

    def _origin_map(self) -> list[TorchTensor]:
        raise NotImplementedError

    @property
    def coordinate_manager(self) -> CoordinateManager:
        """The manager of the coordinates."""
        return self._manager

    @property
    def tensor_stride(self) -> list[int]:
        """Input units between neighbouring sites, per axis."""
        return self.coordinate_key.get_tensor_stride()

    @property
    def C(self) -> TorchTensor:
        """The coordinates [N, 1 + D]; the same object at every access."""
        if self._C is None:
            self._C = self._get_coordinates()
        return self._C

    @property
    def coordinates(self) -> TorchTensor:
        """The coordinates; see :attr:`C`."""
        return self.C

    @property
    def F(self) -> TorchTensor:
        """The features [N, C]."""
        return self._F

    @property
    def features(self) -> TorchTensor:
        """The features [N, C]."""
        return self._F

    @property
    def D(self) -> int:
        """Number of spatial axes."""
        return self._D

    @property
    def dimension(self) -> int:
        """Number of spatial axes."""
        return self._D

    # By sample

    @property
    def _batchwise_row_indices(self) -> list[TorchTensor]:
        if self._batch_rows is None:
            self._batch_rows = self._origin_map()
        return self._batch_rows

    @property
    def _sorted_batchwise_row_indices(self) -> list[TorchTensor]:
        return self._batchwise_row_indices

    @property
    def decomposition_permutations(self) -> list[TorchTensor]:
        """The rows of each sample, int64, ascending; one entry up to the largest batch index."""
        return self._batchwise_row_indices

    @property
    def decomposed_coordinates(self) -> list[TorchTensor]:
        """The coordinates of each sample, [n, D]."""
        return [self.C[rows, 1:] for rows in self._batchwise_row_indices]

    @property
    def decomposed_features(self) -> list[TorchTensor]:
        """The features of each sample, [n, C]."""
        return [self._F[rows] for rows in self._batchwise_row_indices]

    @property
    def decomposed_coordinates_and_features(self) -> tuple[list[TorchTensor], list[TorchTensor]]:
        """Coordinates and features of each sample, in one order."""
        return self.decomposed_coordinates, self.decomposed_features

    def coordinates_at(self, batch_index: int) -> TorchTensor:
        """Return the coordinates of a sample, [n, D]."""
        return self.C[self._batchwise_row_indices[batch_index], 1:]

    def features_at(self, batch_index: int) -> TorchTensor:
        """Return the features of a sample, [n, C]."""
        return self._F[self._batchwise_row_indices[batch_index]]

    def coordinates_and_features_at(self, batch_index: int) -> tuple[TorchTensor, TorchTensor]:
        """Return coordinates and features of a sample, in one order."""
        return self.coordinates_at(batch_index), self.features_at(batch_index)

    # As a tensor

    @property
    def requires_grad(self) -> bool:
        """True if the features require a gradient."""
        return self._F.requires_grad

    def requires_grad_(self, requires_grad: bool = True) -> None:
        """Set whether the features require a gradient."""
        self._F.requires_grad_(requires_grad)

    def float(self) -> Self:
        """Convert the features of this very tensor to float32; return it."""
        self._F = self._F.float()
        return self

    def double(self) -> Self:
        """Convert the features of this very tensor to float64; return it."""
        self._F = self._F.double()
        return self

    def half(self) -> Self:
        """Convert the features of this very tensor to float16; return it."""
        self._F = self._F.half()
        return self

    def bfloat16(self) -> Self:
        """Convert the features of this very tensor to bfloat16; return it."""
        self._F = self._F.bfloat16()
        return self

    def detach(self) -> Self:
        """Detach the features of this very tensor; return it."""
        self._F = self._F.detach()
        return self

    def __len__(self) -> int:
        return len(self._F)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape of the features, or their extent along ``dim``."""
        return self._F.size() if dim is None else self._F.size(dim)

    @property
    def shape(self) -> torch.Size:
        """Shape of the features."""
        return self._F.shape

    @property
    def device(self) -> torch.device:
        """Device of the features."""
        return self._F.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the features."""
        return self._F.dtype

    def get_device(self) -> int:
        """Return the index of the GPU, -1 on the CPU."""
        return self._F.get_device()

    def __getattr__(self, name: str) -> Any:
        raise renamed_attribute(self, name, _NAMES_SINCE_0_5)

    # Arithmetic

    def _is_same_key(self, other: Tensor) -> None:
        self._check_manager(other)
        if not self._has_rows_of(other):
            raise MinkowskiError(
                f"{COORDINATE_KEY_DIFFERENT_ERROR}; got {self.coordinate_key} and "
                f"{other.coordinate_key}. Operators that make a new tensor, such as +, take the "
                "union of different coordinates." + more("same-sites")
            )

    def _has_rows_of(self, other: Tensor) -> bool:
        """Return whether both tensors have the same coordinates in the same order."""
        return self.coordinate_key == other.coordinate_key

    def _check_manager(self, other: Tensor) -> None:
        if self._manager is not other._manager:
            raise MinkowskiError(COORDINATE_MANAGER_DIFFERENT_ERROR + more("same-sites"))

    def _binary_functor(self, other: Any, binary_fn: Callable[[Any, Any], TorchTensor]) -> Any:
        """Return a tensor of ``binary_fn`` of both features, on the union where keys differ.

        Raises:
            MinkowskiError: ``other`` is neither of this kind, nor a torch tensor or number.
        """
        result = self._binary(other, binary_fn)
        if result is NotImplemented:
            raise MinkowskiError(
                f"{type(self).__name__} takes another {type(self).__name__}, a torch.Tensor or a "
                f"number; got {type(other).__name__}."
            )
        return result

    def _binary(self, other: Any, function: Callable[[Any, Any], TorchTensor]) -> Any:
        if is_traced():
            kind = self._sparse_class
            if have_one_map(self, other, kind):
                return derive(self, function(self._F, other._F))
            if is_plain(self, kind) and isinstance(other, (int, float)):
                return derive(self, function(self._F, other))
            return run_untraced(self._binary, other, function)
        if isinstance(other, Tensor):
            if not isinstance(other, type(self)) and not isinstance(self, type(other)):
                return NotImplemented
            self._check_manager(other)
            if not self._has_rows_of(other):
                return self._on_union(other, function)
            other = other.F
        elif not isinstance(other, (TorchTensor, int, float)):
            return NotImplemented
        return self._with_features(function(self._F, other))

    def _on_union(self, other: Any, function: Callable[[Any, Any], TorchTensor]) -> Any:
        raise MinkowskiError(
            f"{COORDINATE_KEY_DIFFERENT_ERROR}; got {self.coordinate_key} and "
            f"{other.coordinate_key}." + more("same-sites")
        )

    def _in_place(self, other: Any, function: Callable[[Any, Any], TorchTensor]) -> Any:
        if is_traced():
            if not have_one_map(self, other, self._sparse_class):
                return run_untraced(self._in_place, other, function)
            self._F = function(self._F, other._F)
            return self
        if isinstance(other, Tensor):
            self._is_same_key(other)
            other = other.F
        elif not isinstance(other, (TorchTensor, int, float)):
            return NotImplemented
        self._F = function(self._F, other)
        return self

    def __add__(self, other: Any) -> Self:
        return self._binary(other, operator.add)

    def __sub__(self, other: Any) -> Self:
        return self._binary(other, operator.sub)

    def __mul__(self, other: Any) -> Self:
        return self._binary(other, operator.mul)

    def __truediv__(self, other: Any) -> Self:
        return self._binary(other, operator.truediv)

    def __pow__(self, other: Any) -> Self:
        return self._binary(other, operator.pow)

    def __radd__(self, other: Any) -> Self:
        return self._binary(other, operator.add)

    def __rsub__(self, other: Any) -> Self:
        return self._binary(other, lambda own, left: left - own)

    def __rmul__(self, other: Any) -> Self:
        return self._binary(other, operator.mul)

    def __rtruediv__(self, other: Any) -> Self:
        return self._binary(other, lambda own, left: left / own)

    def __neg__(self) -> Self:
        return self._with_features(-self._F)

    def __iadd__(self, other: Any) -> Self:
        return self._in_place(other, operator.iadd)

    def __isub__(self, other: Any) -> Self:
        return self._in_place(other, operator.isub)

    def __imul__(self, other: Any) -> Self:
        return self._in_place(other, operator.imul)

    # There is no __itruediv__, as in the original: ``x /= y`` makes a new tensor, ``x / y``.


__getattr__ = module_getattr(__name__)
