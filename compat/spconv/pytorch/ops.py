"""Output sizes and pair lists, as functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from compat.spconv._names import module_getattr
from compat.spconv.core import AlgoHint, ConvAlgo
from compat.spconv.pytorch._errors import grid_vanished
from compat.spconv.pytorch._pair_ops import (
    implicit_gemm,
    implicit_gemm_backward,
    indice_avgpool_implicit_gemm,
    indice_avgpool_implicit_gemm_backward,
    indice_conv,
    indice_conv_backward,
    indice_maxpool,
    indice_maxpool_backward,
    indice_maxpool_implicit_gemm,
    indice_maxpool_implicit_gemm_backward,
)
from compat.spconv.pytorch._pairs import pair_tables, remember_pairs, remember_table
from compat.spconv.pytorch._paths import map_of_window, out_shape_of
from compat.spconv.pytorch._records import pair_lists
from compat.spconv.pytorch._sites import LocatedSites
from compat.spconv.pytorch._windows import get_conv_output_size, get_deconv_output_size, window
from tritonspconv.kernel_map import KernelMap

__all__ = [
    "INT32_MAX",
    "AlgoHint",
    "ConvAlgo",
    "get_conv_output_size",
    "get_deconv_output_size",
    "get_indice_pairs",
    "get_indice_pairs_implicit_gemm",
    "implicit_gemm",
    "implicit_gemm_backward",
    "indice_avgpool_implicit_gemm",
    "indice_avgpool_implicit_gemm_backward",
    "indice_conv",
    "indice_conv_backward",
    "indice_maxpool",
    "indice_maxpool_backward",
    "indice_maxpool_implicit_gemm",
    "indice_maxpool_implicit_gemm_backward",
    "maximum_value_int_",
]

INT32_MAX = 2**31 - 1

__getattr__ = module_getattr(
    __name__,
    modules={"spconv": "compat.spconv", "tv": "compat.cumm.tensorview"},
    elsewhere={
        "compat.cumm.conv.bases": "KRSC NHWC ConvOpType",
        "compat.cumm.tensorview": "div_up",
        "compat.spconv": "constants",
        "compat.spconv.constants": (
            "ALL_WEIGHT_IS_KRSC FILTER_HWIO SPCONV_ALLOW_TF32 SPCONV_CPP_GEMM "
            "SPCONV_CPP_INDICE_PAIRS SPCONV_CPP_INDICE_PAIRS_IGEMM SPCONV_DO_SORT "
            "SPCONV_DIRECT_TABLE_HASH_SIZE_SCALE SPCONV_USE_DIRECT_TABLE AllocKeys"
        ),
        "compat.spconv.cppconstants": "CPU_ONLY_BUILD",
        "compat.spconv.pytorch.cppcore": (
            "_TORCH_DTYPE_TO_TV get_arch get_current_stream torch_tensor_to_tv TorchAllocator "
            "ExternalAllocator TorchSpconvMatmul"
        ),
        "compat.spconv.pytorch.core": "ThrustSortAllocator",
        "compat.spconv.tools": "CUDAKernelTimer",
        "compat.spconv.utils": "nullcontext",
    },
    refused={
        "SpconvOps": "It is spconv's C++; use the functions of this module.",
        "ConvGemmOps": "It is spconv's C++; use indice_conv or implicit_gemm.",
        "InferenceOps": "It is spconv's C++; use the act_type of indice_conv or implicit_gemm.",
        "ShuffleStrideType codeops GEMM CONV GEMM_CPP CONV_CPP": (
            "It chooses among spconv's kernels; tritonspconv tune tunes those of tritonspconv."
        ),
        "DEBUG DEBUG_INT64_HASH_K": "A switch of spconv's own code.",
        "fused_indice_conv": "The original raises NotImplementedError; use indice_conv(bias=...).",
        "global_pool_rearrange": "Use SparseGlobalMaxPool or tritonspconv.ops.global_pool.",
    },
)


def maximum_value_int_(ten: Tensor, value: int) -> None:
    """Raise the entries of ``ten``, in place, to at least ``value``."""
    ten.clamp_(min=value)


def get_indice_pairs(
    indices: Tensor,
    batch_size: int,
    spatial_shape: Sequence[int],
    algo: ConvAlgo,
    ksize: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_padding: Sequence[int],
    subm: bool = False,
    transpose: bool = False,
    num_out_act_bound: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output indices and pair lists of one convolution.

    Args:
        indices: int32 ``[N, 1 + ndim]``.
        batch_size: Number of samples.
        spatial_shape: Extents of the grid.
        algo: Accepted, without effect.
        ksize: Window extent, one int per axis, like all that follow.
        stride: Fine sites per coarse site.
        padding: Shift of the window.
        dilation: Sites between neighbouring taps.
        out_padding: Extra extent of a transposed output.
        subm: Outputs at the input sites.
        transpose: Transposed convolution.
        num_out_act_bound: Accepted, without effect, as in spconv.

    Returns:
        Output indices, int32 ``[n_out, 1 + ndim]``; pairs, int32 ``[2, V, N]`` of input and output
        rows by tap, -1 behind the last; pairs per tap, int32 ``[V]``.
    """
    out_indices, found = _found_map(
        indices, batch_size, spatial_shape, ksize, stride, padding, dilation, out_padding,
        subm, transpose,
    )  # fmt: skip
    pairs, counts = pair_lists(found)
    remember_pairs(pairs, counts, found)
    return out_indices, pairs, counts


