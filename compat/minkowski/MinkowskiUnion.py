"""Sum of tensors on the union of their coordinates."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from compat.minkowski._errors import MinkowskiError
from compat.minkowski._keys import CoordinateMapKey
from compat.minkowski.MinkowskiCommon import (
    KNOWN_DIMENSION,
    MinkowskiModuleBase,
    renamed_arguments,
)
from compat.minkowski.MinkowskiCoordinateManager import CoordinateManager
from compat.minkowski.MinkowskiSparseTensor import SparseTensor


class MinkowskiUnionFunction:
    """A union of features, called as the original's autograd function is."""

    @staticmethod
    def apply(
        in_coords_keys: list[CoordinateMapKey],
        out_coords_key: CoordinateMapKey,
        coordinate_manager: CoordinateManager,
        *in_feats: Tensor,
    ) -> Tensor:
        """Set ``out_coords_key`` and return the sum of all features at each of its sites."""
        maps = coordinate_manager.union_map(in_coords_keys, out_coords_key)
        n_out = coordinate_manager.size(out_coords_key)
        dtype = functools.reduce(torch.promote_types, (feats.dtype for feats in in_feats))
        out = in_feats[0].new_zeros(n_out, in_feats[0].shape[1], dtype=dtype)
        for (_, rows), feats in zip(maps, in_feats, strict=True):
            # Rows are distinct, so that the order of additions is the order of tensors.
            out = out.index_add(0, rows, feats.to(dtype))
        return out


@renamed_arguments(dimension=KNOWN_DIMENSION, D=KNOWN_DIMENSION)
class MinkowskiUnion(MinkowskiModuleBase):
    """Sum of tensors on the union of their coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.union = MinkowskiUnionFunction()

    def forward(self, *inputs: SparseTensor) -> SparseTensor:
        """Return the sum; a tensor counts as 0 where it has no site.

        Args:
            inputs: Two tensors or more of one coordinate manager and one number of channels.

        Raises:
            MinkowskiError: There are fewer, or they disagree.

        This call waits for the device. Differentiable.
        """
        if len(inputs) < 2 or not all(isinstance(each, SparseTensor) for each in inputs):
            raise MinkowskiError(
                "MinkowskiUnion takes two SparseTensors or more, each an argument of its own; got "
                f"{[type(each).__name__ for each in inputs]}."
            )
        first = inputs[0]
        for other in inputs[1:]:
            first._check_manager(other)
            if other.shape[1] != first.shape[1]:
                raise MinkowskiError(
                    f"MinkowskiUnion: all inputs must have the same channels; got "
                    f"{[each.shape[1] for each in inputs]}."
                )
        key = CoordinateMapKey(1 + first.D)
        keys = [each.coordinate_map_key for each in inputs]
        manager = first.coordinate_manager
        features = self.union.apply(keys, key, manager, *(each.F for each in inputs))
        return SparseTensor._on(features, key, manager)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
