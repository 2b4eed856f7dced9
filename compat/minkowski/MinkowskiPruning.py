"""Keep some rows of a tensor."""

from __future__ import annotations

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


@renamed_arguments(dimension=KNOWN_DIMENSION, D=KNOWN_DIMENSION)
class MinkowskiPruning(MinkowskiModuleBase):
    """Keep the rows of a mask, in their order, on a map of their own."""

    def forward(self, input: SparseTensor, mask: Tensor) -> SparseTensor:
        """Return the rows where ``mask`` is True.

        Args:
            input: [N, C].
            mask: bool or uint8 [N], on the input's device.

        Raises:
            MinkowskiError: The input is no sparse tensor, or the mask does not fit it.

        Waits for the device, for the number of rows. Differentiable.
        """
        if not isinstance(input, SparseTensor):
            raise MinkowskiError(
                f"MinkowskiPruning takes a SparseTensor; got {type(input).__name__}."
            )
        manager = input.coordinate_manager
        key, rows = _prune(mask, input.coordinate_map_key, manager)
        return SparseTensor._on(input.F.index_select(0, rows), key, manager)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _prune(
    mask: Tensor, key: CoordinateMapKey, manager: CoordinateManager
) -> tuple[CoordinateMapKey, Tensor]:
    """Return the key of the rows that stay, and these rows, int64."""
    n, device = manager.size(key), manager._map(key).sites.device
    if mask.dtype not in (torch.bool, torch.uint8) or mask.shape != (n,) or mask.device != device:
        raise MinkowskiError(
            f"MinkowskiPruning: mask must be bool [{n}] on {device}; got {mask.dtype} "
            f"{list(mask.shape)} on {mask.device}."
        )
    return manager._prune(key, mask)


class MinkowskiPruningFunction:
    """Pruning of features, called as the original's autograd function is."""

    @staticmethod
    def apply(
        in_feat: Tensor,
        mask: Tensor,
        in_coords_key: CoordinateMapKey,
        out_coords_key: CoordinateMapKey,
        coords_manager: CoordinateManager,
    ) -> Tensor:
        """Set ``out_coords_key`` and return the rows that stay."""
        key, rows = _prune(mask, in_coords_key, coords_manager)
        out_coords_key.set_key(*key.get_key())
        return in_feat.index_select(0, rows)
