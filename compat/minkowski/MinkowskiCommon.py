"""Arguments that are one number or one per axis, and the base class of the layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from compat.minkowski._errors import MinkowskiError
from compat.minkowski._names import module_getattr

# The argument that MinkowskiEngine 0.5 takes instead of the number of axes.
KNOWN_DIMENSION = "nothing: the input knows its dimension"

# A stride is one int, or one int per axis in a list, tuple, NumPy array or tensor.
StrideType = Any

_Target = TypeVar("_Target", bound=Callable[..., Any])


class MinkowskiModuleBase(nn.Module):
    """Base class of the layers.

    Attributes:
        _own_function: The autograd function that the layer made. Some layers keep it as ``conv``,
            ``pooling`` and so on. If users put another function in its place, the layer calls the
            other function.
    """

    _own_function: object


def convert_to_int_list(arg: StrideType, dimension: int) -> list[int]:
    """Return a list of ``dimension`` ints.

    Args:
        arg: One int for every axis, or one per axis; floats that are whole count.
        dimension: Number of axes.

    Raises:
        MinkowskiError: The number of entries is wrong, or an entry is not a whole number.
    """
    # Tensors and arrays without axes are Iterable, but hold one number.
    several = isinstance(arg, Iterable) and getattr(arg, "ndim", 1) > 0
    values = list(arg) if several else [arg] * dimension
    whole = [value for value in map(_whole, values) if value is not None]
    if len(whole) != dimension or len(values) != dimension:
        raise MinkowskiError(f"expected an int or {dimension} of them, one per axis; got {arg!r}.")
    return whole


def _whole(value: Any) -> int | None:
    """Return a whole number as an int, and None for any other value."""
    try:
        number = value.item() if hasattr(value, "item") else value
        return int(number) if float(number).is_integer() else None
    except (TypeError, ValueError, RuntimeError):
        return None


def convert_to_int_tensor(arg: StrideType, dimension: int) -> Tensor:
    """Return an int32 tensor [dimension]; see :func:`convert_to_int_list`."""
    return torch.tensor(convert_to_int_list(arg, dimension), dtype=torch.int32, device="cpu")


def renamed_arguments(**new_names: str) -> Callable[[_Target], _Target]:
    """Make keyword arguments of MinkowskiEngine 0.4 raise an error that has their new name.

    Args:
        new_names: The new name of each old one, or advice.
    """

    def decorate(target: _Target) -> _Target:
        call: Any = target.__init__ if isinstance(target, type) else target

        @functools.wraps(call)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs.keys() & new_names:
                raise TypeError(
                    f"{target.__name__}: {name!r} is an argument of MinkowskiEngine 0.4; in 0.5 "
                    f"use {new_names[name]}."
                )
            return call(*args, **kwargs)

        if isinstance(target, type):
            cast("Any", target).__init__ = checked
            return cast("_Target", target)
        return cast("_Target", checked)

    return decorate


def renamed_attribute(owner: object, name: str, new_names: Mapping[str, str]) -> AttributeError:
    """Return the error for a missing attribute, with its new name if there is one."""
    text = f"{type(owner).__name__!r} object has no attribute {name!r}"
    if name in new_names:
        text += f": it is MinkowskiEngine 0.4's name; in 0.5 use {new_names[name]}"
    return AttributeError(f"{text}.", name=name, obj=owner)


__getattr__ = module_getattr(__name__)
