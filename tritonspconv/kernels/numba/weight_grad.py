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

    A thread owns all or some input channels of some taps, and adds in the order of columns; so the
    bits are the same for any number of threads.

    Args:
        feats: [n_in, c_in].
        grad: [n, c_out], in the order of columns, same dtype.
        pairs: The pairs of the outputs.
        out: [V, c_in, c_out], any strides, any float dtype; every element is written.
        reverse: Tap v of the pairs is tap V-1-v of ``out``.
    """
    dtype = acc_dtype(feats.dtype)
    step, lanes = _products.tile_rows(), _products.vector_bytes() // dtype.itemsize
    x, g = _whole(feats, dtype, max(step, lanes)), _whole(grad, dtype, lanes)
    volume, c_in, c_out = out.shape
    parts = -(-c_in // step)
    shape = (volume, parts * step, g.shape[1])
    fits = out.is_contiguous() and out.dtype == dtype and out.shape == shape
    totals = out.detach().zero_() if fits else out.new_zeros(shape, dtype=dtype)
    # Number of pairs before each row of tiles, by which threads get equal work.
    work = np.repeat(pairs.counts.reshape(-1, volume).sum(0), parts)
    before = np.cumsum(work) - work

    def add(first_pair: int, last_pair: int) -> None:
        first, last = np.searchsorted(before, (first_pair, last_pair))
        _products.add_outer_products(
            first, last, pairs.width, pairs.starts, pairs.counts, pairs.columns, pairs.rows, x, g,
            lanes, step, reverse, totals.numpy(),
        )  # fmt: skip

    in_ranges(add, int(work.sum()), -(-_products.LEAST_WORK // (step * g.shape[1])))
    if not fits:
        out.copy_(totals[:, :c_in, :c_out])


def _whole(rows: Tensor, dtype: torch.dtype, multiple: int) -> NDArray:
    """Return rows of ``dtype`` with zeros behind them, so that tiles are whole."""
    rows = rows.detach().to(dtype)
    missing = -rows.shape[1] % multiple
    return (F.pad(rows, (0, missing)) if missing else rows.contiguous()).numpy()
