"""Names and signatures of MinkowskiEngine, and answers of its coordinate manager and keys."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from tests.parity.case import Case, Run
from tests.parity.cases.minkowski_run import EXACT, coordinates, layer, tensor

MODULES = {
    "": """
        BroadcastMode CoordinateManager CoordinateMapKey CoordinateMapType CoordsManager
        GPUMemoryAllocatorType KernelGenerator KernelRegion MinkowskiAdaptiveLogSoftmaxWithLoss
        MinkowskiAlgorithm MinkowskiAlphaDropout MinkowskiAvgPooling MinkowskiBatchNorm
        MinkowskiBroadcast MinkowskiBroadcastAddition MinkowskiBroadcastConcatenation
        MinkowskiBroadcastFunction MinkowskiBroadcastMultiplication MinkowskiCELU
        MinkowskiChannelwiseConvolution MinkowskiConvolution MinkowskiConvolutionFunction
        MinkowskiConvolutionTranspose MinkowskiConvolutionTransposeFunction
        MinkowskiDirectMaxPoolingFunction MinkowskiDropout MinkowskiELU MinkowskiFunctional
        MinkowskiGELU MinkowskiGenerativeConvolutionTranspose MinkowskiGlobalAvgPooling
        MinkowskiGlobalMaxPooling MinkowskiGlobalPooling MinkowskiGlobalPoolingFunction
        MinkowskiGlobalSumPooling MinkowskiHardshrink MinkowskiHardsigmoid MinkowskiHardswish
        MinkowskiHardtanh MinkowskiInstanceNorm MinkowskiInstanceNormFunction
        MinkowskiInterpolation MinkowskiInterpolationFunction MinkowskiLeakyReLU MinkowskiLinear
        MinkowskiLocalPoolingFunction MinkowskiLocalPoolingTransposeFunction MinkowskiLogSigmoid
        MinkowskiLogSoftmax MinkowskiMaxPooling MinkowskiModuleBase MinkowskiNetwork MinkowskiOps
        MinkowskiPReLU MinkowskiPoolingTranspose MinkowskiPruning MinkowskiPruningFunction
        MinkowskiRReLU MinkowskiReLU MinkowskiReLU6 MinkowskiSELU MinkowskiSPMMAverageFunction
        MinkowskiSPMMFunction MinkowskiSiLU MinkowskiSigmoid MinkowskiSinusoidal MinkowskiSoftmax
        MinkowskiSoftmin MinkowskiSoftplus MinkowskiSoftshrink MinkowskiSoftsign
        MinkowskiStableInstanceNorm MinkowskiStackCat MinkowskiStackMean MinkowskiStackSum
        MinkowskiStackVar MinkowskiSumPooling MinkowskiSyncBatchNorm MinkowskiTanh
        MinkowskiTanhshrink MinkowskiThreshold MinkowskiToDenseTensor MinkowskiToFeature
        MinkowskiToSparseTensor MinkowskiUnion MinkowskiUnionFunction PoolingMode RegionType
        SparseTensor SparseTensorOperationMode SparseTensorQuantizationMode TensorField __version__
        cat clear_global_coordinate_manager convert_region_type convert_to_int_tensor cuda_version
        cudart_version dense_coordinates get_gpu_memory_info get_kernel_volume
        global_coordinate_manager is_cuda_available mean modules print_diagnostics
        set_global_coordinate_manager set_gpu_allocator set_memory_manager_backend
        set_sparse_tensor_operation_mode sparse_tensor_operation_mode spmm sum to_sparse
        to_sparse_all utils var
    """,
    "utils": """
        SparseCollation batch_sparse_collate batched_coordinates fnv_hash_vec kaiming_normal_
        ravel_hash_vec sparse_collate sparse_quantize summary unique_coordinate_map
    """,
    "MinkowskiOps": "MinkowskiLinear SparseTensor cat mean var to_sparse dense_coordinates",
    "MinkowskiPooling": "MinkowskiAvgPooling MinkowskiSumPooling MinkowskiGlobalPooling",
    "MinkowskiCommon": "MinkowskiModuleBase convert_to_int_list convert_to_int_tensor",
    "modules.resnet_block": "BasicBlock Bottleneck",
    "modules.senet_block": "SELayer SEBasicBlock SEBottleneck",
}
SIGNATURES = {
    "": """
        CoordinateManager KernelGenerator MinkowskiAvgPooling MinkowskiBatchNorm
        MinkowskiChannelwiseConvolution MinkowskiConvolution MinkowskiConvolutionTranspose
        MinkowskiGenerativeConvolutionTranspose MinkowskiGlobalAvgPooling MinkowskiGlobalMaxPooling
        MinkowskiGlobalPooling MinkowskiGlobalSumPooling MinkowskiInstanceNorm
        MinkowskiInterpolation MinkowskiLinear MinkowskiMaxPooling MinkowskiNetwork
        MinkowskiPoolingTranspose MinkowskiSinusoidal MinkowskiSumPooling MinkowskiSyncBatchNorm
        MinkowskiToDenseTensor MinkowskiToSparseTensor SparseTensor TensorField cat mean spmm sum
        to_sparse to_sparse_all var dense_coordinates
    """,
    "utils": """
        SparseCollation batch_sparse_collate batched_coordinates kaiming_normal_ sparse_collate
        sparse_quantize summary unique_coordinate_map
    """,
    "modules.resnet_block": "BasicBlock Bottleneck",
    "modules.senet_block": "SELayer SEBasicBlock SEBottleneck",
}
METHODS = {
    "SparseTensor": """
        cat_slice coordinates_and_features_at coordinates_at dense detach double
        features_at features_at_coordinates float get_device interpolate requires_grad_ slice
        sparse
    """,
    "TensorField": "inverse_mapping sparse splat",
    "CoordinateManager": """
        field_to_sparse_insert_and_map get_coordinate_field get_coordinates insert_and_map
        insert_field interpolation_map_weight kernel_map number_of_unique_batch_indices origin
        origin_map size stride stride_map union_map
    """,
    "MinkowskiConvolution": "forward",
    "MinkowskiPoolingTranspose": "forward",
    "MinkowskiPruning": "forward",
    "MinkowskiInterpolation": "forward",
    "MinkowskiSyncBatchNorm": "convert_sync_batchnorm",
}


def names(run: Run) -> None:
    """Look every public name up."""
    for module, listed in MODULES.items():
        found = [name for name in listed.split() if hasattr(run.module(module), name)]
        run.fact(f"names of {module or 'the package'}", found)
    for owner, listed in METHODS.items():
        found = [name for name in listed.split() if hasattr(getattr(run.module(), owner), name)]
        run.fact(f"methods of {owner}", found)
    run.fact("__version__", run.module().__version__)


def signatures(run: Run) -> None:
    """Record names and defaults of the arguments."""
    for module, listed in SIGNATURES.items():
        for name in listed.split():
            run.fact(name, _parameters(getattr(run.module(module), name)))
    for owner, listed in METHODS.items():
        for name in listed.split():
            method = getattr(getattr(run.module(), owner), name)
            run.fact(f"{owner}.{name}", _parameters(method))


def _parameters(function: Any) -> list[str]:
    found = inspect.signature(function).parameters.values()
    return [
        f"{parameter.name}={_default(parameter.default)}"
        if parameter.default is not parameter.empty
        else parameter.name
        for parameter in found
    ]


def _default(value: Any) -> str:
    """Return a default, enums without their numbers."""
    return str(value) if hasattr(value, "name") else repr(value)


# Keys and maps.


def keys(run: Run) -> None:
    """Record which layers give the same key, and the answers of keys and tensors."""
    ME = run.module()
    x = tensor(run, 3)
    other = tensor(run, 3, coords=x.C, coordinate_manager=x.coordinate_manager)
    down = layer(run, "Convolution", 3, 4, kernel_size=2, stride=2)(x)
    pooled = layer(run, "MaxPooling", kernel_size=3, stride=2)(x)
    pruned = ME.MinkowskiPruning()(x, torch.arange(len(x)) < 20)
    below = layer(run, "Convolution", 3, 4, kernel_size=3, stride=2)(pruned)
    up = layer(run, "ConvolutionTranspose", 4, 3, kernel_size=2, stride=2)(down)
    generated = layer(run, "GenerativeConvolutionTranspose", 4, 3, kernel_size=2, stride=2)(down)
    equal = {
        "same coordinates again": other.coordinate_map_key == x.coordinate_map_key,
        "two strided layers": down.coordinate_map_key == pooled.coordinate_map_key,
        "back up": up.coordinate_map_key == x.coordinate_map_key,
        "generated": generated.coordinate_map_key == x.coordinate_map_key,
    }
    for name, value in equal.items():
        run.fact(name, bool(value))
    for name, y in (("x", x), ("down", down), ("pruned", pruned), ("below", below)):
        stride, identifier = y.coordinate_map_key.get_key()
        run.fact(f"key of {name}", [list(stride), identifier])
    run.fact("coordinate size", x.coordinate_map_key.get_coordinate_size())
    run.fact("shape", list(x.shape))
    run.fact("len", len(x))
    run.fact("dimension", [x.D, x.dimension])
    run.fact("batches", x.coordinate_manager.number_of_unique_batch_indices())
    run.fact("layer", repr(layer(run, "Convolution", 3, 4, kernel_size=3, stride=2)))


def kernel_map(run: Run, k: int, s: int) -> None:
    """List the pairs of a kernel map by their coordinates, tap by tap."""
    x = tensor(run, 1)
    manager = x.coordinate_manager
    out_key = x.coordinate_map_key if s == 1 else manager.stride(x.coordinate_map_key, s)
    found = manager.kernel_map(x.coordinate_map_key, out_key, stride=s, kernel_size=k)
    run.fact("taps", sorted(int(tap) for tap in found))
    coords = manager.get_coordinates(out_key)
    for tap, rows in found.items():
        pairs = torch.cat([x.C[rows[0].long()], coords[rows[1].long()]], 1)
        run.tensor(f"tap {int(tap)}", torch.unique(pairs, dim=0))


def stride_map(run: Run) -> None:
    """List the pairs of a stride map by their coordinates."""
    x = tensor(run, 1)
    manager = x.coordinate_manager
    out_key = manager.stride(x.coordinate_map_key, 2)
    ins, outs = manager.stride_map(x.coordinate_map_key, out_key)
    pairs = [x.C[ins.long()], manager.get_coordinates(out_key)[outs.long()]]
    run.tensor("pairs", torch.unique(torch.cat(pairs, 1), dim=0))


def insert(run: Run) -> None:
    """Insert coordinates that repeat into a manager."""
    ME = run.module()
    coords = coordinates(run, n=30)[run.integers("repeat", 30, 80)]
    manager = ME.CoordinateManager(D=3)
    key, (unique_map, inverse_map) = manager.insert_and_map(coords, 1, "")
    run.tensor("unique_map", unique_map.long())
    run.tensor("inverse_map", inverse_map.long())
    run.tensor("coordinates", manager.get_coordinates(key))
    run.fact("size", manager.size(key))
    run.fact("key", [list(key.get_tensor_stride()), key.get_key()[1]])


def _cases() -> Iterator[Case]:
    for name, function in (
        ("surface-names", names),
        ("surface-signatures", signatures),
        ("keys", keys),
        ("stride-map", stride_map),
        ("insert-and-map", insert),
    ):
        yield Case(name, function, EXACT, exact=True)
    for k, s in ((3, 1), (2, 2), (3, 2)):
        yield Case(
            f"kernel-map-k{k}-s{s}",
            lambda run, k=k, s=s: kernel_map(run, k, s),
            EXACT,
            exact=True,
        )


CASES = list(_cases())
