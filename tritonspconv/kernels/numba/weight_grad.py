"""Weight gradient over the pairs of a table (numba)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tritonspconv.kernels import acc_dtype
from tritonspconv.kernels.numba import _products
from tritonspconv.kernels.numba._panels import PanelPairs
from tritonspconv.kernels.numba._threads import in_ranges


def sum_outer_products(
    feats: Tensor, grad: Tensor, pairs: PanelPairs, out: Tensor, *, reverse: bool = False
) -> None:
    """Fill ``out[v] = sum over pairs (i, c) of tap v of feats[i]^T grad[c]``.

    A thread owns some input channels of some taps, and adds in the order of columns; so the bits
    are the same for any number of threads.

    Args:
        feats: [n_in, c_in].
        grad: [n, c_out], in the order of columns, same dtype.
        pairs: The pairs of the outputs.
        out: [V, c_in, c_out], any strides, any float dtype; every element is written.
        reverse: Tap v of the pairs is tap V-1-v of ``out``.
    """
    dtype = acc_dtype(feats.dtype)
    step, lanes = _products.tile_rows(), _products.vector_bytes() // dtype.itemsize
    x, g = _whole(feats, dtype, step), _whole(grad, dtype, lanes)
    parts = x.shape[1] // step
    totals = np.empty((pairs.volume, parts, step * g.shape[1]), x.dtype)

    def work(first: int, last: int) -> None:
        _products.add_outer_products(
            first, last, pairs.width, pairs.starts, pairs.counts, pairs.columns, pairs.rows, x, g,
            lanes, step, totals,
        )  # fmt: skip

    # Multiplications for a row of tiles, on average.
    each = max(len(pairs.columns) // pairs.volume * step * g.shape[1], 1)
    in_ranges(work, pairs.volume * parts, -(-_products.LEAST_WORK // each))
    filled = out if out.dtype == dtype else out.new_empty(out.shape, dtype=dtype)
    target = filled.detach().numpy()
    by_tap = target[::-1] if reverse else target
    in_ranges(
        lambda first, last: _products.unpack(first, last, totals, lanes, step, by_tap),
        pairs.volume,
        -(-_products.LEAST_COPIES // max(parts * totals.shape[2], 1)),
    )
    if filled is not out:
        out.copy_(filled)


def _whole(rows: Tensor, dtype: torch.dtype, multiple: int) -> NDArray:
    """Return rows of ``dtype`` with zeros behind them, so that tiles are whole."""
    rows = rows.detach().to(dtype)
    missing = -rows.shape[1] % multiple
    return (F.pad(rows, (0, missing)) if missing else rows.contiguous()).numpy()
