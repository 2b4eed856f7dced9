"""Ranges of rows on several threads, as many as torch uses.

On Linux the threads are those of torch's own OpenMP. A pool of other threads would compete with
them: after each operation of torch, its idle threads keep spinning on their cores for a while.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_Work = Callable[[int, int], object]
_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# A forked process inherits no threads, and OpenMP waits for them forever.
_PROCESS = os.getpid()


def in_ranges(work: _Work, n: int, least: int) -> None:
    """Call ``work(start, end)`` for consecutive ranges that cover ``range(n)``, on all threads.

    ``work`` must compute the same for any cut into ranges. Results then have the same bits for any
    number of threads.

    Args:
        work: A function that calls compiled code. Compiled code lets other threads run.
        n: Number of rows, columns or panels.
        least: The smallest range that is worth a thread.

    Raises:
        BaseException: The first error that ``work`` raised, after all threads have ended.
    """
    threads = min(torch.get_num_threads(), n // max(least, 1))
    if threads <= 1:
        work(0, n)
        return
    ends = [n * number // threads for number in range(threads + 1)]
    openmp = _openmp()
    if openmp is None or os.getpid() != _PROCESS:
        _in_pool(work, ends)
    else:
        _in_region(openmp, work, ends)


def _in_region(openmp: ctypes.CDLL, work: _Work, ends: list[int]) -> None:
    """Run the ranges in a parallel region of OpenMP, which may give fewer threads than asked."""
    threads = len(ends) - 1
    errors: list[BaseException] = []

    def run(_: int | None) -> None:
        try:
            team = openmp.omp_get_num_threads()
            for number in range(openmp.omp_get_thread_num(), threads, team):
                work(ends[number], ends[number + 1])
        except BaseException as error:  # ctypes would print the error and go on
            errors.append(error)

    openmp.GOMP_parallel(_REGION(run), None, threads, 0)
    if errors:
        raise errors[0]


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """Return the OpenMP library that torch calls, if it has the entry point that GCC calls.

    GCC calls ``GOMP_parallel`` for ``#pragma omp parallel``. GNU's OpenMP has it since GCC 4.9;
    LLVM's and Intel's have it on Linux.
    """
    if (
        sys.platform != "linux"
        or "parallel backend: OpenMP" not in torch.__config__.parallel_info()
    ):
        return None
    library = ctypes.CDLL(None)  # all that torch has loaded for the whole process
    if not hasattr(library, "GOMP_parallel"):
        return None
    library.GOMP_parallel.argtypes = (_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    library.GOMP_parallel.restype = None
    return library


def _in_pool(work: _Work, ends: list[int]) -> None:
    """Run the ranges on threads of Python.

    The caller runs each range that no thread has begun. So a range may have ranges of its own:
    no thread waits for a range that waits for a thread.
    """
    threads = len(ends) - 1
    pool = _pool(os.getpid(), threads - 1)
    ranges = list(itertools.pairwise(ends))
    others = [pool.submit(work, *each) for each in ranges[1:]]
    error = _error_of(work, *ranges[0])
    for other, each in zip(others, ranges[1:], strict=True):
        raised = _error_of(work, *each) if other.cancel() else other.exception()
        error = error or raised
    if error is not None:
        raise error


def _error_of(work: _Work, start: int, end: int) -> BaseException | None:
    try:
        work(start, end)
    except BaseException as error:  # the caller raises it when all ranges have ended
        return error
    return None


@functools.lru_cache(maxsize=1)
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Return the pool of a process; a forked process inherits no threads, so it has another."""
    return ThreadPoolExecutor(workers, thread_name_prefix="tritonspconv")
