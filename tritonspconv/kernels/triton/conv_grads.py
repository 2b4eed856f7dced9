"""The backward pass of a convolution: a launch for each gradient (Triton)."""

from __future__ import annotations

from torch import Tensor

from tritonspconv.kernels.table import ConvMap, in_listed_order
from tritonspconv.kernels.triton.gather_gemm import gather_gemm
from tritonspconv.kernels.triton.half_parts import Operand, as_operand
from tritonspconv.kernels.triton.weight_grad import weight_grad


def conv_grads(
    feats: Tensor,
    grad: Tensor,
    weight: Tensor,
    kernel_map: ConvMap,
    needs_feats: bool,
    grad_weight: Tensor | None,
    precision: str,
) -> Tensor | None:
    """Launch ``weight_grad`` on the pairs, then ``gather_gemm`` on the table of the inputs."""
    _, c_in, c_out = weight.shape
    work = max(kernel_map.n_in, kernel_map.n_out) * c_in * c_out
    in_count, out_count = kernel_map.in_count, kernel_map.out_count
    operand = as_operand(grad, work, precision, out_count)
    # All operands of a layer come in parts or none does.
    in_parts = operand is not grad
    if grad_weight is not None:
        # Compute this gradient first, so that its partial sums are freed before the other gradient
        # exists.
        x: Operand = as_operand(feats, work, precision, in_count) if in_parts else feats
        x, g, out = in_listed_order(kernel_map, x, operand, grad_weight)
        pairs, tap_ptr, mirrored = kernel_map.pair_list
        weight_grad(x, g, pairs, tap_ptr, out, mirrored=mirrored, precision=precision)
    if not needs_feats:
        return None
    matrices: Operand = weight.transpose(1, 2)
    if in_parts:
        matrices = as_operand(weight.transpose(1, 2), work, precision)
    table = kernel_map.in_table_for(c_in, c_out)
    return gather_gemm(
        operand, matrices, None, table.rows, table.mask, table.order, mirrored=table.mirrored,
        precision=precision, count=table.real_columns,
    )  # fmt: skip
