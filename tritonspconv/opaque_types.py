"""Types that ``torch.compile`` hands from operator to operator without looking inside.

A kernel map holds tables that are made on first use, so it cannot be a list of tensors. Torch lets
a class be *opaque* instead: an object of the class is an input of the compiled graph, a new object
compiles nothing, and registered operators take it as an argument.

Torch keeps this interface in private modules (seen in 2.11, 2.13 and, under new names, in 2.14).
This module alone imports them. In a release without them, :data:`AVAILABLE` is False and every
layer is a graph break.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

try:
    from torch._library import opaque_object
    from torch._library.fake_impl import allocate_size

    if hasattr(opaque_object, "register_custom_class"):  # since 2.14
        from torch._custom_class_base import (  # pyright: ignore[reportMissingImports]
            CustomClassBaseMeta as OpaqueBaseMeta,
        )
    else:
        from torch._opaque_base import OpaqueBaseMeta
except ImportError:  # In this release the interface has moved.
    opaque_object = allocate_size = None
    OpaqueBaseMeta = type

AVAILABLE = opaque_object is not None

# Rows of a level of a network, for inductor's choice of how to divide work.
_LIKELY_ROWS = 2**15

Kind = TypeVar("Kind")

if TYPE_CHECKING:
    OpaqueMeta = type
else:
    OpaqueMeta = OpaqueBaseMeta


def register_opaque(kind: type[Kind]) -> type[Kind]:
    """Let operators take objects of a class; a class decorator.

    The metaclass of ``kind`` must be ``OpaqueMeta``. Code that is compiled may still read
    attributes and call methods of the objects.
    """
    if opaque_object is not None:
        names = [*dir(kind), *getattr(kind, "__dataclass_fields__", ())]
        inlined = opaque_object.MemberType.INLINED
        members = {name: inlined for name in names if not name.startswith("__")}
        register: Any = getattr(opaque_object, "register_custom_class", None)
        if register is not None:
            register(kind, typ="symbolic", members=members)
        else:
            opaque_object.register_opaque_type(kind, typ="reference", members=members)
    return kind


def new_size(least: int) -> torch.SymInt:
    """Return a size that only a run can tell; for the fake kernel of an operator.

    ``torch.library.get_ctx().new_dynamic_size()`` does the same, but lets ``torch.compile`` break
    the graph unless the user sets ``torch._dynamo.config.capture_dynamic_output_shape_ops``. That
    setting is about operators of torch.

    Args:
        least: The smallest size that the graph has to serve.
    """
    ctx: Any = torch.library.get_ctx()
    env = ctx._shape_env
    if allocate_size is None or env is None:  # Raises: the caller wants graphs of fixed sizes.
        return ctx.new_dynamic_size(min=least)
    size = allocate_size(env, least)
    # Without a likely size, inductor sums over such an axis in one program for a few channels: the
    # statistics of batch norms then take longer than the convolutions. One size for all networks
    # gives one order of summation for all inputs.
    env.var_to_hint_override[size.node.expr] = _LIKELY_ROWS
    return size


def is_lowered() -> bool:
    """Return whether inductor runs the fake kernel again, on tensors that it made for the run."""
    from torch._inductor.virtualized import NullHandler, V

    return not isinstance(V.graph, NullHandler)


def schema_name(kind: type) -> str:
    """Return the name of a registered class in the schema of an operator."""
    return f"{kind.__module__}.{kind.__qualname__}"
