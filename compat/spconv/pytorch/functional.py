"""Functions on SparseConvTensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compat.spconv._names import module_getattr
from compat.spconv.core import Activation, ConvAlgo
from compat.spconv.pytorch import ops
from compat.spconv.pytorch._errors import SpconvError
from compat.spconv.pytorch.core import SparseConvTensor
from compat.spconv.pytorch.hash import HashTable
from tritonspconv.coords import Grid

__all__ = [
    "HashTable",
    "SparseConvTensor",
    "implicit_gemm",
    "indice_avgpool_implicit_gemm",
    "indice_conv",
    "indice_inverse_conv",
    "indice_maxpool",
    "indice_maxpool_implicit_gemm",
    "indice_subm_conv",
    "sparse_add",
    "sparse_add_hash_based",
]

__getattr__ = module_getattr(
    __name__,
    modules={"tv": "compat.cumm.tensorview"},
    elsewhere={
        "compat.cumm.gemm.layout": "to_stride",
        "compat.spconv.debug_utils": "spconv_save_debug_data",
        "compat.spconv.pytorch.constants": "PYTORCH_VERSION",
        "compat.spconv.tools": "CUDAKernelTimer",
    },
    refused={
        "SparseConvFunction SparseInverseConvFunction SubMConvFunction": (
            "Call indice_conv, indice_inverse_conv or indice_subm_conv of this module."
        ),
        "SparseImplicitGemmFunction": "Call implicit_gemm of this module.",
        "SparseMaxPoolFunction SparseMaxPoolImplicitGemmFunction": (
            "Call indice_maxpool or indice_maxpool_implicit_gemm of this module."
        ),
        "SparseAvgPoolImplicitGemmFunction": "Call indice_avgpool_implicit_gemm of this module.",
        "identity_decorator": "It returns its argument.",
    },
)


def indice_conv(
    features: Tensor,
    filters: Tensor,
    indice_pairs: Tensor,
    indice_pair_num: Tensor,
    num_activate_out: int,
    algo: ConvAlgo,
    timer: Any = None,
    bias: Tensor | None = None,
    act_alpha: float = 0.0,
    act_beta: float = 0.0,
    act_type: Activation = Activation.None_,
) -> Tensor:
    """Convolve along a pair list; see :func:`compat.spconv.pytorch.ops.indice_conv`."""
    return ops.indice_conv(
        features, filters, indice_pairs, indice_pair_num, num_activate_out,
        bias=bias, act_alpha=act_alpha, act_beta=act_beta, act_type=act_type,
    )  # fmt: skip


def indice_inverse_conv(
    features: Tensor,
    filters: Tensor,
    indice_pairs: Tensor,
    indice_pair_num: Tensor,
    num_activate_out: int,
    algo: ConvAlgo,
    timer: Any = None,
    bias: Tensor | None = None,
    act_alpha: float = 0.0,
    act_beta: float = 0.0,
    act_type: Activation = Activation.None_,
) -> Tensor:
    """Convolve along a pair list read backwards, from ``indice_pairs[1]`` to ``[0]``."""
    return ops.indice_conv(
        features, filters, indice_pairs, indice_pair_num, num_activate_out, inverse=True,
        bias=bias, act_alpha=act_alpha, act_beta=act_beta, act_type=act_type,
    )  # fmt: skip


def indice_subm_conv(
    features: Tensor,
    filters: Tensor,
    indice_pairs: Tensor,
    indice_pair_num: Tensor,
    num_activate_out: int,
    algo: ConvAlgo,
    timer: Any = None,
    bias: Tensor | None = None,
    act_alpha: float = 0.0,
    act_beta: float = 0.0,
    act_type: Activation = Activation.None_,
) -> Tensor:
    """Convolve along a submanifold pair list: its first half of taps, the rest by symmetry."""
    return ops.indice_conv(
        features, filters, indice_pairs, indice_pair_num, num_activate_out, subm=True,
        bias=bias, act_alpha=act_alpha, act_beta=act_beta, act_type=act_type,
    )  # fmt: skip


def implicit_gemm(
    features: Tensor,
    filters: Tensor,
    pair_fwd: Tensor,
    pair_bwd: Tensor,
    pair_mask_fwd_splits: Sequence[Tensor],
    pair_mask_bwd_splits: Sequence[Tensor],
    mask_argsort_fwd_splits: Sequence[Tensor],
    mask_argsort_bwd_splits: Sequence[Tensor],
    num_activate_out: int,
    masks: Sequence[Any],
    is_train: bool,
    is_subm: bool,
    timer: Any = None,
    fp32_accum: bool | None = None,
    bias: Tensor | None = None,
    act_alpha: float = 0.0,
    act_beta: float = 0.0,
    act_type: Activation = Activation.None_,
) -> Tensor:
    """Convolve along the pair table ``pair_fwd``; gradients need no ``pair_bwd``.

    See :func:`compat.spconv.pytorch.ops.implicit_gemm`.
    """
    return ops.implicit_gemm(
        features, filters, pair_fwd, pair_mask_fwd_splits, mask_argsort_fwd_splits,
        num_activate_out, masks, is_train, is_subm, timer, fp32_accum, bias, act_alpha, act_beta,
        act_type,
    )[0]  # fmt: skip


def indice_maxpool(
    features: Tensor, indice_pairs: Tensor, indice_pair_num: Tensor, num_activate_out: int
) -> Tensor:
    """Max-pool along a pair list, with spconv's floor of zero."""
    return ops.indice_maxpool(features, indice_pairs, indice_pair_num, num_activate_out)


