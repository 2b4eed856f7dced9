"""The family of this package's layers; they join it in ``container.py``."""

from __future__ import annotations

from tritonspconv.nn.fusable import LayerFamily
from tritonspconv.sparse_tensor import SparseTensor

LAYER_FAMILY = LayerFamily(SparseTensor, "feats", feature_names=("feats",), replace="replace")
