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
    """Multiply the pairs of one tap after the other."""
    dtype = acc_dtype(feats.dtype)
    feats, grad = feats.to(dtype), grad.to(dtype)
    volume, c_in, c_out = out.shape
    block = rows_in_cache(max(c_in, c_out), dtype)
    # Reuse memory: it stays in the cache, and the system clears new memory page by page.
    scratch = feats.new_empty(block, c_in), feats.new_empty(block, c_out)
    totals = (
        out if out.dtype == dtype else out.new_empty(1, c_in, c_out, dtype=dtype).expand_as(out)
    )
    ends = tap_ptr.tolist()
    # Autocast would round the operands of these products once more.
    with torch.autocast(feats.device.type, enabled=False):
        for v, total in enumerate(totals):
            listed = min(v, volume - 1 - v) if mirrored else v
            in_rows, out_rows = pairs[:, ends[listed] : ends[listed + 1]]
            if listed != v:
                in_rows, out_rows = out_rows, in_rows
            _sum_products(feats, grad, in_rows, out_rows, scratch, total)
            if totals is not out:
                out[v] = total
    return out


def _sum_products(
    feats: Tensor,
    grad: Tensor,
    in_rows: Tensor,
    out_rows: Tensor,
    scratch: tuple[Tensor, Tensor],
    total: Tensor,
) -> None:
    """Write the sum of ``feats[i]^T grad[o]`` over the pairs of one tap to ``total``."""
    block = scratch[0].shape[0]
    if not in_rows.shape[0]:
        total.zero_()
    for start in range(0, in_rows.shape[0], block):
        sources, targets = in_rows[start : start + block], out_rows[start : start + block]
        x, g = (rows[: sources.shape[0]] for rows in scratch)
        torch.index_select(feats, 0, sources, out=x)
        torch.index_select(grad, 0, targets, out=g)
        if start == 0:
            torch.mm(x.T, g, out=total)
        else:
            total.addmm_(x.T, g)