def get_indice_pairs_implicit_gemm(
    indices: Tensor,
    batch_size: int,
    spatial_shape: Sequence[int],
    algo: ConvAlgo,
    ksize: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_padding: Sequence[int],
    subm: bool = False,
    transpose: bool = False,
    is_train: bool = True,
    alloc: Any = None,
    timer: Any = None,
    num_out_act_bound: int = -1,
    direct_table: bool = True,
    do_sort: bool = True,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor,
    list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Any],
]:  # fmt: skip
    """Return output indices and pair tables of one convolution.

    Args:
        indices: int32 ``[N, 1 + ndim]``.
        batch_size: Number of samples.
        spatial_shape: Extents of the grid.
        algo: Accepted, without effect.
        ksize: Window extent, one int per axis, like all that follow.
        stride: Fine sites per coarse site.
        padding: Shift of the window.
        dilation: Sites between neighbouring taps.
        out_padding: Extra extent of a transposed output.
        subm: Outputs at the input sites.
        transpose: Transposed convolution.
        is_train: Accepted, without effect; all tables are made.
        alloc: Accepted, without effect.
        timer: Accepted, without effect.
        num_out_act_bound: Accepted; must not be positive, because outputs are never cut off.
        direct_table: Accepted, without effect.
        do_sort: Accepted, without effect.

    Returns:
        Output indices, int32 ``[n_out, 1 + ndim]``; pairs per tap, int32 ``[V]``; the input row of
        each tap and output row, int32 ``[V, n_out]``, -1 where there is none; the output row of
        each tap and input row, int32 ``[V, N]``; and five empty lists in place of the masks, which
        belong to spconv's kernels.
    """
    if num_out_act_bound > 0:
        raise NotImplementedError(
            "get_indice_pairs_implicit_gemm: num_out_act_bound is not supported; every output is "
            "kept. Pass -1."
        )
    out_indices, found = _found_map(
        indices, batch_size, spatial_shape, ksize, stride, padding, dilation, out_padding,
        subm, transpose,
    )  # fmt: skip
    forward, backward = pair_tables(found)
    remember_table(forward, found)
    remember_table(backward, found.inverse())
    counts = (forward >= 0).sum(1, dtype=forward.dtype)
    return out_indices, counts, forward, backward, [], [], [], [], []


def _found_map(
    indices: Tensor,
    batch_size: int,
    spatial_shape: Sequence[int],
    ksize: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_padding: Sequence[int],
    subm: bool,
    transpose: bool,
) -> tuple[Tensor, KernelMap]:
    """Return output indices and kernel map of one convolution."""
    geometry = window(
        ksize, stride, padding, dilation, out_padding, subm=subm, transposed=transpose
    )
    located = LocatedSites.of(indices, spatial_shape, batch_size)
    if not subm:
        out_shape = out_shape_of(located.spatial_shape, geometry)
        if min(out_shape) < 1:
            raise grid_vanished("the convolution", located.spatial_shape, out_shape)
    found = map_of_window(located.sites, geometry)
    return (indices if subm else found.out_sites.as_rows(found.out_sites.coords)), found
