"""Bit tricks of the kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bitwise_or(a, b):
    """Return ``a | b``, for ``tl.reduce``."""
    return a | b


@triton.jit
def popcount(x):
    """Count the set bits of uint32 values; LLVM knows this form and emits one instruction."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def popcount_signed(x):
    """Count the set bits of int32 values, whose shifts keep the sign."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0x3F
