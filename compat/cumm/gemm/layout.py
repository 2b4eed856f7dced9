"""``cumm.gemm.layout``: strides of a dense array."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["to_stride"]


def to_stride(shape: np.ndarray) -> np.ndarray:
    """Return how many entries apart neighbours along each axis are, last axis fastest.

    Args:
        shape: Extents, integers ``[D]``; the result has its dtype.
    """
    strides = shape.copy()
    strides[-1:] = 1
    strides[:-1] = shape[:0:-1].cumprod()[::-1]
    return strides
