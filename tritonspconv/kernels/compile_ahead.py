"""Compile the kernels of a piece of work before it runs, in a pool of processes.

The first result of a network is mostly compilation: each kernel compiles when it is first launched.
Which kernels a network needs does not depend on the features that they compute. So the work runs
once without the kernels of features, which lists these, and processes compile the list in parallel
into Triton's cache. Kernels that build maps run, and compile, as they are launched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

import torch

from tritonspconv.kernels import has_triton


def compile_ahead(work: Callable[[], object], device: torch.device, processes: int) -> int:
    """Compile the kernels of features that ``work`` launches; return how many were compiled.

    ``work`` runs without these kernels, so that features are arbitrary. It must not read them on
    the host, as work over rows that are padded to a capacity does not. Kernels that are in Triton's
    cache are left out. Nothing is done, and ``work`` does not run, where no Triton kernels run.

    Args:
        work: The work. Threads that it starts launch all of their kernels.
        device: The device on which it runs.
        processes: Number of processes that compile. With one nothing is gained, so that the
            launches compile.
    """
    return _back_end(device).compile_ahead(work, processes)


def maps_only(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which kernels of features do not run, but kernels of maps do.

    A rehearsal finds out how many sites a network makes. Features of its results are arbitrary.
    """
    return _back_end(device).maps_only()


@functools.lru_cache(maxsize=64)
def _back_end(device: torch.device) -> ModuleType:
    if has_triton(device):
        from tritonspconv.kernels.triton import compile_ahead

        return compile_ahead
    from tritonspconv.kernels.eager import compile_ahead

    return compile_ahead
