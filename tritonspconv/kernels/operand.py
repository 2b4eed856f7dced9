"""Operands of the matrix kernels: a tensor, or the float16 parts of a float32 one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class HalfParts(NamedTuple):
    """One or two float16 tensors that stand for a float32 one.

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
