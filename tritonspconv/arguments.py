"""Checks of arguments. A message gives the expected value, the value received and a fix."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return ``value`` as a Python int.

    The int is a new object: a 0-d tensor that the caller passes is neither kept nor written to.

    Args:
        name: Operation and argument, for the message: ``"SparseTensor: batch_size"``.
        value: An int, or an object that Python accepts as one: NumPy's integers, a tensor of one
            integer.
        least: The smallest value that is allowed.
        most: The largest value that is allowed.

    Raises:
        TypeError: ``value`` is no whole number.
        ValueError: ``value`` is out of range.
    """
    try:
        number = operator.index(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be an int; got {value!r} of type {type(value).__name__}. Pass a whole "
            "number, rounded with int() where it is a float."
        ) from error
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}; got {number}.")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}; got {number}.")
    return number


def whole_numbers(
    name: str, values: Any, count: int | None = None, least: int | None = None
) -> tuple[int, ...]:
    """Return the entries of a sequence as Python ints; see :func:`whole_number`.

    Args:
        name: Operation and argument, for the message.
        values: A sequence of whole numbers.
        count: The number of entries that there must be.
        least: The smallest value that is allowed.

    Raises:
        TypeError: ``values`` is no sequence of whole numbers.
        ValueError: There is another number of entries, or one is out of range.
    """
    if isinstance(values, str) or not isinstance(values, Iterable) or _is_scalar(values):
        wanted = "ints" if count is None else f"{count} ints"
        raise TypeError(f"{name} must be a sequence of {wanted}, one per axis; got {values!r}.")
    numbers = tuple(whole_number(name, value, least) for value in values)
    if count is not None and len(numbers) != count:
        raise ValueError(f"{name} must have {count} entries, one per axis; got {numbers}.")
    return numbers


def to_ntuple(
    value: int | Sequence[int], ndim: int, name: str, least: int | None = None
) -> tuple[int, ...]:
    """Expand an int to ``ndim`` entries, or check that a sequence has ``ndim`` of them.

    Args:
        value: One int for every axis, or one int per axis.
        ndim: Number of spatial axes.
        name: The argument's name, for the message.
        least: The smallest value that is allowed.

    Raises:
        TypeError: An entry is no whole number.
        ValueError: The sequence has another length than ``ndim``, or an entry is out of range.
    """
    if isinstance(value, str) or not isinstance(value, Iterable) or _is_scalar(value):
        return (whole_number(name, value, least),) * ndim
    numbers = whole_numbers(name, value, least=least)
    if len(numbers) != ndim:
        raise ValueError(f"{name} must be an int or have {ndim} entries; got {list(numbers)}.")
    return numbers


def check_tensor(name: str, value: Any) -> None:
    """Check that ``value`` is a tensor.

    Raises:
        TypeError: ``value`` is something else, such as a NumPy array.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor; got {type(value).__name__}. Convert it with "
            "torch.as_tensor."
        )


def _is_scalar(value: Any) -> bool:
    """Return whether ``value`` is a tensor or an array without axes, which Python may iterate."""
    return getattr(value, "ndim", 1) == 0
