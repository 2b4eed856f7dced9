"""Both gradients of a convolution in one pass over its pairs (torch)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels import acc_dtype
from tritonspconv.kernels.eager.gather_gemm import gather_gemm, sum_products
from tritonspconv.kernels.eager.pairs import PairPanels, largest_tap
from tritonspconv.kernels.eager.weight_grad import weight_grad
from tritonspconv.kernels.table import ConvMap, in_listed_order


def conv_grads(
    feats: Tensor,
    grad: Tensor,
    weight: Tensor,
    kernel_map: ConvMap,
    needs_feats: bool,
    grad_weight: Tensor | None,
    precision: str,
) -> Tensor | None:
    """Take one pass over the pairs of the inputs where both gradients are needed."""
    if not needs_feats:
        if grad_weight is not None:
            x, g, out = in_listed_order(kernel_map, feats, grad, grad_weight)
            pairs, tap_ptr, mirrored = kernel_map.pair_list
            weight_grad(x, g, pairs, tap_ptr, out, mirrored=mirrored)
        return None
    table = kernel_map.in_table
    how = {"mirrored": table.mirrored, "panels": table.panels}
    if grad_weight is not None:
        return both_grads(feats, grad, weight, grad_weight, table.rows, **how)
    return gather_gemm(
        grad, weight.transpose(1, 2), None, table.rows, table.mask, table.order, **how
    )


def both_grads(
    feats: Tensor,
    grad: Tensor,
    weight: Tensor,
    out: Tensor,
    rows: Tensor,
    *,
    mirrored: bool,
    panels: object = None,
) -> Tensor:
    """Return the gradient of ``feats`` and fill ``out`` with the gradient of ``weight``.

    The results equal the results of ``gather_gemm`` and ``weight_grad``. This function gathers each
    row of ``grad`` once for both gradients, reads the rows of ``feats`` panel by panel, and needs
    no second list of pairs.

    Args:
        feats: [n_in, c_in].
        grad: [n_out, c_out], the gradient of the output, same dtype.
        weight: [V, c_in, c_out], any strides, same dtype.
        out: Like ``weight``, any float dtype; every element is written.
        rows: int32 [V, n_in], for each input row its output rows or -1.
        mirrored: Tap v of ``rows`` is tap V-1-v of ``weight``.
        panels: The pairs of ``rows``; if they are not ``PairPanels``, list them.

    Returns:
        [n_in, c_in] in the dtype of ``weight``. Sums in float32 (float64 for float64).
    """
    dtype = acc_dtype(feats.dtype)
    feats, grad = feats.to(dtype), grad.to(dtype)
    matrices = weight.to(dtype).transpose(1, 2).unbind()
    totals = out if out.dtype == dtype else torch.empty(out.shape, dtype=dtype, device=out.device)
    sums = totals.zero_().unbind()
    if mirrored:
        matrices, sums = matrices[::-1], sums[::-1]
    panels = panels if isinstance(panels, PairPanels) else PairPanels(rows)
    # Reuse memory: it stays in the cache, and the system clears new memory page by page.
    most = largest_tap(panels.listed(max(weight.shape[1:])))
    scratch = feats.new_empty(most, feats.shape[1])

    def add_to_weight(tap: int, columns: Tensor | slice, gradients: Tensor) -> None:
        if isinstance(columns, slice):
            taken = feats[columns]
        else:
            taken = scratch[: columns.shape[0]]
            torch.index_select(feats, 0, columns, out=taken)
        sums[tap].addmm_(taken.T, gradients)

    grad_feats = sum_products(grad, matrices, panels, rows.shape[1], add_to_weight)
    if totals is not out:
        out.copy_(totals)
    return grad_feats.to(weight.dtype)
