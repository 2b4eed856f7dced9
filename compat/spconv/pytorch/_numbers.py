"""Numbers that callers pass: whole ones, and one for each axis."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from compat.spconv.pytorch._errors import SpconvError


def whole_numbers(name: str, values: Iterable[Any]) -> tuple[int, ...]:
    """Return ``values`` as ints.

    Args:
        name: The argument's name in messages.
        values: Ints, or floats and tensors that hold whole numbers.

    Raises:
        SpconvError: A value is no whole number.
    """
    found = _as_ints(values)
    if found is None:
        raise SpconvError(f"{name} must be whole numbers; got {_shown(values)}. Round first.")
    return found


def whole_number(name: str, value: Any) -> int:
    """Return ``value``, an int or a float or tensor that holds a whole number, as an int.

    Args:
        name: The argument's name in messages.
        value: The number.

    Raises:
        SpconvError: It is no whole number.
    """
    found = _as_ints([value])
    if found is None:
        raise SpconvError(f"{name} must be a whole number; got {_shown(value)}.")
    return found[0]


def per_axis(name: str, ndim: int, value: Any) -> list[int]:
    """Return ``value`` as one int for each axis.

    Args:
        name: The argument's name in messages.
        ndim: Number of axes.
        value: A whole number for all axes, or a sequence of ``ndim`` of them.

    Raises:
        SpconvError: It is something else.
    """
    if type(value) is int:
        return [value] * ndim
    is_sequence = hasattr(value, "__len__") and getattr(value, "ndim", 1) != 0
    found = None if isinstance(value, str) else _as_ints(value if is_sequence else [value] * ndim)
    if found is None or len(found) != ndim:
        raise SpconvError(
            f"{name} must be a whole number, or {ndim} of them, one per axis; got {_shown(value)}."
        )
    return list(found)


def _as_ints(values: Iterable[Any]) -> tuple[int, ...] | None:
    """Return ``values`` as ints, or None if they are no whole numbers."""
    try:
        given: list[Any] = [
            value.item() if isinstance(value, torch.Tensor) else value for value in values
        ]
        if set(map(type, given)) == {int}:
            return tuple(given)
        found = tuple(map(int, given))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return found if list(found) == given else None


def _shown(value: Any) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"
