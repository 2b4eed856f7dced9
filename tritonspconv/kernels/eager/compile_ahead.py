"""Nothing is compiled where torch computes, and nothing is left out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext


def compile_ahead(work: Callable[[], object], processes: int) -> int:
    """See :func:`tritonspconv.kernels.compile_ahead.compile_ahead`."""
    del work, processes
    return 0


def maps_only() -> AbstractContextManager[None]:
    """See :func:`tritonspconv.kernels.compile_ahead.maps_only`."""
    return nullcontext()
