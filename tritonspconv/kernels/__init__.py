"""Kernels as leaves: one face for each launcher, behind it Triton, numba and vectorised torch.

A module of this folder is a face: it holds a launcher's signature, shapes and contract, and hands
the call to the back end for the tensors' device. ``triton/``, ``numba/`` and ``eager/`` hold
implementations.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings

import torch

from tritonspconv.guide import more

_MAX_TRITON_NDIM = 4
_MIN_CUDA_CAPABILITY = (8, 0)
# "0" switches the numba kernels off.
NUMBA_VARIABLE = "TRITONSPCONV_NUMBA"


@functools.lru_cache(maxsize=1024)
def has_triton(device: torch.device) -> bool:
    """Return whether Triton kernels run on ``device``: AMD, or NVIDIA from sm_80 on.

    With :func:`has_numba`, this is the only place that picks a back end.
    """
    if device.type != "cuda":
        return False
    if torch.version.hip:
        return True
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= _MIN_CUDA_CAPABILITY:
        return True
    # The warning comes once for each device, because the answer is kept.
    warnings.warn(
        f"{device} is sm_{major}{minor}; the Triton kernels need sm_80 or newer. Sparse operations "
        "run there in vectorised torch: right, and several times slower." + more("old-gpu"),
        stacklevel=2,
    )
    return False


def has_triton_maps(device: torch.device, ndim: int) -> bool:
    """Return whether Triton kernels build maps on ``device`` for coordinates of ``ndim`` axes.

    The Triton map kernels are for 1 to 4 axes; further axes take the torch ones, on any device.
    """
    return ndim <= _MAX_TRITON_NDIM and has_triton(device)


@functools.lru_cache(maxsize=1024)
def has_numba(device: torch.device) -> bool:
    """Return whether numba kernels run on ``device``: a CPU, if numba is installed.

    The extra ``cpu`` installs numba, and ``TRITONSPCONV_NUMBA=0`` in the environment switches its
    kernels off. Both are looked at once, at the first call.
    """
    if device.type != "cpu" or os.environ.get(NUMBA_VARIABLE) == "0":
        return False
    try:
        importlib.import_module("numba")
    except ModuleNotFoundError as error:
        if error.name == "numba":
            return False
        _warn_of_numba(error)
    except ImportError as error:
        _warn_of_numba(error)
    else:
        return True
    return False


def _warn_of_numba(error: ImportError) -> None:
    """Warn that numba is installed but does not work; once, because the caller keeps the answer."""
    warnings.warn(
        f"numba is installed and cannot be imported ({error}). Sparse operations on the CPU run in "
        f"vectorised torch: right, and slower. Mend numba, or set {NUMBA_VARIABLE}=0."
        + more("broken-numba"),
        stacklevel=3,
    )


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums of ``dtype`` are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
