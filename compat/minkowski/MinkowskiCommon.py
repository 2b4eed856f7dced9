"""Arguments that are one number or one per axis, and the base class of the layers."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compat.minkowski._errors import MinkowskiError

# One int, or one per axis: a list, tuple, NumPy array or tensor.
StrideType = Any

_Class = TypeVar("_Class", bound=type)


class MinkowskiModuleBase(nn.Module):
    """Base class of the layers."""


def convert_to_int_list(arg: StrideType, dimension: int) -> list[int]:
    """Return a list of ``dimension`` ints.

    Args:
        arg: One int for every axis, or one per axis.
        dimension: Number of axes.

    Raises:
        MinkowskiError: There is another number of entries.
    """
    values = list(arg) if isinstance(arg, Iterable) else [arg] * dimension
    if len(values) != dimension:
        raise MinkowskiError(f"expected an int or {dimension} of them, one per axis; got {arg}.")
    return [operator.index(value) for value in values]


def convert_to_int_tensor(arg: StrideType, dimension: int) -> Tensor:
    """Return an int32 tensor [dimension]; see :func:`convert_to_int_list`."""
    return torch.tensor(convert_to_int_list(arg, dimension), dtype=torch.int32)


def renamed_arguments(**new_names: str) -> Callable[[_Class], _Class]:
    """Decorate a class so that keyword arguments of MinkowskiEngine 0.4 raise with their new name.

    Args:
        new_names: The new name, or what to do instead, of each old one.
    """

    def decorate(cls: _Class) -> _Class:
        init = cls.__init__

        @functools.wraps(init)
        def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
            for name in kwargs.keys() & new_names:
                raise TypeError(
                    f"{cls.__name__}: {name!r} is an argument of MinkowskiEngine 0.4; in 0.5 use "
                    f"{new_names[name]}."
                )
            init(self, *args, **kwargs)

        cls.__init__ = checked_init
        return cls

    return decorate


def renamed_attribute(owner: object, name: str, new_names: Mapping[str, str]) -> AttributeError:
    """Return the error for an attribute that is not there, with its new name where it has one."""
    text = f"{type(owner).__name__!r} object has no attribute {name!r}"
    if name in new_names:
        text += f": it is MinkowskiEngine 0.4's name; in 0.5 use {new_names[name]}"
    return AttributeError(f"{text}.", name=name, obj=owner)
