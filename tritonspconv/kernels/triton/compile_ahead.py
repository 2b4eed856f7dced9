"""A list of the kernels that a piece of work would launch (Triton)."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import triton

from tritonspconv.kernels.triton._compile_pool import Job, compile_all, distinct
from tritonspconv.kernels.triton._launch import BoundKernel, watched

# Modules whose kernels compute features. All others build indices, sites and maps.
_OF_FEATURES = frozenset(
    f"tritonspconv.kernels.triton.{name}"
    for name in ("batch_norm", "gather_gemm", "half_parts", "pool", "segment_reduce", "weight_grad")
)


def compile_ahead(work: Callable[[], object], processes: int) -> int:
    """See :func:`tritonspconv.kernels.compile_ahead.compile_ahead`."""
    jobs: list[Job] = []

    def collect(bound: BoundKernel, args: tuple[Any, ...]) -> bool:
        # Torch indexes by tables and orders, so arbitrary contents would lead it out of bounds.
        if not _computes_features(bound):
            return False
        jobs.append(Job.of(bound.kernel, args, bound.options))
        return True

    with watched(collect):
        work()
    target = triton.runtime.driver.active.get_current_target()
    return len(compile_all(distinct(jobs, target), target, processes))


@contextmanager
def maps_only() -> Generator[None]:
    """See :func:`tritonspconv.kernels.compile_ahead.maps_only`."""
    with watched(lambda bound, args: _computes_features(bound)):
        yield


def _computes_features(bound: BoundKernel) -> bool:
    return bound.kernel.fn.__module__ in _OF_FEATURES
