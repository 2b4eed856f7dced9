"""Functions on SparseConvTensors."""

from __future__ import annotations

import torch

from compat.spconv.pytorch._errors import SpconvError, missing_names
from compat.spconv.pytorch.core import SparseConvTensor
from tritonspconv.coords import Grid

__all__ = ["SparseConvTensor", "sparse_add", "sparse_add_hash_based"]

_USE_LAYERS = (
    "Pair lists are not an argument of any kernel here: use the layers of compat.spconv.pytorch, "
    "or tritonspconv.ops.sparse_conv / sparse_pool with the kernel_map of an indice_dict entry."
)
__getattr__ = missing_names(
    __name__,
    dict.fromkeys(
        (
            "implicit_gemm",
            "indice_avgpool_implicit_gemm",
            "indice_conv",
            "indice_inverse_conv",
            "indice_maxpool",
            "indice_maxpool_implicit_gemm",
            "indice_subm_conv",
        ),
        _USE_LAYERS,
    ),
)


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

    Waits for the device. Differentiable in every operand's features.
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


def _order_of(item: SparseConvTensor, grid: Grid, keys: torch.Tensor) -> torch.Tensor:
    """Return the row of ``item`` that holds each of its ascending ``keys``."""
    places = torch.searchsorted(keys, grid.keys(item.indices))
    order = torch.empty_like(places)
    order[places] = torch.arange(places.shape[0], device=places.device)
    return order
