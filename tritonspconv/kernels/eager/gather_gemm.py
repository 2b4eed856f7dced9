"""Gather, multiply, scatter over a neighbour table: forward and input gradient (torch)."""

from __future__ import annotations

import torch
from torch import Tensor


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    """Multiply gathered rows with the taps' matrices and sum over taps, one tap at a time.

    See :func:`tritonspconv.kernels.triton.gather_gemm.gather_gemm`; ``mask`` and ``precision`` are
    not needed here.
    """
    volume, _, c_out = weight.shape
    n_out = rows.shape[1]
    acc = torch.zeros(n_out, c_out, dtype=acc_dtype(feats.dtype), device=feats.device)
    feats, weight_acc = feats.to(acc.dtype), weight.to(acc.dtype)
    # Autocast would round the operands of the products below once more.
    with torch.autocast(feats.device.type, enabled=False):
        for v in range(volume):
            matrix = weight_acc[volume - 1 - v if mirrored else v]
            columns = torch.nonzero(rows[v] >= 0).squeeze(1)
            if columns.shape[0] == n_out:
                acc += feats.index_select(0, rows[v]) @ matrix
            elif columns.shape[0]:
                present = rows[v].index_select(0, columns)
                acc.index_add_(0, columns, feats.index_select(0, present) @ matrix)
    if order is not None:
        acc = torch.empty_like(acc).index_copy_(0, order.long(), acc)
    if bias is not None:
        acc += bias
    if residual is not None:
        acc += residual
    if relu:
        acc.relu_()
    return acc.to(weight.dtype)
