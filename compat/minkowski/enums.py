"""Enums of MinkowskiEngine 0.5.4, with the original's names and values.

The enums of the compiled back end compare equal to their integers and are made from them:
``RegionType(0) == RegionType.HYPER_CUBE == 0``. All can be pickled and copied.
"""

from enum import Enum, EnumMeta, IntEnum
from typing import Any

_NAMES_SINCE_0_5 = {
    "HYPERCUBE": "HYPER_CUBE",
    "HYPERCROSS": "HYPER_CROSS",
    "HYBRID": "CUSTOM, with region_offsets",
    "SEPARATE_COORDS_MANAGER": "SEPARATE_COORDINATE_MANAGER",
    "SHARE_COORDS_MANAGER": "SHARE_COORDINATE_MANAGER",
}


class _Members(EnumMeta):
    """Lists entries as pybind11 does, and errors about members of 0.4 name the members of 0.5."""

    def __getattr__(cls, name: str) -> Any:
        # pybind11's enums have these; downstream code builds tables from them.
        if name == "__entries":
            return {member.name: (member, None) for member in cls}
        # Python before 3.12 finds members here.
        if not name.startswith("_") and name in cls.__members__:
            return cls.__members__[name]
        text = f"{cls.__name__} has no member {name!r}"
        if name in _NAMES_SINCE_0_5:
            text += f": it is MinkowskiEngine 0.4's name; in 0.5 use {_NAMES_SINCE_0_5[name]}"
        raise AttributeError(f"{text}.", name=name, obj=cls)


class _BackendEnum(IntEnum, metaclass=_Members):
    """Prints as the compiled enums do, ``RegionType.HYPER_CUBE``, in text and in format strings."""

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __format__(self, format_spec: str) -> str:
        return format(str(self), format_spec)


class RegionType(_BackendEnum):
    """Shape of a kernel's window."""

    HYPER_CUBE = 0
    HYPER_CROSS = 1
    CUSTOM = 2


class PoolingMode(_BackendEnum):
    """Reduction of a pool. The algorithm in a global mode's name changes nothing here."""

    LOCAL_SUM_POOLING = 0
    LOCAL_AVG_POOLING = 1
    LOCAL_MAX_POOLING = 2
    GLOBAL_SUM_POOLING_DEFAULT = 3
    GLOBAL_AVG_POOLING_DEFAULT = 4
    GLOBAL_MAX_POOLING_DEFAULT = 5
    GLOBAL_SUM_POOLING_KERNEL = 6
    GLOBAL_AVG_POOLING_KERNEL = 7
    GLOBAL_MAX_POOLING_KERNEL = 8
    GLOBAL_SUM_POOLING_PYTORCH_INDEX = 9
    GLOBAL_AVG_POOLING_PYTORCH_INDEX = 10
    GLOBAL_MAX_POOLING_PYTORCH_INDEX = 11


class BroadcastMode(_BackendEnum):
    """Operation of a broadcast; the misspelt name is the original's."""

    ELEMENTWISE_ADDITON = 0
    ELEMENTWISE_MULTIPLICATION = 1


class ConvolutionMode(_BackendEnum):
    """The original's choice of algorithm. Here it is a label without effect."""

    DEFAULT = 0
    DIRECT_GEMM = 1
    COPY_GEMM = 2


class MinkowskiAlgorithm(_BackendEnum):
    """The original's trade of memory for speed. Here it is a label without effect."""

    DEFAULT = 0
    MEMORY_EFFICIENT = 1
    SPEED_OPTIMIZED = 2


class CUDAKernelMapMode(_BackendEnum):
    """The original's trade of memory for speed in kernel maps. Here it is a label."""

    MEMORY_EFFICIENT = 0
    SPEED_OPTIMIZED = 1


class CoordinateMapType(_BackendEnum):
    """Device that coordinates live on."""

    CPU = 0
    CUDA = 1


class GPUMemoryAllocatorType(_BackendEnum):
    """The original's source of GPU memory. Here it is a label, because torch allocates."""

    PYTORCH = 0
    CUDA = 1


class SparseTensorOperationMode(Enum, metaclass=_Members):
    """Tensors that are built from coordinates share one coordinate manager, or each has its own."""

    SEPARATE_COORDINATE_MANAGER = 0
    SHARE_COORDINATE_MANAGER = 1


class SparseTensorQuantizationMode(Enum, metaclass=_Members):
    """The rule for the features of points that fall into one voxel."""

    RANDOM_SUBSAMPLE = 0
    UNWEIGHTED_AVERAGE = 1
    UNWEIGHTED_SUM = 2
    NO_QUANTIZATION = 3
    MAX_POOL = 4
    SPLAT_LINEAR_INTERPOLATION = 5
