"""Gather rows, multiply them with the taps' matrices, sum: forward and input gradient."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from tritonspconv.kernels import has_numba, has_triton

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    from tritonspconv.kernels.channel_norm import ChannelNorm
    from tritonspconv.kernels.table import NeighborTable


def gather_gemm(
    feats: Float[Tensor, "n_in c_in"],
    weight: Float[Tensor, "V c_in c_out"],
    bias: Float[Tensor, "c_out"] | None,
    table: NeighborTable,
    *,
    precision: str = "ieee",
    norm: ChannelNorm | None = None,
    residual: Float[Tensor, "n_out c_out"] | None = None,
    relu: bool = False,
    in_count: Int64[Tensor, ""] | None = None,
) -> Float[Tensor, "n_out c_out"]:
    """Multiply gathered rows with the taps' matrices and sum over taps.

    ``out[table.order[c]] = bias + sum over v of feats[table.rows[v, c]] @ weight[v]``.

    Args:
        feats: [n_in, c_in], contiguous rows.
        weight: [V, c_in, c_out], any strides, same dtype.
        bias: [c_out], any stride; or None.
        table: The neighbour table of the n_out rows. Its entries are rows of ``feats``. The back
            end of this device must have built the table.
        precision: ``"ieee"`` or ``"tf32"`` products for float32; torch's are always IEEE. On NVIDIA
            each operand of a large float32 product is split into float16 parts first.
        norm: Normalises the sum with its bias, in the type of the sum; any strides.
        residual: [n_out, c_out] to add before rounding, contiguous rows, any dtype; or None.
        relu: Clamp the sum at zero.
        in_count: int64 [], the number of real rows of ``feats``, which alone decide its power of
            two; None: all.

    Returns:
        [n_out, c_out] in the dtype of ``feats``; sums in float32 (float64 for float64). Rows for
        padding columns of the table are zero.
    """
    rows, mask, order, panels, mirrored, count = table
    # Tables of numba alone may keep no rows, and numba reads the panels.
    return _back_end(feats.device).gather_gemm(
        feats, weight, bias, cast("Tensor", rows), mask, order, mirrored=mirrored,
        precision=precision, norm=norm, residual=residual, relu=relu, panels=panels, count=count,
        in_count=in_count,
    )  # fmt: skip


def fuses_epilogue(device: torch.device) -> bool:
    """Return whether a kernel applies norm, residual and ReLU to its sums before it writes them.

    In vectorised torch they are passes over the output, as single modules are.
    """
    return has_triton(device) or has_numba(device)


@functools.lru_cache(maxsize=1024)
def _back_end(device: torch.device):
    if has_triton(device):
        from tritonspconv.kernels.triton import gather_gemm as back_end
    elif has_numba(device):
        from tritonspconv.kernels.numba import gather_gemm as back_end
    else:
        from tritonspconv.kernels.eager import gather_gemm as back_end
    return back_end
