"""Weight gradient over pair lists."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspconv.kernels import has_triton

if TYPE_CHECKING:
    from jaxtyping import Float

    from tritonspconv.kernels.table import PairList


def weight_grad(
    feats: Float[Tensor, "n_in c_in"],
    grad: Float[Tensor, "n_out c_out"],
    pairs: PairList,
    out: Float[Tensor, "V c_in c_out"],
    *,
    precision: str = "ieee",
) -> Float[Tensor, "V c_in c_out"]:
    """Fill ``out[v] = sum over pairs (i, o) of tap v of feats[i]^T grad[o]``.

    Args:
        feats: [n_in, c_in], contiguous rows.
        grad: [n_out, c_out], contiguous rows, same dtype.
        pairs: Input and output rows by tap.
        out: [V, c_in, c_out], any strides, any float dtype; every element is written.
        precision: ``"ieee"`` or ``"tf32"`` products for float32; torch's are always IEEE.

    Returns:
        ``out``. Sums in float32 (float64 for float64) in a fixed order.
    """
    listed, tap_ptr, mirrored = pairs
    return _back_end(out.device).weight_grad(
        feats, grad, listed, tap_ptr, out, mirrored=mirrored, precision=precision
    )


@functools.lru_cache(maxsize=1024)
def _back_end(device: torch.device):
    if has_triton(device):
        from tritonspconv.kernels.triton import weight_grad as back_end
    else:
        from tritonspconv.kernels.eager import weight_grad as back_end
    return back_end
