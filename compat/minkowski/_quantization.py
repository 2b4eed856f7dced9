"""Quantisation of features: all points that share a site get one row."""

from __future__ import annotations

import torch
from torch import Tensor

from compat.minkowski._errors import MinkowskiError
from compat.minkowski.enums import SparseTensorQuantizationMode as Mode
from tritonspconv import ops
from tritonspconv.guide import more
from tritonspconv.ops.pool import PoolMode

REDUCTIONS: dict[Mode, PoolMode] = {
    Mode.UNWEIGHTED_AVERAGE: "avg",
    Mode.UNWEIGHTED_SUM: "sum",
    Mode.MAX_POOL: "max",
}


def reduce_rows(features: Tensor, rows: Tensor, position: Tensor, mode: Mode) -> Tensor:
    """Return the features of every site.

    Args:
        features: [N, C], one row per point.
        rows: First point of each site, int64 [U], ascending.
        position: Site of each point, int64 [N].
        mode: The rule by which the points of a site combine.

    Returns:
        [U, C], a copy also where no two points share a site, so that a later in-place change does
        not reach the caller's features. NO_QUANTIZATION returns ``features`` itself.
        Differentiable.

    Raises:
        MinkowskiError: The mode is none of points, or points share sites with NO_QUANTIZATION.
    """
    if mode is Mode.SPLAT_LINEAR_INTERPOLATION:
        raise MinkowskiError("SPLAT_LINEAR_INTERPOLATION is TensorField.splat(); use that.")
    is_distinct = rows.shape == position.shape
    if mode is Mode.NO_QUANTIZATION:
        if is_distinct:
            return features
        raise MinkowskiError(
            f"NO_QUANTIZATION needs distinct coordinates; got {position.shape[0]} rows at "
            f"{rows.shape[0]} sites. Choose UNWEIGHTED_AVERAGE or another mode."
            + more("repeated-coords")
        )
    if is_distinct:
        return features.clone(memory_format=torch.contiguous_format)
    if mode is Mode.RANDOM_SUBSAMPLE:
        return features[rows]
    return ops.global_pool(features, position, rows.shape[0], REDUCTIONS[mode])
