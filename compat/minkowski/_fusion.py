"""The layers that convolutions of this library may be fused with."""

from __future__ import annotations

from types import ModuleType

from torch import nn

from compat.minkowski import MinkowskiFunctional, MinkowskiOps
from compat.minkowski._layer_family import LAYER_FAMILY
from compat.minkowski.MinkowskiConvolution import MinkowskiConvolutionBase
from compat.minkowski.MinkowskiNonlinearity import MinkowskiReLU
from compat.minkowski.MinkowskiNormalization import MinkowskiBatchNorm, MinkowskiSyncBatchNorm


def name_layers(package: ModuleType) -> None:
    """Let the layers join their family; ``package`` holds the public functions."""
    LAYER_FAMILY.join(
        convs=(MinkowskiConvolutionBase,),
        norms={
            nn.BatchNorm1d: None,
            nn.SyncBatchNorm: None,
            MinkowskiBatchNorm: "bn",
            MinkowskiSyncBatchNorm: "bn",
        },
        relus={nn.ReLU: None, MinkowskiReLU: "module"},
        containers=(nn.Sequential,),
        function_modules=(MinkowskiFunctional, MinkowskiOps, package),
        relu_functions=(MinkowskiFunctional.relu,),
    )
