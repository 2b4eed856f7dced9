"""New features on the coordinates of a tensor."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from compat.minkowski.MinkowskiSparseTensor import SparseTensor
from compat.minkowski.MinkowskiTensorField import TensorField

AnyTensor = TypeVar("AnyTensor", SparseTensor, TensorField)


def with_features(input: AnyTensor, features: Tensor) -> AnyTensor:
    """Return a tensor with the coordinates of ``input`` and other features.

    Args:
        input: A sparse tensor or a field; subclasses give their base, as in the original.
        features: One row for each coordinate, any number of channels.
    """
    if isinstance(input, TensorField):
        return TensorField(
            features,
            coordinate_field_map_key=input.coordinate_field_map_key,
            coordinate_manager=input.coordinate_manager,
            quantization_mode=input.quantization_mode,
        )
    return SparseTensor(
        features,
        coordinate_map_key=input.coordinate_map_key,
        coordinate_manager=input.coordinate_manager,
    )
