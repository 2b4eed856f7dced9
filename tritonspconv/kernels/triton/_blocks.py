"""Block counts and sizes for launches.

Triton's ``cdiv`` and ``next_power_of_2`` give the same results, but take microseconds on the host,
because they also work inside kernels.
"""

from __future__ import annotations


def num_blocks(n: int, block: int) -> int:
    """Return how many blocks of ``block`` cover ``n``."""
    return -(-n // block)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least ``n``, for ``n >= 1``."""
    return 1 << (n - 1).bit_length()
