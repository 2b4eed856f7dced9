"""Output sizes and pair lists, as functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from torch import Tensor

from compat.spconv._names import module_getattr
from compat.spconv.core import AlgoHint, ConvAlgo
from compat.spconv.pytorch._errors import SpconvError
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
from compat.spconv.pytorch._records import pair_lists
from compat.spconv.pytorch._sites import LocatedSites
from tritonspconv.coords import Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import KernelMap, kernel_map

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


def get_conv_output_size(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Return ``(n + 2p - d(k-1) - 1) // s + 1`` per axis, and 1 where ``kernel_size`` is -1.

    ``input_size`` says how many axes there are; entries of the others beyond that are ignored.

    Raises:
        SpconvError: A sequence is shorter than ``input_size``, or a stride is 0.
    """
    kernel_size, stride, padding, dilation = _axes_of(
        input_size, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation
    )
    axes = zip(input_size, kernel_size, stride, padding, dilation, strict=True)
    return [1 if k == -1 else (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]


def get_deconv_output_size(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
) -> list[int]:
    """Return ``(n-1)s - 2p + k + output_padding`` per axis; dilation has no effect.

    ``input_size`` says how many axes there are; entries of the others beyond that are ignored.

    Raises:
        SpconvError: A sequence is shorter than ``input_size``, or a kernel size is -1.
    """
    kernel_size, stride, padding, output_padding = _axes_of(
        input_size, kernel_size=kernel_size, stride=stride, padding=padding,
        output_padding=output_padding,
    )  # fmt: skip
    if any(k == -1 for k in kernel_size):
        raise SpconvError(f"a transposed kernel_size must be at least 1; got {kernel_size}.")
    axes = zip(input_size, kernel_size, stride, padding, output_padding, strict=True)
    return [(n - 1) * s - 2 * p + k + e for n, k, s, p, e in axes]


def _axes_of(input_size: Sequence[int], **others: Sequence[int]) -> list[Sequence[int]]:
    """Return as many entries of the others as ``input_size`` has."""
    ndim = len(input_size)
    for name, values in others.items():
        if len(values) < ndim:
            raise SpconvError(
                f"{name} must have an entry for each of {ndim} axes; got {list(values)}."
            )
        if name == "stride" and any(step == 0 for step in values[:ndim]):
            raise SpconvError(f"stride must not be 0; got {list(values)}.")
    return [values[:ndim] for values in others.values()]


def window(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    *,
    subm: bool,
    transposed: bool,
) -> ConvGeometry:
    """Return a layer's geometry.

    Raises:
        SpconvError: A number is out of range, or a submanifold window has an even size.
    """
    sizes = tuple(kernel_size), tuple(dilation)
    if subm:
        return _submanifold_window(*sizes)
    extra = tuple(output_padding) if transposed else ()
    return _strided_window(*sizes, tuple(stride), tuple(padding), extra, transposed)


# The result is cached: layers ask at every call, because downstream code assigns to attributes.
@lru_cache(maxsize=1024)
def _submanifold_window(kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> ConvGeometry:
    if any(size % 2 == 0 for size in kernel_size):
        raise _even_submanifold(kernel_size)
    with _as_spconv_error():
        return ConvGeometry.submanifold(kernel_size, dilation)


@lru_cache(maxsize=1024)
def _strided_window(
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    transposed: bool,
) -> ConvGeometry:
    with _as_spconv_error():
        return ConvGeometry(
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            transposed=transposed,
            output_padding=output_padding,
        )


@contextmanager
def _as_spconv_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise SpconvError(str(error)) from error


def _even_submanifold(kernel_size: Sequence[int]) -> SpconvError:
    """Return the error for a submanifold window without a centre."""
    return SpconvError(
        f"a submanifold convolution needs odd kernel sizes; got {list(kernel_size)}. Use "
        "SparseConv with padding, or an odd kernel."
    )


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
    shape, batch_size = located.spatial_shape, located.batch_size
    out_grid = None
    if transpose:
        size = get_deconv_output_size(shape, ksize, stride, padding, dilation, out_padding)
        out_grid = Grid((0,) * len(shape), tuple(size), batch_size)
    found = kernel_map(located.sites, geometry, out_grid=out_grid)
    return (indices if subm else found.out_sites.as_rows(found.out_sites.coords)), found
