"""MinkowskiEngine 0.5.4's interface on the tritonspconv engine: CPU and GPU, nothing to build.

Replace ``import MinkowskiEngine as ME`` by ``import compat.minkowski as ME``. Kept oddities and
intended differences are listed in ``QUIRKS.md`` beside this file.
"""

import sys as _sys
from typing import NoReturn

from compat.minkowski import MinkowskiFunctional, MinkowskiOps, modules, utils
from compat.minkowski._backend._C import (
    cuda_version,
    cudart_version,
    get_gpu_memory_info,
    is_cuda_available,
)
from compat.minkowski._fusion import (
    name_layers as _name_layers,
)
from compat.minkowski._keys import (
    CoordinateMapKey,
)
from compat.minkowski.diagnostics import (
    print_diagnostics,
)
from compat.minkowski.enums import (
    BroadcastMode,
    ConvolutionMode,
    CoordinateMapType,
    GPUMemoryAllocatorType,
    MinkowskiAlgorithm,
    PoolingMode,
    RegionType,
    SparseTensorOperationMode,
    SparseTensorQuantizationMode,
)
from compat.minkowski.MinkowskiBroadcast import (
    MinkowskiBroadcast,
    MinkowskiBroadcastAddition,
    MinkowskiBroadcastConcatenation,
    MinkowskiBroadcastFunction,
    MinkowskiBroadcastMultiplication,
)
from compat.minkowski.MinkowskiChannelwiseConvolution import (
    MinkowskiChannelwiseConvolution,
)
from compat.minkowski.MinkowskiCommon import (
    MinkowskiModuleBase,
    convert_to_int_tensor,
)
from compat.minkowski.MinkowskiConvolution import (
    MinkowskiConvolution,
    MinkowskiConvolutionFunction,
    MinkowskiConvolutionTranspose,
    MinkowskiConvolutionTransposeFunction,
    MinkowskiGenerativeConvolutionTranspose,
)
from compat.minkowski.MinkowskiCoordinateManager import (
    CoordinateManager,
    CoordsManager,
    set_coordinate_map_type,
    set_gpu_allocator,
    set_memory_manager_backend,
)
from compat.minkowski.MinkowskiInterpolation import (
    MinkowskiInterpolation,
    MinkowskiInterpolationFunction,
)
from compat.minkowski.MinkowskiKernelGenerator import (
    KernelGenerator,
    KernelRegion,
    convert_region_type,
    get_kernel_volume,
)
from compat.minkowski.MinkowskiNetwork import (
    MinkowskiNetwork,
)
from compat.minkowski.MinkowskiNonlinearity import (
    MinkowskiAdaptiveLogSoftmaxWithLoss,
    MinkowskiAlphaDropout,
    MinkowskiCELU,
    MinkowskiDropout,
    MinkowskiELU,
    MinkowskiGELU,
    MinkowskiHardshrink,
    MinkowskiHardsigmoid,
    MinkowskiHardswish,
    MinkowskiHardtanh,
    MinkowskiLeakyReLU,
    MinkowskiLogSigmoid,
    MinkowskiLogSoftmax,
    MinkowskiPReLU,
    MinkowskiReLU,
    MinkowskiReLU6,
    MinkowskiRReLU,
    MinkowskiSELU,
    MinkowskiSigmoid,
    MinkowskiSiLU,
    MinkowskiSinusoidal,
    MinkowskiSoftmax,
    MinkowskiSoftmin,
    MinkowskiSoftplus,
    MinkowskiSoftshrink,
    MinkowskiSoftsign,
    MinkowskiTanh,
    MinkowskiTanhshrink,
    MinkowskiThreshold,
)
from compat.minkowski.MinkowskiNormalization import (
    MinkowskiBatchNorm,
    MinkowskiInstanceNorm,
    MinkowskiInstanceNormFunction,
    MinkowskiStableInstanceNorm,
    MinkowskiSyncBatchNorm,
)
from compat.minkowski.MinkowskiOps import (
    MinkowskiLinear,
    MinkowskiStackCat,
    MinkowskiStackMean,
    MinkowskiStackSum,
    MinkowskiStackVar,
    MinkowskiToDenseTensor,
    MinkowskiToFeature,
    MinkowskiToSparseTensor,
    cat,
    dense_coordinates,
    mean,
    to_sparse,
    to_sparse_all,
    var,
)
from compat.minkowski.MinkowskiOps import (
    _sum as sum,
)
from compat.minkowski.MinkowskiPooling import (
    MinkowskiAvgPooling,
    MinkowskiDirectMaxPoolingFunction,
    MinkowskiGlobalAvgPooling,
    MinkowskiGlobalMaxPooling,
    MinkowskiGlobalPooling,
    MinkowskiGlobalPoolingFunction,
    MinkowskiGlobalSumPooling,
    MinkowskiLocalPoolingFunction,
    MinkowskiLocalPoolingTransposeFunction,
    MinkowskiMaxPooling,
    MinkowskiPoolingTranspose,
    MinkowskiSumPooling,
)
from compat.minkowski.MinkowskiPruning import (
    MinkowskiPruning,
    MinkowskiPruningFunction,
)
from compat.minkowski.MinkowskiSparseTensor import (
    SparseTensor,
)
from compat.minkowski.MinkowskiTensor import (
    clear_global_coordinate_manager,
    global_coordinate_manager,
    set_global_coordinate_manager,
    set_sparse_tensor_operation_mode,
    sparse_tensor_operation_mode,
)
from compat.minkowski.MinkowskiTensorField import (
    TensorField,
)
from compat.minkowski.MinkowskiUnion import (
    MinkowskiUnion,
    MinkowskiUnionFunction,
)
from compat.minkowski.sparse_matrix_functions import (
    MinkowskiSPMMAverageFunction,
    MinkowskiSPMMFunction,
    spmm,
)
from tritonspconv.graph_capture import make_opaque

