"""The features of a tensor, and new ones on its coordinates."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor

from compat.minkowski._errors import MinkowskiError
from compat.minkowski._traced import derive, is_plain
from compat.minkowski.MinkowskiSparseTensor import SparseTensor
from compat.minkowski.MinkowskiTensorField import TensorField
from tritonspconv.graph_capture import is_traced, run_untraced
from tritonspconv.guide import more

AnyTensor = TypeVar("AnyTensor", SparseTensor, TensorField)


def features_of(input: Any) -> Tensor:
    """Return the features of a sparse tensor or field.

    Raises:
        MinkowskiError: It is neither.
    """
    features = getattr(input, "F", None)
    if features is None:
        raise MinkowskiError(
            f"a layer of MinkowskiEngine takes a SparseTensor or TensorField; got "
            f"{type(input).__name__}. Plain tensors go through torch's layer of that name."
            + more("sparse-input")
        )
    return features


def with_features(input: AnyTensor, features: Tensor) -> AnyTensor:
    """Return a tensor with the coordinates of ``input`` and other features.

    Args:
        input: A sparse tensor or a field; subclasses give their base, as in the original.
        features: Features with one row for each coordinate and any number of channels.
    """
    if is_traced():
        if is_plain(input, SparseTensor):
            return derive(input, features)
        return run_untraced(with_features, input, features)
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
