"""The backward pass of a convolution: gradients of features and weight."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspconv.kernels import has_numba, has_triton

if TYPE_CHECKING:
    from jaxtyping import Float

    from tritonspconv.kernels.table import ConvMap


def conv_grads(
    feats: Float[Tensor, "n_in c_in"],
    grad: Float[Tensor, "n_out c_out"],
    weight: Float[Tensor, "V c_in c_out"],
    kernel_map: ConvMap,
    *,
    needs_feats: bool,
    grad_weight: Float[Tensor, "V c_in c_out"] | None,
    precision: str = "ieee",
) -> Float[Tensor, "n_in c_in"] | None:
    """Return the gradient of ``feats`` and fill ``grad_weight`` with the gradient of ``weight``.

    Args:
        feats: [n_in, c_in], contiguous rows.
        grad: [n_out, c_out], the gradient of the output, contiguous rows, same dtype.
        weight: [V, c_in, c_out], any strides, same dtype.
        kernel_map: The map of the forward pass.
        needs_feats: Return the gradient of ``feats``.
        grad_weight: [V, c_in, c_out], any strides, any float dtype; every element is written. None:
            the weight needs no gradient.
        precision: ``"ieee"`` or ``"tf32"`` products for float32; torch's are always IEEE.

    Returns:
        [n_in, c_in] in the dtype of ``feats``; None where it is not needed. Both gradients are
        summed in float32 (float64 for float64) in a fixed order.
    """
    return _back_end(grad.device).conv_grads(
        feats, grad, weight, kernel_map, needs_feats, grad_weight, precision
    )


@functools.lru_cache(maxsize=1024)
def _back_end(device: torch.device):
    if has_triton(device):
        from tritonspconv.kernels.triton import conv_grads as back_end
    elif has_numba(device):
        from tritonspconv.kernels.numba import conv_grads as back_end
    else:
        from tritonspconv.kernels.eager import conv_grads as back_end
    return back_end
