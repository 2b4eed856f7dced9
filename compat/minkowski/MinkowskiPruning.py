"""Keep some rows of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from compat.minkowski._errors import MinkowskiError
from compat.minkowski._keys import CoordinateMapKey
from compat.minkowski._names import module_getattr
from compat.minkowski.MinkowskiCommon import (
    KNOWN_DIMENSION,
    MinkowskiModuleBase,
    renamed_arguments,
)
from compat.minkowski.MinkowskiCoordinateManager import CoordinateManager, given_manager
from compat.minkowski.MinkowskiSparseTensor import SparseTensor
from tritonspconv.guide import more


@renamed_arguments(dimension=KNOWN_DIMENSION, D=KNOWN_DIMENSION)
class MinkowskiPruning(MinkowskiModuleBase):
    """Keep the rows of a mask, in their order, on a map of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.pruning = MinkowskiPruningFunction()

    def forward(self, input: SparseTensor, mask: Tensor) -> SparseTensor:
        """Return the rows where ``mask`` is True.

        Args:
            input: [N, C].
            mask: bool or uint8 [N], on the input's device.

        Raises:
            MinkowskiError: The input is no sparse tensor, or the mask does not fit it.

        This call waits for the device, for the number of rows. Differentiable.
        """
        if not isinstance(input, SparseTensor):
            raise MinkowskiError(
                f"MinkowskiPruning takes a SparseTensor; got {type(input).__name__}."
                + more("sparse-input")
            )
        manager, key = input.coordinate_manager, CoordinateMapKey(1 + input.D)
        features = self.pruning.apply(input.F, mask, input.coordinate_map_key, key, manager)
        return SparseTensor._on(features, key, manager)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _check_mask(mask: Tensor, key: CoordinateMapKey, manager: CoordinateManager) -> None:
    n, device = manager.size(key), manager._map(key).sites.device
    if mask.dtype not in (torch.bool, torch.uint8) or mask.shape != (n,) or mask.device != device:
        raise MinkowskiError(
            f"MinkowskiPruning: mask must be bool [{n}] on {device}; got {mask.dtype} "
            f"{list(mask.shape)} on {mask.device}."
        )


class MinkowskiPruningFunction:
    """Pruning of features, called as the original's autograd function is."""

    @staticmethod
    def apply(
        in_feat: Tensor,
        mask: Tensor,
        in_coords_key: CoordinateMapKey,
        out_coords_key: CoordinateMapKey | None = None,
        coords_manager: CoordinateManager | None = None,
    ) -> Tensor:
        """Return the rows that stay.

        Args:
            in_feat: [N, C].
            mask: bool or uint8 [N].
            in_coords_key: The map of the N rows.
            out_coords_key: A key that is set here to the map of the rows that stay; or the key of
                that map, as an earlier call set it.
            coords_manager: The manager of both.

        Raises:
            MinkowskiError: The mask does not fit the rows, or not the map of a key that is set.
        """
        manager = given_manager("MinkowskiPruningFunction", coords_manager)
        _check_mask(mask, in_coords_key, manager)
        if out_coords_key is None or not out_coords_key.is_key_set():
            key, rows = manager._prune(in_coords_key, mask)
            key.given_to(out_coords_key)
        else:
            rows = mask.nonzero().squeeze(1)
            known = manager._map(in_coords_key).rows_of(manager.get_coordinates(out_coords_key))
            if not torch.equal(known, rows):
                raise MinkowskiError(
                    f"MinkowskiPruningFunction: {out_coords_key} has {len(known)} rows, which are "
                    f"not the {len(rows)} that the mask keeps. Pass a key that is not set."
                )
        return in_feat.index_select(0, rows)


__getattr__ = module_getattr(__name__)