def indice_maxpool_implicit_gemm(
    features: Tensor, indice_pairs_fwd: Tensor, indice_pairs_bwd: Tensor, num_activate_out: int
) -> Tensor:
    """Max-pool along the pair table ``indice_pairs_fwd``, with spconv's floor of zero."""
    return ops.indice_maxpool_implicit_gemm(features, indice_pairs_fwd, num_activate_out)


def indice_avgpool_implicit_gemm(
    features: Tensor,
    indice_pairs_fwd: Tensor,
    indice_pairs_bwd: Tensor,
    num_activate_out: int,
    calc_count: bool,
) -> Tensor:
    """Average the inputs that are present along the pair table ``indice_pairs_fwd``."""
    return ops.indice_avgpool_implicit_gemm(
        features, indice_pairs_fwd, num_activate_out, calc_count
    )[0]


def sparse_add(*tens: SparseConvTensor) -> SparseConvTensor:
    """Add tensors over different sites.

    Args:
        *tens: At least one tensor; one spatial shape, batch size and channel count.

    Returns:
        The union of all sites, rows ascending by (batch, coordinates), where features of the same
        site are added. If the union is no larger than the largest operand, it keeps that operand's
        rows, in their order, and its ``indice_dict``; otherwise ``indice_dict`` is empty.

    Raises:
        SpconvError: Spatial shapes, batch sizes or channels differ.

    This call waits for the device. Differentiable in every operand's features.
    """
    largest = max(tens, key=lambda item: item.indices.shape[0])
    for item in tens:
        if (
            item.spatial_shape != largest.spatial_shape
            or item.batch_size != largest.batch_size
            or item.features.shape[1] != largest.features.shape[1]
        ):
            raise SpconvError(
                "sparse_add: tensors must have one spatial shape, batch size and channel count; "
                f"got {[(t.spatial_shape, t.batch_size, t.features.shape[1]) for t in tens]}."
            )
    shape = tuple(largest.spatial_shape)
    grid = Grid((0,) * len(shape), shape, int(largest.batch_size))
    keys, rows = torch.unique(
        grid.keys(torch.cat([item.indices for item in tens])), return_inverse=True
    )
    features = torch.cat([item.features for item in tens])
    if keys.shape[0] == largest.indices.shape[0]:
        order = _order_of(largest, grid, keys)
        summed = features.new_zeros(keys.shape[0], features.shape[1])
        return largest.replace_feature(summed.index_add(0, order[rows], features))
    summed = features.new_zeros(keys.shape[0], features.shape[1]).index_add(0, rows, features)
    out = SparseConvTensor(summed, grid.coords(keys), list(shape), largest.batch_size)
    out.benchmark = largest.benchmark
    out.force_algo = largest.force_algo
    return out


sparse_add_hash_based = sparse_add


def _indice_to_scalar(indices: Tensor, shape: Sequence[int]) -> Tensor:
    """Number the cells of a grid, last axis fastest; private in spconv too, but users import it.

    Args:
        indices: Integers ``[N, D]``.
        shape: D extents; with batch indices in ``indices``, the batch size first.

    Returns:
        ``[N]`` in the dtype of ``indices``: pass int64 for a grid of 2**31 cells or more.

    Raises:
        SpconvError: ``shape`` has another length.
    """
    if indices.shape[1] != len(shape):
        raise SpconvError(
            f"_indice_to_scalar: shape must have {indices.shape[1]} extents for indices "
            f"{list(indices.shape)}; got {list(shape)}."
        )
    number = torch.zeros_like(indices[:, 0])
    for column, extent in zip(indices.unbind(1), shape, strict=True):
        number = number * int(extent) + column
    return number


def _order_of(item: SparseConvTensor, grid: Grid, keys: Tensor) -> Tensor:
    """Return the row of ``item`` that holds each of its ascending ``keys``."""
    places = torch.searchsorted(keys, grid.keys(item.indices))
    order = torch.empty_like(places)
    order[places] = torch.arange(places.shape[0], device=places.device)
    return order
