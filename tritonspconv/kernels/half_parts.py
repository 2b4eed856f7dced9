"""float32 operands in the form in which a device multiplies them fastest."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspconv.kernels import has_triton

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    from tritonspconv.kernels.operand import HalfParts


def as_operand(
    x: Float[Tensor, "..."],
    work: int,
    precision: str,
    count: Int64[Tensor, ""] | None = None,
) -> Float[Tensor, "..."] | HalfParts:
    """Return ``x`` in the form in which the matrix kernels multiply it fastest on its device.

    Args:
        x: An operand of :func:`gather_gemm` or of a gradient.
        work: Rows x c_in x c_out of the product. All operands of a layer must be given the same:
            all of them are split into parts, or none is.
        precision: ``"ieee"`` or ``"tf32"`` products for float32.
        count: int64 [], number of real rows of ``x``, which alone decide its power of two; None:
            all.

    Returns:
        ``x`` itself, or its float16 parts: of large float32 products on an NVIDIA GPU.
    """
    return _back_end(x.device).as_operand(x, work, precision, count)


@functools.lru_cache(maxsize=1024)
def _back_end(device: torch.device):
    if has_triton(device):
        from tritonspconv.kernels.triton import half_parts as back_end
    else:
        from tritonspconv.kernels.eager import half_parts as back_end
    return back_end
