"""Gather, multiply, scatter over a neighbour table: forward and input gradient (torch)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels import acc_dtype

# Bytes of the rows that a core gathers at a time, to find them in its cache.
_CACHED_BYTES = 2**20


def rows_in_cache(channels: int, dtype: torch.dtype) -> int:
    """Return how many rows of so many channels to work on at a time."""
    cached = _CACHED_BYTES * torch.get_num_threads()
    return max(cached // max(channels * dtype.itemsize, 1), 256)


def gather_gemm(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    mask: Tensor,
    order: Tensor | None,
    *,
    mirrored: bool,
    precision: str = "ieee",
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Multiply gathered rows with the taps' matrices and sum over taps, block by block of columns.

    See :func:`tritonspconv.kernels.triton.gather_gemm.gather_gemm`; ``mask`` and ``precision`` are
    not needed here.
    """
    volume, c_in, c_out = weight.shape
    n_out = rows.shape[1]
    acc = torch.zeros(n_out, c_out, dtype=acc_dtype(feats.dtype), device=feats.device)
    feats, weight_acc = feats.to(acc.dtype), weight.to(acc.dtype)
    matrices = weight_acc.unbind()
    if mirrored:
        matrices = matrices[::-1]
    block = rows_in_cache(max(c_in, c_out), acc.dtype)
    # Autocast would round the operands of the products below once more.
    with torch.autocast(feats.device.type, enabled=False):
        for columns, sums in zip(rows.split(block, dim=1), acc.split(block), strict=True):
            tap, column = torch.nonzero(columns >= 0).unbind(1)
            row = columns.reshape(-1).index_select(0, tap * columns.shape[1] + column)
            counts = torch.bincount(tap, minlength=volume).tolist()
            of_taps = zip(column.split(counts), row.split(counts), matrices, strict=True)
            for at, source, matrix in of_taps:
                if at.numel():
                    sums.index_add_(0, at, feats.index_select(0, source) @ matrix)
    if order is not None:
        acc = torch.empty_like(acc).index_copy_(0, order.long(), acc)
    if bias is not None:
        acc += bias
    if residual is not None:
        acc += residual
    if relu:
        acc.relu_()
    return acc.to(weight.dtype)
