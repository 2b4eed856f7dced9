"""Kernels as leaves: one face for each launcher, behind it Triton and vectorised torch.

A module of this folder is a face: it holds a launcher's signature, shapes and contract, and hands
the call to the back end for the tensors' device. ``triton/`` and ``eager/`` hold implementations.
"""

from __future__ import annotations

import functools
import warnings

import torch

_MAX_TRITON_NDIM = 4
_MIN_CUDA_CAPABILITY = (8, 0)


@functools.lru_cache(maxsize=1024)
def has_triton(device: torch.device) -> bool:
    """Return whether Triton kernels run on ``device``: AMD, or NVIDIA from sm_80 on.

    This is the only place that picks a back end.
    """
    if device.type != "cuda":
        return False
    if torch.version.hip:
        return True
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= _MIN_CUDA_CAPABILITY:
        return True
    # Once for each device, because the answer is kept.
    warnings.warn(
        f"{device} is sm_{major}{minor}; the Triton kernels need sm_80 or newer. Sparse operations "
        "run there in vectorised torch: right, and several times slower.",
        stacklevel=2,
    )
    return False


def has_triton_maps(device: torch.device, ndim: int) -> bool:
    """Return whether Triton kernels build maps on ``device`` for coordinates of ``ndim`` axes.

    The Triton map kernels are for 1 to 4 axes; further axes take the torch ones, on any device.
    """
    return ndim <= _MAX_TRITON_NDIM and has_triton(device)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums of ``dtype`` are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