__version__ = "0.5.4"

__all__ = [
    "BroadcastMode",
    "ConvolutionMode",
    "CoordinateManager",
    "CoordinateMapKey",
    "CoordinateMapType",
    "CoordsManager",
    "GPUMemoryAllocatorType",
    "KernelGenerator",
    "KernelRegion",
    "MinkowskiAdaptiveLogSoftmaxWithLoss",
    "MinkowskiAlgorithm",
    "MinkowskiAlphaDropout",
    "MinkowskiAvgPooling",
    "MinkowskiBatchNorm",
    "MinkowskiBroadcast",
    "MinkowskiBroadcastAddition",
    "MinkowskiBroadcastConcatenation",
    "MinkowskiBroadcastFunction",
    "MinkowskiBroadcastMultiplication",
    "MinkowskiCELU",
    "MinkowskiChannelwiseConvolution",
    "MinkowskiConvolution",
    "MinkowskiConvolutionFunction",
    "MinkowskiConvolutionTranspose",
    "MinkowskiConvolutionTransposeFunction",
    "MinkowskiDirectMaxPoolingFunction",
    "MinkowskiDropout",
    "MinkowskiELU",
    "MinkowskiFunctional",
    "MinkowskiGELU",
    "MinkowskiGenerativeConvolutionTranspose",
    "MinkowskiGlobalAvgPooling",
    "MinkowskiGlobalMaxPooling",
    "MinkowskiGlobalPooling",
    "MinkowskiGlobalPoolingFunction",
    "MinkowskiGlobalSumPooling",
    "MinkowskiHardshrink",
    "MinkowskiHardsigmoid",
    "MinkowskiHardswish",
    "MinkowskiHardtanh",
    "MinkowskiInstanceNorm",
    "MinkowskiInstanceNormFunction",
    "MinkowskiInterpolation",
    "MinkowskiInterpolationFunction",
    "MinkowskiLeakyReLU",
    "MinkowskiLinear",
    "MinkowskiLocalPoolingFunction",
    "MinkowskiLocalPoolingTransposeFunction",
    "MinkowskiLogSigmoid",
    "MinkowskiLogSoftmax",
    "MinkowskiMaxPooling",
    "MinkowskiModuleBase",
    "MinkowskiNetwork",
    "MinkowskiOps",
    "MinkowskiPReLU",
    "MinkowskiPoolingTranspose",
    "MinkowskiPruning",
    "MinkowskiPruningFunction",
    "MinkowskiRReLU",
    "MinkowskiReLU",
    "MinkowskiReLU6",
    "MinkowskiSELU",
    "MinkowskiSPMMAverageFunction",
    "MinkowskiSPMMFunction",
    "MinkowskiSiLU",
    "MinkowskiSigmoid",
    "MinkowskiSinusoidal",
    "MinkowskiSoftmax",
    "MinkowskiSoftmin",
    "MinkowskiSoftplus",
    "MinkowskiSoftshrink",
    "MinkowskiSoftsign",
    "MinkowskiStableInstanceNorm",
    "MinkowskiStackCat",
    "MinkowskiStackMean",
    "MinkowskiStackSum",
    "MinkowskiStackVar",
    "MinkowskiSumPooling",
    "MinkowskiSyncBatchNorm",
    "MinkowskiTanh",
    "MinkowskiTanhshrink",
    "MinkowskiThreshold",
    "MinkowskiToDenseTensor",
    "MinkowskiToFeature",
    "MinkowskiToSparseTensor",
    "MinkowskiUnion",
    "MinkowskiUnionFunction",
    "PoolingMode",
    "RegionType",
    "SparseTensor",
    "SparseTensorOperationMode",
    "SparseTensorQuantizationMode",
    "TensorField",
    "__version__",
    "cat",
    "clear_global_coordinate_manager",
    "convert_region_type",
    "convert_to_int_tensor",
    "cuda_version",
    "cudart_version",
    "dense_coordinates",
    "get_gpu_memory_info",
    "get_kernel_volume",
    "global_coordinate_manager",
    "is_cuda_available",
    "mean",
    "modules",
    "print_diagnostics",
    "set_coordinate_map_type",
    "set_global_coordinate_manager",
    "set_gpu_allocator",
    "set_memory_manager_backend",
    "set_sparse_tensor_operation_mode",
    "sparse_tensor_operation_mode",
    "spmm",
    "sum",
    "to_sparse",
    "to_sparse_all",
    "utils",
    "var",
]

