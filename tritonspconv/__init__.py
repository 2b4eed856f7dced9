"""Sparse convolution for PyTorch, on NVIDIA GPUs and on CPUs."""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "tritonspconv needs torch 2.11 or newer, which is not installed here. Install the build "
        "for your GPU as pytorch.org says, or for a CPU: pip install torch"
    ) from error

from tritonspconv import nn, ops
from tritonspconv.capture import Captured, CapturedStep, CaptureOverflow, capture, capture_step
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.export import (
    ExportError,
    OnnxExportError,
    OnnxNetwork,
    OnnxReport,
    export_onnx,
    export_program,
)
from tritonspconv.geometry import ConvGeometry
from tritonspconv.graph_capture import GraphCaptureError, make_opaque
from tritonspconv.kernel_map import KernelMap, kernel_map, map_from_pairs
from tritonspconv.nn import fuse, optimization_report, optimize, save_memory, unoptimize
from tritonspconv.sparse_tensor import SparseTensor, cat

__version__ = "0.1.0"

__all__ = [
    "ActiveSites",
    "CaptureOverflow",
    "Captured",
    "CapturedStep",
    "ConvGeometry",
    "ExportError",
    "GraphCaptureError",
    "Grid",
    "KernelMap",
    "OnnxExportError",
    "OnnxNetwork",
    "OnnxReport",
    "SparseTensor",
    "__version__",
    "capture",
    "capture_step",
    "cat",
    "export_onnx",
    "export_program",
    "fuse",
    "kernel_map",
    "map_from_pairs",
    "nn",
    "ops",
    "optimization_report",
    "optimize",
    "save_memory",
    "unoptimize",
]

make_opaque(
    __name__,
    traceable=(
        "SparseTensor.replace",
        "_check_feats",
        # While torch.compile traces, these call registered operators.
        "is_traced",
        "Conv._takes",
        "SubMConvNd.forward",
        "SparseInverseConvNd.forward",
        "convolve_between",
        "convolve_inverse",
        "run_operator",
        "trace_training_norm",
        "call_fused",
        "normalise",
        "_normalise",
        "takes_norm",
        # Containers decide while torch.compile traces.
        "Sequential.forward",
        "_is_faster_whole",
        "_apply",
        "run_chain",
        "norm_numbers",
        "LayerFamily.conv",
        "LayerFamily.batch_norm",
        "LayerFamily.is_relu",
        "LayerFamily.with_features",
        "_torch_module",
        "is_unwatched",
        "ChannelNorm.__new__",
        "TrainingNorm.__new__",
        "compute_dtype",
        "takes_operator",
        "sparse_conv",
        "to_dense",
        "_trace",
        "ToDense.forward",
        "SparseTensor.dense",
        "SparseTensor.__add__",
        "cat",
        # False while torch.compile traces: an optimised block then runs its own ``forward``.
        "fuses_now",
        "FeatureModule.forward",
        "BatchNorm.forward",
    ),
    constant=("breaks_graph", "fuses_on", "trains_on"),
)
