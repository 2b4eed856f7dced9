"""Sparse convolution for PyTorch, on NVIDIA, AMD and CPU."""

from tritonspconv import nn, ops
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.graph_capture import GraphCaptureError, make_opaque
from tritonspconv.kernel_map import KernelMap, kernel_map, map_from_pairs
from tritonspconv.nn import fuse, optimization_report, optimize, unoptimize
from tritonspconv.sparse_tensor import SparseTensor

__version__ = "0.1.0"

__all__ = [
    "ActiveSites",
    "ConvGeometry",
    "GraphCaptureError",
    "Grid",
    "KernelMap",
    "SparseTensor",
    "__version__",
    "fuse",
    "kernel_map",
    "map_from_pairs",
    "nn",
    "ops",
    "optimization_report",
    "optimize",
    "unoptimize",
]

make_opaque(
    __name__,
    traceable=(
        "SparseTensor.replace",
        "_check_feats",
        "FeatureModule.forward",
        "BatchNorm.forward",
    ),
)