_NOT_IN_0_5 = {
    "MinkowskiAvgUnpooling": "MinkowskiPoolingTranspose",
    "MinkowskiSumUnpooling": "MinkowskiPoolingTranspose",
    "CoordsKey": "CoordinateMapKey",
    "GlobalPoolingMode": "PoolingMode",
    "MemoryManagerBackend": "GPUMemoryAllocatorType",
    "cat_sparse": "cat",
    "clear_global_coords_man": "clear_global_coordinate_manager",
}


def __getattr__(name: str) -> NoReturn:
    text = f"module 'MinkowskiEngine' has no attribute {name!r}"
    if name in _NOT_IN_0_5:
        text += f": 0.5 has {_NOT_IN_0_5[name]}"
    raise AttributeError(f"{text}.")


_name_layers(_sys.modules[__name__])
make_opaque(
    __name__,
    traceable=(
        "MinkowskiConvolutionBase.forward",
        "MinkowskiBatchNorm.forward",
        "MinkowskiNonlinearityBase.forward",
        "MinkowskiLinear.forward",
        "BasicBlock.forward",
        "Bottleneck.forward",
        "_Residual._gate",
        "Tensor.__add__",
        "Tensor.__sub__",
        "Tensor.__mul__",
        "Tensor.__radd__",
        "Tensor.__rmul__",
        "Tensor.__iadd__",
        "Tensor._binary",
        "Tensor._in_place",
        "cat",
        "_sum",
        "mean",
        "_combine",
        "_listed",
        "_total",
        "_mean",
        "features_of",
        "with_features",
        "is_plain",
        "have_one_map",
        "derive",
        "trace_convolution",
        "_is_traceable",
        "_rows",
    ),
    constant=("_out_key", "_value"),
)
