"""Give every row the features of its sample."""

from __future__ import annotations

import torch
from torch import Tensor

from compat.minkowski._errors import MinkowskiError
from compat.minkowski._keys import CoordinateMapKey
from compat.minkowski._names import module_getattr
from compat.minkowski._samples import Samples, occurring, place_of
from compat.minkowski.enums import BroadcastMode
from compat.minkowski.MinkowskiCommon import (
    KNOWN_DIMENSION,
    MinkowskiModuleBase,
    renamed_arguments,
)
from compat.minkowski.MinkowskiCoordinateManager import CoordinateManager
from compat.minkowski.MinkowskiSparseTensor import SparseTensor
from tritonspconv import ops


def _rows_of_samples(
    values: Tensor,
    key: CoordinateMapKey,
    manager: CoordinateManager,
    samples: Samples | None,
) -> Tensor:
    """Return for each row of a map the values of its sample.

    Args:
        values: [B, C], one row per sample.
        key: The map.
        manager: Its manager.
        samples: The batch index of each of the B rows; None: the indices of the manager.

    Raises:
        MinkowskiError: There are more or fewer values than samples.

    This call waits for the device where batch indices are missing in ``samples``.
    """
    found = manager._map(key)
    samples = manager._samples if samples is None else samples
    if isinstance(samples, range):
        has_all = found.batch_size <= len(samples)
    else:
        has_all = {*occurring(found.batch_index, found.batch_size)} <= {*samples}
    if len(values) != len(samples) or not has_all:
        n_samples = len(samples) if has_all else found.batch_size
        known = "" if has_all else f" of the samples {list(samples)}"
        raise MinkowskiError(
            f"broadcast: the second input must have a row for each of {n_samples} samples; got "
            f"{len(values)}{known}. Pass the output of a global pool of the same batch."
        )
    places = place_of(found.batch_index, samples)
    return ops.global_broadcast(values, places, is_sorted=found.batch_ascends)


@renamed_arguments(dimension=KNOWN_DIMENSION, D=KNOWN_DIMENSION)
class MinkowskiBroadcast(MinkowskiModuleBase):
    """Copy the features of each sample to its rows."""

    def forward(self, input: SparseTensor, input_glob: SparseTensor) -> SparseTensor:
        """Return features of the rows of ``input``.

        Args:
            input: [N, C]; gives the rows.
            input_glob: [B, C'], one row per sample, as a global pool returns it.

        Raises:
            MinkowskiError: An input is no sparse tensor, or channels or samples do not fit.
        """
        for tensor in (input, input_glob):
            if not isinstance(tensor, SparseTensor):
                raise MinkowskiError(
                    f"{type(self).__name__} takes two SparseTensors; got {type(tensor).__name__}."
                )
        manager, key = input.coordinate_manager, input.coordinate_map_key
        samples = input_glob.coordinate_manager._samples_at(input_glob.coordinate_map_key)
        values = _rows_of_samples(input_glob.F, key, manager, samples)
        return SparseTensor._on(self._combine(input.F, values), key, manager)

    def _combine(self, features: Tensor, values: Tensor) -> Tensor:
        return values

    def __repr__(self) -> str:
        return type(self).__name__


@renamed_arguments(dimension=KNOWN_DIMENSION, D=KNOWN_DIMENSION)
class MinkowskiBroadcastConcatenation(MinkowskiBroadcast):
    """Append the features of each sample to its rows."""

    def _combine(self, features: Tensor, values: Tensor) -> Tensor:
        return torch.cat([features, values], dim=1)


class MinkowskiBroadcastBase(MinkowskiBroadcast):
    """Combine rows and samples channel by channel.

    Args:
        operation_type: Addition or multiplication.
    """

    def __init__(self, operation_type: BroadcastMode) -> None:
        super().__init__()
        if not isinstance(operation_type, BroadcastMode):
            raise MinkowskiError(f"operation_type must be a BroadcastMode; got {operation_type!r}.")
        self.operation_type = operation_type
        self.broadcast = self._own_function = MinkowskiBroadcastFunction()

    def forward(self, input: SparseTensor, input_glob: SparseTensor) -> SparseTensor:
        """Return the combined features; see :meth:`MinkowskiBroadcast.forward`."""
        if self.broadcast is self._own_function:
            return super().forward(input, input_glob)
        manager, key = input.coordinate_manager, input.coordinate_map_key
        features = self.broadcast.apply(
            input.F, input_glob.F, self.operation_type, key, input_glob.coordinate_map_key, manager
        )
        return SparseTensor._on(features, key, manager)

    def _combine(self, features: Tensor, values: Tensor) -> Tensor:
        return _elementwise(self.operation_type, features, values)


def _elementwise(mode: BroadcastMode, features: Tensor, values: Tensor) -> Tensor:
    if features.shape != values.shape:
        raise MinkowskiError(
            f"broadcast: both inputs must have the same channels; got {features.shape[1]} and "
            f"{values.shape[1]}."
        )
    return features + values if mode == BroadcastMode.ELEMENTWISE_ADDITON else features * values


@renamed_arguments(dimension=KNOWN_DIMENSION, D=KNOWN_DIMENSION)
class MinkowskiBroadcastAddition(MinkowskiBroadcastBase):
    """Add the features of each sample to its rows."""

    def __init__(self) -> None:
        super().__init__(BroadcastMode.ELEMENTWISE_ADDITON)


@renamed_arguments(dimension=KNOWN_DIMENSION, D=KNOWN_DIMENSION)
class MinkowskiBroadcastMultiplication(MinkowskiBroadcastBase):
    """Multiply the rows of each sample by its features."""

    def __init__(self) -> None:
        super().__init__(BroadcastMode.ELEMENTWISE_MULTIPLICATION)


class MinkowskiBroadcastFunction:
    """A broadcast of features, called as the original's autograd function is."""

    # Without instance attributes, a patched ``apply`` is an error, not ignored.
    __slots__ = ()

    @staticmethod
    def apply(
        input_features: Tensor,
        input_features_global: Tensor,
        operation_type: BroadcastMode,
        in_coords_key: CoordinateMapKey,
        glob_coords_key: CoordinateMapKey,
        coords_manager: CoordinateManager,
    ) -> Tensor:
        """Combine rows and samples."""
        samples = coords_manager._samples_at(glob_coords_key)
        values = _rows_of_samples(input_features_global, in_coords_key, coords_manager, samples)
        return _elementwise(operation_type, input_features, values)


__getattr__ = module_getattr(__name__)
