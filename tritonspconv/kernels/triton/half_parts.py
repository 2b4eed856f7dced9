"""float32 operands as float16 parts, which the matrix units multiply twice as fast (Triton).

A power of two per tensor brings its largest magnitude into ``[2**14, 2**15)``. There
``high = float16(x)`` keeps 11 bits, and ``low = float16((x - high) * 2**11)`` keeps the next 11. So
``high @ high + (high @ low + low @ high) * 2**-11`` has IEEE float32 grade, and ``high @ high``
alone has the grade of tf32, which keeps 11 bits too. Entries smaller than the largest by ``2**29``
and more lose bits one by one. After arXiv:2203.03341.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.triton._blocks import num_blocks
from tritonspconv.kernels.triton._launch import launch
from tritonspconv.kernels.triton.configs import card_of

_BLOCK = 4096
_MAXIMA = 512
# If rows x c_in x c_out is at least this large, the faster product saves more time than the two
# launches per operand cost.
_MIN_WORK = 2**30


class HalfParts(NamedTuple):
    """One or two float16 tensors that represent a float32 tensor.

    Attributes:
        high: The leading bits, in the shape and strides of the tensor.
        low: The next 11 bits, times 2**11; None where tf32's accuracy is enough.
        largest: float32 [], the largest finite magnitude, from which kernels derive the power of
            two.
    """

    high: Tensor
    low: Tensor | None
    largest: Tensor


Operand = Tensor | HalfParts


@triton.jit
def half_exponent(largest):
    """Return s for which ``largest * 2**s`` lies in [2**14, 2**15), or 126 for tiny ``largest``."""
    return tl.minimum(141 - (largest.to(tl.int32, bitcast=True) >> 23), 126)


@triton.jit
def power_of_two(exponent):
    """Return ``2**exponent`` as float32, for exponents in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def join_parts(acc, acc_low, a_largest_ptr, b_largest_ptr, PARTS: tl.constexpr):
    """Return the product of two split operands, from the sums of their leading and next products.

    Multiply by ``2**-exponent`` in two steps: either factor then lies in float32's range.
    """
    if PARTS == 2:
        # An infinite leading product is the result; its next products could be infinite with the
        # other sign.
        acc += tl.where(tl.abs(acc) < float("inf"), acc_low * 0.00048828125, 0.0)  # 2**-11
    exponent = half_exponent(tl.load(a_largest_ptr))
    exponent += half_exponent(tl.load(b_largest_ptr))
    half = (-exponent) >> 1
    return acc * power_of_two(half) * power_of_two(-exponent - half)


@triton.jit(do_not_specialize=["units", "row_size"])
def maxima_kernel(
    x_ptr, maxima_ptr, count_ptr, units, row_size, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """Write a program's largest finite magnitude, over every n-th block for n programs.

    There are ``units * UNIT`` entries. If UNIT is 16, the compiler loads whole vectors. Rows of
    ``row_size`` entries behind the count are padding, whose magnitudes do not matter.
    """
    numel = units.to(tl.int64) * UNIT
    if count_ptr is not None:
        numel = tl.minimum(numel, tl.load(count_ptr) * row_size)
    offs = tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), dtype=tl.float32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, step):
        x = tl.abs(tl.load(x_ptr + start + offs, mask=start + offs < numel, other=0.0))
        found = tl.maximum(found, tl.where(x < float("inf"), x, 0.0))
    tl.store(maxima_ptr + tl.program_id(0), tl.max(found, axis=0))


@triton.jit(do_not_specialize=["units"])
def split_kernel(
    x_ptr,
    high_ptr,
    low_ptr,
    maxima_ptr,
    largest_ptr,
    units,
    UNIT: tl.constexpr,
    MAXIMA: tl.constexpr,
    HAS_LOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the parts of BLOCK entries; the first program also writes the maximum of maxima."""
    pid = tl.program_id(0)
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < units.to(tl.int64) * UNIT
    largest = tl.max(tl.load(maxima_ptr + tl.arange(0, MAXIMA)), axis=0)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0) * power_of_two(half_exponent(largest))
    high = x.to(tl.float16)
    tl.store(high_ptr + offs, high, mask=mask)
    if HAS_LOW:
        kept = high.to(tl.float32)
        # The high part holds infinite entries and NaN; the low part is zero there.
        finite = tl.abs(kept) < float("inf")
        rest = tl.where(finite, x, 0.0) - tl.where(finite, kept, 0.0)
        tl.store(low_ptr + offs, (rest * 2048.0).to(tl.float16), mask=mask)
    if pid == 0:
        tl.store(largest_ptr, largest)


def as_operand(x: Tensor, work: int, precision: str, count: Tensor | None = None) -> Operand:
    """Split large float32 operands of an NVIDIA GPU; return other operands unchanged."""
    if x.dtype != torch.float32 or work < _MIN_WORK:
        return x
    if card_of(x.device).is_amd:
        return x
    return split_half(x, with_low=precision == "ieee", count=count)


def split_half(x: Tensor, *, with_low: bool, count: Tensor | None = None) -> HalfParts:
    """Split a float32 tensor.

    Args:
        x: Any shape; copied first if its memory has gaps or overlaps.
        with_low: Make both parts, for IEEE grade products.
        count: int64 [], number of real rows; None: all.

    Returns:
        The parts, whose strides are those of ``x`` where it is dense.
    """
    high = torch.empty_like(x, dtype=torch.float16)
    if high.stride() != x.stride():
        x = x.contiguous()
        high = torch.empty_like(x, dtype=torch.float16)
    low = torch.empty_like(high) if with_low else None
    if x.numel() == 0:
        return HalfParts(high, low, x.new_zeros(()))
    # The last entry will be the maximum of the others.
    maxima = torch.empty(_MAXIMA + 1, dtype=torch.float32, device=x.device)
    largest = maxima[_MAXIMA]
    unit = 16 if x.numel() % 16 == 0 else 1
    units = x.numel() // unit
    launch(
            maxima_kernel, (_MAXIMA,), x.device,
        x, maxima, count, units, x.shape[-1], UNIT=unit, BLOCK=_BLOCK,
    )  # fmt: skip
    launch(
            split_kernel, (num_blocks(x.numel(), _BLOCK),), x.device,
        x, high, low, maxima, largest, units,
        UNIT=unit, MAXIMA=_MAXIMA, HAS_LOW=with_low, BLOCK=_BLOCK,
    )  # fmt: skip
    return HalfParts(high, low, largest)


def leading_part(
    operand: Operand,
) -> tuple[int, Tensor, Tensor | None, Tensor | None]:
    """Return the number of parts (0: none, the operand as it is), high, low and largest."""
    if isinstance(operand, Tensor):
        return 0, operand, None, None
    return 1 if operand.low is None else 2, operand.high, operand.low, operand.largest
