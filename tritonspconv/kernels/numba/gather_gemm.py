"""Gather, multiply, sum over a neighbour table: forward and input gradient (numba)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tritonspconv.kernels import acc_dtype
from tritonspconv.kernels.channel_norm import ChannelNorm
from tritonspconv.kernels.numba import _products
from tritonspconv.kernels.numba._panels import PanelPairs, TapPanels
from tritonspconv.kernels.numba._threads import in_ranges


def gather_gemm(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    *,
    mirrored: bool,
    precision: str = "ieee",
    norm: ChannelNorm | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    panels: object = None,
    count: Tensor | None = None,
    in_count: Tensor | None = None,
) -> Tensor:
    """Multiply and sum panel by panel of columns. If ``panels`` lists no pairs, list them first."""
    dtype = acc_dtype(feats.dtype)
    kept = panel_pairs(panels, rows, count)
    pairs, n, c_out = kept.listed(), kept.num_columns, weight.shape[2]
    out = feats.new_empty(n, c_out, dtype=dtype)
    if residual is not None and order is not None:
        residual = residual.index_select(0, order)
    vectors = None if norm is None else torch.stack(norm.scale_and_shift(dtype))
    written = out.numpy()
    epilogue = (
        np.empty(0, written.dtype) if bias is None else _array(bias, dtype),
        np.empty((0, 0), written.dtype) if vectors is None else _array(vectors, dtype),
        np.empty((0, 0), written.dtype) if residual is None else _array(residual, dtype),
        relu,
    )
    if count is not None:
        real = int(count)
        written[real:] = 0
        written = written[:real]
    x, matrices = _operands(feats.detach(), weight.detach())
    if mirrored:
        matrices = matrices[::-1]
    _multiply(x, matrices, pairs, epilogue, written)
    if order is not None:
        out = torch.empty_like(out).index_copy_(0, order.long(), out)
    return _of(out, weight.dtype)


def panel_pairs(panels: object, rows: Tensor | None, count: Tensor | None) -> TapPanels:
    """Return the pairs of a table: ``panels`` if they are of this back end."""
    if isinstance(panels, TapPanels):
        return panels
    assert rows is not None, "a table of another back end keeps its rows"
    return TapPanels(rows, count)


def _operands(feats: Tensor, weight: Tensor) -> tuple[NDArray, NDArray]:
    """Return [N, c_in] and [V, c_in, c_out] as the tiles read them.

    The arrays have the dtype of the sums. Two bfloat16 operands are the exception: they become
    int32 arrays [N, c_in / 2] and [V, c_in / 2, c_out]. Each int32 holds two bfloat16 values, and
    one instruction adds the products of both in float32.
    """
    dtype = acc_dtype(feats.dtype)
    is_brain = feats.dtype == weight.dtype == torch.bfloat16
    if not (is_brain and feats.shape[1] % 2 == 0 and _products.has_bfloat16()):
        return _array(feats, dtype), _of(weight, dtype).numpy()
    return _words(feats).numpy(), _words(weight.transpose(1, 2)).transpose(1, 2).numpy()


def _words(halves: Tensor) -> Tensor:
    """Return bfloat16 [..., c] as int32 [..., c / 2], in place where the layout lets us."""
    *outer, last = halves.stride()
    if last != 1 or any(step % 2 for step in (*outer, halves.storage_offset())):
        halves = halves.clone(memory_format=torch.contiguous_format)
    return halves.view(torch.int32)


def _multiply(
    x: NDArray,
    matrices: NDArray,
    pairs: PanelPairs,
    epilogue: tuple[NDArray, NDArray, NDArray, bool],
    out: NDArray,
) -> None:
    """Write all outputs, panels of about the same number of pairs to each thread."""
    lanes = _products.vector_bytes() // out.itemsize
    volume, c_in, c_out = matrices.shape
    packed = np.empty((volume, c_in * -(-c_out // lanes) * lanes), x.dtype)
    in_ranges(
        lambda first, last: _products.pack(first, last, matrices, lanes, packed),
        volume,
        -(-_products.LEAST_COPIES // max(packed.shape[1], 1)),
    )
    starts, counts, columns, rows, _, width = pairs
    panel_starts = starts[::volume]

    def work(first_pair: int, last_pair: int) -> None:
        first, last = np.searchsorted(panel_starts[:-1], (first_pair, last_pair))
        if last_pair == len(columns):
            last = pairs.panels
        _products.multiply_panels(
            first, last, width, starts, counts, columns, rows, x, packed, lanes,
            _products.tile_rows(), *epilogue, out,
        )  # fmt: skip

    in_ranges(work, len(columns), _products.LEAST_WORK // max(c_in * c_out, 1))


def _array(rows: Tensor, dtype: torch.dtype) -> NDArray:
    """Return rows as a contiguous array of ``dtype``."""
    return _of(rows.detach(), dtype).contiguous().numpy()


def _of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` in ``dtype``; a call of torch that changes nothing takes two microseconds."""
    return x if x.dtype == dtype else x.to(dtype)
