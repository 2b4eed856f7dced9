"""Enums: names and values of the compiled original, made from integers, copied and pickled."""

import copy
import pickle

import pytest

from compat.minkowski import enums

# MinkowskiEngine 0.5.4 printed these names and values of its enums.
VALUES = {
    "RegionType": ["HYPER_CUBE", "HYPER_CROSS", "CUSTOM"],
    "PoolingMode": [
        "LOCAL_SUM_POOLING",
        "LOCAL_AVG_POOLING",
        "LOCAL_MAX_POOLING",
        "GLOBAL_SUM_POOLING_DEFAULT",
        "GLOBAL_AVG_POOLING_DEFAULT",
        "GLOBAL_MAX_POOLING_DEFAULT",
        "GLOBAL_SUM_POOLING_KERNEL",
        "GLOBAL_AVG_POOLING_KERNEL",
        "GLOBAL_MAX_POOLING_KERNEL",
        "GLOBAL_SUM_POOLING_PYTORCH_INDEX",
        "GLOBAL_AVG_POOLING_PYTORCH_INDEX",
        "GLOBAL_MAX_POOLING_PYTORCH_INDEX",
    ],
    "BroadcastMode": ["ELEMENTWISE_ADDITON", "ELEMENTWISE_MULTIPLICATION"],
    "ConvolutionMode": ["DEFAULT", "DIRECT_GEMM", "COPY_GEMM"],
    "MinkowskiAlgorithm": ["DEFAULT", "MEMORY_EFFICIENT", "SPEED_OPTIMIZED"],
    "CUDAKernelMapMode": ["MEMORY_EFFICIENT", "SPEED_OPTIMIZED"],
    "CoordinateMapType": ["CPU", "CUDA"],
    "GPUMemoryAllocatorType": ["PYTORCH", "CUDA"],
    "SparseTensorOperationMode": ["SEPARATE_COORDINATE_MANAGER", "SHARE_COORDINATE_MANAGER"],
    "SparseTensorQuantizationMode": [
        "RANDOM_SUBSAMPLE",
        "UNWEIGHTED_AVERAGE",
        "UNWEIGHTED_SUM",
        "NO_QUANTIZATION",
        "MAX_POOL",
        "SPLAT_LINEAR_INTERPOLATION",
    ],
}


@pytest.mark.parametrize("name", VALUES)
def test_names_and_values_are_the_originals(name: str):
    enum = getattr(enums, name)
    assert {member.name: member.value for member in enum} == {
        member: value for value, member in enumerate(VALUES[name])
    }
    for value, member in enumerate(VALUES[name]):
        assert enum(value) is getattr(enum, member)
        assert str(enum(value)) == f"{enum(value)}" == f"{name}.{member}"
        assert copy.deepcopy(enum(value)) is enum(value)
        assert pickle.loads(pickle.dumps(enum(value))) is enum(value)


def test_backend_enums_are_integers():
    assert enums.RegionType(1) == 1
    assert int(enums.PoolingMode.GLOBAL_AVG_POOLING_PYTORCH_INDEX) == 10
    assert enums.SparseTensorQuantizationMode(1) != 1


def test_entries_are_those_of_pybind11():
    entries = enums.RegionType.__entries
    assert list(entries) == ["HYPER_CUBE", "HYPER_CROSS", "CUSTOM"]
    assert [member for member, _ in entries.values()] == list(enums.RegionType)


def test_unknown_region_type_is_refused():
    with pytest.raises(ValueError, match="7 is not a valid RegionType"):
        enums.RegionType(7)
