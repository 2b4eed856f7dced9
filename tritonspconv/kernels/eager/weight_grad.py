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
    dtype = acc_dtype(feats.dtype)
    feats, grad = feats.to(dtype), grad.to(dtype)
    ends = tap_ptr.tolist()
    volume, c_in, c_out = out.shape
    block = rows_in_cache(max(c_in, c_out), dtype)
    # Memory that is used over and over stays in the cache; new memory is cleared page by page.
    gathered = feats.new_empty(block, c_in), feats.new_empty(block, c_out)
    total = feats.new_empty(c_in, c_out)
    for v in range(volume):
        listed = min(v, volume - 1 - v) if mirrored else v
        row_in, row_out = pairs[:, ends[listed] : ends[listed + 1]]
        if listed != v:
            row_in, row_out = row_out, row_in
        total.zero_()
        # Autocast would round the operands once more.
        with torch.autocast(feats.device.type, enabled=False):
            for source, target in zip(row_in.split(block), row_out.split(block), strict=True):
                x, g = (part[: source.shape[0]] for part in gathered)
                torch.index_select(feats, 0, source, out=x)
                torch.index_select(grad, 0, target, out=g)
                total.addmm_(x.T, g)
        out[v] = total
    return out
