"""Rows of two tensors that belong together: ``MinkowskiEngine.utils.coords``."""

from __future__ import annotations

from torch import Tensor

from compat.minkowski._errors import MinkowskiError
from compat.minkowski.MinkowskiSparseTensor import SparseTensor


def get_coords_map(x: SparseTensor, y: SparseTensor) -> tuple[Tensor, Tensor]:
    """Return rows of ``x`` and the rows of ``y`` with the cells that hold them, int64 [n] each.

    Args:
        x: The finer tensor.
        y: A tensor of its coordinate manager, of the same or a coarser tensor stride.

    Raises:
        MinkowskiError: They are no sparse tensors of one coordinate manager.

    This call waits for the device.
    """
    for given in (x, y):
        if not isinstance(given, SparseTensor):
            raise MinkowskiError(
                f"get_coords_map takes two SparseTensors; got {type(given).__name__}."
            )
    x._check_manager(y)
    return x.coordinate_manager.stride_map(x.coordinate_map_key, y.coordinate_map_key)
