"""The family of the MinkowskiEngine adapter's layers; they join it in ``_fusion.py``."""

from __future__ import annotations

from compat.minkowski.MinkowskiSparseTensor import SparseTensor
from tritonspconv.nn.fusable import LayerFamily

LAYER_FAMILY = LayerFamily(SparseTensor, "F", feature_names=("F", "features", "_F"))
