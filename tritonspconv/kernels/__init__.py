"""Kernels as leaves: the same launchers in Triton and in vectorised torch, chosen in one place."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

_MAX_TRITON_NDIM = 4
_MIN_CUDA_CAPABILITY = (8, 0)


@functools.lru_cache(maxsize=1024)
def has_triton(device: torch.device) -> bool:
    """Return whether Triton kernels run on ``device``: AMD, or NVIDIA from sm_80 on."""
    if device.type != "cuda":
        return False
    return bool(torch.version.hip) or (
        torch.cuda.get_device_capability(device) >= _MIN_CUDA_CAPABILITY
    )


def _module(backend: str, op: str) -> ModuleType:
    return importlib.import_module(f"tritonspconv.kernels.{backend}.{op}")


@functools.lru_cache(maxsize=1024)
def kernels_for(op: str, device: torch.device) -> ModuleType:
    """Return the module of launchers of ``op`` for tensors on ``device``.

    Args:
        op: A file name in ``kernels/triton`` and ``kernels/eager``.
        device: Where the tensors are.
    """
    return _module("triton" if has_triton(device) else "eager", op)


@functools.lru_cache(maxsize=1024)
def map_kernels_for(op: str, device: torch.device, ndim: int) -> ModuleType:
    """Return the module of launchers of a map ``op`` for coordinates of ``ndim`` axes.

    The Triton map kernels are for 1 to 4 axes; further axes take the torch ones, on any device.
    """
    use_triton = ndim <= _MAX_TRITON_NDIM and has_triton(device)
    return _module("triton" if use_triton else "eager", op)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums of ``dtype`` are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
