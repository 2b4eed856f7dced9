"""The backward pass of a convolution: gradients of features and weight (numba)."""

from __future__ import annotations

from torch import Tensor

from tritonspconv.kernels.numba.gather_gemm import gather_gemm, panel_pairs
from tritonspconv.kernels.numba.weight_grad import sum_outer_products
from tritonspconv.kernels.table import ConvMap


def conv_grads(
    feats: Tensor,
    grad: Tensor,
    weight: Tensor,
    kernel_map: ConvMap,
    needs_feats: bool,
    grad_weight: Tensor | None,
    precision: str,
) -> Tensor | None:
    """Use the pairs of the outputs for the weight, and the pairs of the inputs for the features."""
    if grad_weight is not None:
        rows, _, order, panels, mirrored, count = kernel_map.out_table
        by_column = grad if order is None else grad.index_select(0, order)
        pairs = panel_pairs(panels, rows, count).listed()
        sum_outer_products(feats, by_column, pairs, grad_weight, reverse=mirrored)
    if not needs_feats:
        return None
    rows, mask, order, panels, mirrored, count = kernel_map.in_table
    return gather_gemm(
        grad, weight.transpose(1, 2), None, rows, mask, order,
        mirrored=mirrored, panels=panels, count=count,
    )  # fmt: skip
