"""Values of recorded code: they take the place of tensors while torch.fx runs a ``forward``."""

from __future__ import annotations

import builtins
import operator
from typing import TYPE_CHECKING, Any

from torch import fx
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from tritonspconv.nn.blocks.record import Recorder


class Recorded(fx.Proxy):
    """A value of the recorded code."""

    tracer: Recorder

    def __init__(self, node: fx.Node, tracer: Recorder) -> None:
        object.__setattr__(self, "node", node)
        object.__setattr__(self, "tracer", tracer)

    def _kind(self) -> str | None:
        return self.node.meta.get("kind")

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The class that the value will have; ``isinstance`` reads this property."""
        return self.tracer.class_of(self)

    def __dir__(self) -> list[str]:
        self.tracer.expect_sparse(self, "lists the attributes of")
        return sorted(self.tracer.tensor_names)

    def __getattr__(self, name: str) -> Any:
        return self.tracer.attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.tracer.refuse(f"sets the attribute {name!r} of a tensor")

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def _in_place(self, other: Any) -> Any:
        self.tracer.refuse("changes a tensor in place")

    __isub__ = __imul__ = __itruediv__ = __ifloordiv__ = __imod__ = __ipow__ = _in_place
    __iand__ = __ior__ = __ixor__ = __imatmul__ = _in_place

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.refuse("writes into a tensor")

    def __len__(self) -> int:
        return self.tracer.refuse("needs the number of rows of a tensor")


class RecordedAttribute(Recorded):
    """An attribute of a recorded value; a node of the graph once it is used."""

    def __init__(self, owner: Recorded, name: str, kind: str | None) -> None:
        for key, value in {
            "owner": owner, "name": name, "known": kind, "made": None, "used": False,
            "tracer": owner.tracer,
        }.items():  # fmt: skip
            object.__setattr__(self, key, value)

    def _kind(self) -> str | None:
        return self.known

    @property
    def node(self) -> fx.Node:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The node that reads the attribute, made on first use."""
        if self.made is None:
            made = self.tracer.create_proxy(
                "call_function", builtins.getattr, (self.owner, self.name), {}
            ).node
            made.meta["kind"] = self.known
            object.__setattr__(self, "made", made)
            object.__setattr__(self, "used", True)
            return made
        return self.made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Record the call of a method."""
        object.__setattr__(self, "used", True)
        return self.tracer.create_proxy("call_method", self.name, (self.owner, *args), kwargs)


def holds_recorded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether any argument of a call is a recorded value, or holds one."""
    return any(issubclass(type(leaf), Recorded) for leaf in pytree.tree_leaves((args, kwargs)))
