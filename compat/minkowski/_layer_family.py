"""The layers that convolutions of this library may be fused with."""

from __future__ import annotations

from torch import nn

import compat.minkowski
from compat.minkowski import MinkowskiFunctional, MinkowskiOps
from compat.minkowski.MinkowskiConvolution import MinkowskiConvolutionBase
from compat.minkowski.MinkowskiNonlinearity import MinkowskiReLU
from compat.minkowski.MinkowskiNormalization import MinkowskiBatchNorm, MinkowskiSyncBatchNorm
from compat.minkowski.MinkowskiSparseTensor import SparseTensor
from tritonspconv.nn.fusable import LayerFamily

LAYER_FAMILY = LayerFamily(
    SparseTensor,
    "_F",
    convs=(MinkowskiConvolutionBase,),
    norms={
        nn.BatchNorm1d: None,
        nn.SyncBatchNorm: None,
        MinkowskiBatchNorm: "bn",
        MinkowskiSyncBatchNorm: "bn",
    },
    relus={nn.ReLU: None, MinkowskiReLU: "module"},
    containers=(nn.Sequential,),
    feature_names=("F", "features", "_F"),
    function_modules=(MinkowskiFunctional, MinkowskiOps, compat.minkowski),
    relu_functions=(MinkowskiFunctional.relu,),
)
