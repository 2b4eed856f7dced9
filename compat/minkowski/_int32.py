"""Coordinates as int32: rounded down, and refused where they do not fit."""

from __future__ import annotations

import torch
from torch import Tensor

from compat.minkowski._errors import MinkowskiError

_LIMITS = torch.iinfo(torch.int32)


def to_int32(coordinates: Tensor) -> Tensor:
    """Return coordinates of any real type rounded down to int32.

    Raises:
        MinkowskiError: A coordinate does not fit int32: it is NaN, infinite, or too large.

    The function waits for the device, unless the coordinates are already int32.
    """
    if coordinates.dtype == torch.int32:
        return coordinates
    if coordinates.is_floating_point():
        coordinates = coordinates.floor()
    if coordinates.numel():
        low, high = torch.stack(coordinates.aminmax()).tolist()
        check_int32(low, high)
    return coordinates.int()


def check_int32(low: float, high: float) -> None:
    """Check the least and the largest of coordinates; either is NaN if one of them is.

    Raises:
        MinkowskiError: A coordinate does not fit int32.
    """
    # A comparison with NaN is False.
    if not (_LIMITS.min <= low <= high <= _LIMITS.max):
        raise MinkowskiError(
            f"coordinates must be finite and fit int32; got values from {low} to {high}. Remove "
            "invalid points, or shift the coordinates towards 0."
        )
