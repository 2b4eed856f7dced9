"""The features of a sparse tensor at points: of the cell of each point, or between sites."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor as TorchTensor

from compat.minkowski._errors import MinkowskiError
from compat.minkowski._fields import corners
from compat.minkowski.enums import SparseTensorQuantizationMode
from compat.minkowski.MinkowskiTensor import Tensor
from tritonspconv import ops

if TYPE_CHECKING:
    from compat.minkowski.MinkowskiSparseTensor import SparseTensor
    from compat.minkowski.MinkowskiTensorField import TensorField

_SLICEABLE = (
    SparseTensorQuantizationMode.RANDOM_SUBSAMPLE,
    SparseTensorQuantizationMode.UNWEIGHTED_AVERAGE,
)


class PointFeatures(Tensor):
    """The methods of :class:`SparseTensor`, its one subclass, that take points."""

    inverse_mapping: TorchTensor

    def slice(self, X: TensorField | SparseTensor) -> TensorField:
        """Return the features of each point's cell, in the order of the points.

        Args:
            X: The field that this tensor descends from, or the sparse tensor made of duplicate
                coordinates on whose map it is. Quantised by RANDOM_SUBSAMPLE or UNWEIGHTED_AVERAGE.

        Raises:
            MinkowskiError: ``X`` was quantised in another way, or a point's cell is not in here.
        """
        return self._field_like(X, self._F[self._rows_of_points(X)])

    def cat_slice(self, X: TensorField | SparseTensor) -> TensorField:
        """Return :meth:`slice` with the points' own features after it, ``[N, C + C_X]``."""
        rows = self._rows_of_points(X)
        own = X.F[X.inverse_mapping] if isinstance(X, PointFeatures) else X.F
        return self._field_like(X, torch.cat([self._F[rows], own], dim=1))

    def _rows_of_points(self, points: TensorField | SparseTensor) -> TorchTensor:
        if not isinstance(points, Tensor):
            raise MinkowskiError(
                "slice takes the TensorField, or the SparseTensor made of coordinates, that this "
                f"tensor descends from; got {type(points).__name__}."
            )
        if points.quantization_mode not in _SLICEABLE:
            raise MinkowskiError(
                f"slice needs points quantised by RANDOM_SUBSAMPLE or UNWEIGHTED_AVERAGE; got "
                f"{points.quantization_mode}."
            )
        if isinstance(points, PointFeatures):
            self._is_same_key(points)
            if not hasattr(points, "inverse_mapping"):
                raise MinkowskiError(
                    "slice by a SparseTensor needs one made of coordinates, which knows their "
                    "rows; got the output of a layer. Pass the network's input."
                )
            return points.inverse_mapping
        self._check_manager(points)
        return points.inverse_mapping(self.coordinate_key)

    def _field_like(self, points: TensorField | SparseTensor, features: TorchTensor) -> TensorField:
        if not isinstance(points, PointFeatures):
            return points._with_features(features)
        return self._field_class(
            features,
            coordinates=self.C[points.inverse_mapping].to(features.dtype),
            coordinate_manager=self._manager,
            quantization_mode=points.quantization_mode,
        )

    def interpolate(self, X: TensorField) -> TensorField:
        """Return the features at the points of a field, by linear interpolation.

        Raises:
            MinkowskiError: ``X`` is no field.
        """
        if not hasattr(X, "_splat"):
            raise MinkowskiError(
                f"interpolate takes a TensorField; got {type(X).__name__}. For points in a torch "
                "tensor, use features_at_coordinates."
            )
        splat = X._splat.get(self.coordinate_key)
        if splat is None:
            return X._with_features(self.features_at_coordinates(X.C))
        return X._with_features(ops.gather_weighted(self._F, *splat))

    def features_at_coordinates(self, query_coordinates: TorchTensor) -> TorchTensor:
        """Return the features at points, by linear interpolation between sites.

        Args:
            query_coordinates: [M, 1 + D], in the features' dtype; the batch index is rounded.

        Returns:
            [M, C]. Corners of a point's cell that are no sites count as 0, and the weights of the
            other corners do not change.
        """
        if query_coordinates.dtype != self.dtype or query_coordinates.device != self.device:
            raise MinkowskiError(
                f"query_coordinates must be {self.dtype} on {self.device} like the features; got "
                f"{query_coordinates.dtype} on {query_coordinates.device}."
            )
        found = self._manager._map(self.coordinate_key)
        return ops.gather_weighted(self._F, *corners(found, query_coordinates))
