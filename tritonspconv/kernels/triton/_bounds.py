"""The number of real rows of tables and features that are padded to a capacity (device side)."""

from __future__ import annotations

import triton
import triton.language as tl

# The sort key of padding columns: no column of real rows has a larger one, so padding stays last.
PADDING_KEY: tl.constexpr = tl.constexpr(2**15 - 1)


@triton.jit
def real_rows(count_ptr, n):
    """Return how many of ``n`` rows are real.

    Args:
        count_ptr: int64 [1], the number of real rows; None: all rows are real.
        n: Number of rows, padding included.
    """
    if count_ptr is None:  # noqa: SIM108 - Triton compiles one branch of an `if` only
        real = n
    else:
        real = tl.minimum(tl.load(count_ptr), n).to(tl.int32)
    return real
