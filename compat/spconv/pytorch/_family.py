"""The family of the spconv adapter's layers; they join it in ``modules.py``."""

from __future__ import annotations

from compat.spconv.pytorch.core import SparseConvTensor
from tritonspconv.nn.fusable import LayerFamily

LAYER_FAMILY = LayerFamily(
    SparseConvTensor,
    "features",
    feature_names=("features", "_features"),
    replace="replace_feature",
)
