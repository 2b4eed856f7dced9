"""Weight gradient over pair lists: one product per tap (torch)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels.eager.gather_gemm import acc_dtype


def weight_grad(
    feats: Tensor,
    grad: Tensor,
    pairs: Tensor,
    tap_ptr: Tensor,
    out: Tensor,
    *,
    mirrored: bool,
    precision: str = "ieee",
) -> Tensor:
    """Fill ``out[v] = sum over pairs (i, o) of tap v of feats[i]^T grad[o]``.

    See :func:`tritonspconv.kernels.triton.weight_grad.weight_grad`.
    """
    feats, grad = feats.to(acc_dtype(feats.dtype)), grad.to(acc_dtype(grad.dtype))
    ends = tap_ptr.tolist()
    volume = out.shape[0]
    for v in range(volume):
        listed = min(v, volume - 1 - v) if mirrored else v
        row_in, row_out = pairs[:, ends[listed] : ends[listed + 1]]
        if listed != v:
            row_in, row_out = row_out, row_in
        # Autocast would round the operands once more.
        with torch.autocast(feats.device.type, enabled=False):
            out[v] = feats.index_select(0, row_in).T @ grad.index_select(0, row_out)
    return out
