"""Weight gradient over pair lists: one product per tap (torch)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels import acc_dtype
from tritonspconv.kernels.eager.gather_gemm import rows_in_cache


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
    volume, c_in, c_out = out.shape
    block = rows_in_cache(max(c_in, c_out), feats.dtype)
    for v in range(volume):
        listed = min(v, volume - 1 - v) if mirrored else v
        row_in, row_out = pairs[:, ends[listed] : ends[listed + 1]]
        if listed != v:
            row_in, row_out = row_out, row_in
        total = torch.zeros(c_in, c_out, dtype=feats.dtype, device=feats.device)
        # Autocast would round the operands once more.
        with torch.autocast(feats.device.type, enabled=False):
            for source, target in zip(row_in.split(block), row_out.split(block), strict=True):
                x, g = feats.index_select(0, source), grad.index_select(0, target)
                total.addmm_(x.T, g)
        out[v] = total
    return out
