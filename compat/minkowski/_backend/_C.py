"""Names of ``MinkowskiEngineBackend._C`` that Python code uses: enums, keys, the CUDA version.

The compiled operators are not here: the layers call the engine.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from compat.minkowski._keys import CoordinateMapKey
from compat.minkowski.enums import (
    BroadcastMode,
    ConvolutionMode,
    CoordinateMapType,
    CUDAKernelMapMode,
    GPUMemoryAllocatorType,
    MinkowskiAlgorithm,
    PoolingMode,
    RegionType,
)
from compat.minkowski.utils.quantization import quantize

__all__ = [
    "BroadcastMode",
    "CUDAKernelMapMode",
    "ConvolutionMode",
    "CoordinateMapKey",
    "CoordinateMapType",
    "GPUMemoryAllocatorType",
    "MinkowskiAlgorithm",
    "PoolingMode",
    "RegionType",
    "cuda_version",
    "cudart_version",
    "get_gpu_memory_info",
    "is_cuda_available",
    "quantize_np",
    "quantize_th",
]

quantize_np = quantize_th = quantize


def is_cuda_available() -> bool:
    """Return whether layers run on a GPU here."""
    return torch.cuda.is_available()


def cuda_version() -> int:
    """Return the CUDA version that torch was built for, 12080 for 12.8; -1 without CUDA."""
    if torch.version.cuda is None:
        return -1
    major, minor = torch.version.cuda.split(".")[:2]
    return 1000 * int(major) + 10 * int(minor)


def cudart_version() -> int:
    """Return the version of the CUDA runtime, torch's own; see :func:`cuda_version`."""
    return cuda_version()


def get_gpu_memory_info() -> tuple[int, int]:
    """Return the free and the total bytes of the current GPU; (0, 0) without one."""
    return torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(
        f"module 'MinkowskiEngineBackend._C' has no attribute {name!r}: compiled operators are not "
        "provided. Call the layers, or the operators of tritonspconv.ops."
    )
