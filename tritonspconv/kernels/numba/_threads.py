"""Ranges of rows on several threads, as many as torch uses."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def in_ranges(work: Callable[[int, int], object], n: int, least: int) -> None:
    """Call ``work(start, end)`` for consecutive ranges that cover ``range(n)``, on all threads.

    ``work`` must compute the same for any cut into ranges. Results then have the same bits for any
    number of threads.

    Args:
        work: A function that calls compiled code. Compiled code lets other threads run.
        n: Number of rows, columns or panels.
        least: The smallest range that is worth a thread.
    """
    threads = min(torch.get_num_threads(), n // max(least, 1))
    if threads <= 1:
        work(0, n)
        return
    ends = [n * number // threads for number in range(threads + 1)]
    pool = _pool(os.getpid(), threads - 1)
    others = [pool.submit(work, *ends[number : number + 2]) for number in range(1, threads)]
    work(0, ends[1])
    for other in others:
        other.result()


@functools.lru_cache(maxsize=1)
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Return the pool of a process; a forked process inherits no threads, so it has another."""
    return ThreadPoolExecutor(workers, thread_name_prefix="tritonspconv")
