"""Recorder: writes the torch operations of one run into a graph, and refuses reads of values."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

_READS = frozenset((Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr))
_BOOLS = (torch.bool, torch.uint8)


class RecordError(RuntimeError):
    """An operation cannot be part of a graph."""


class Recorder(TorchDispatchMode):
    """Writes every operation that runs into a graph, while tensors have their real values.

    A graph that holds a number of the recorded scan would be wrong for the next scan. For this
    reason an operation raises if it hands a value of the inputs to Python, or if the shape of its
    result depends on such values.

    Args:
        model: The model. Its parameters and buffers keep their names in the graph.
    """

    def __init__(self, model: Module) -> None:
        super().__init__()
        self._graph = fx.Graph()
        self._nodes: Any = WeakTensorKeyDictionary()
        # Nodes whose values depend on the inputs.
        self._varying: set[fx.Node] = set()
        self._held: dict[str, Tensor] = {}
        self._names = {
            id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }

    def input(self, name: str, tensor: Tensor) -> None:
        """Make ``tensor`` the next input of the graph."""
        node = self._graph.placeholder(name)
        self._nodes[tensor] = node
        self._varying.add(node)

    def alias(self, known: Tensor, made: Tensor) -> None:
        """Note that ``made`` is the same tensor as ``known``."""
        self._nodes[made] = self._node(known)

    def finish(self, outputs: Any) -> fx.GraphModule:
        """Return the graph whose results are ``outputs``, a tree of tensors and numbers."""
        self._graph.output(
            tree_map(lambda x: self._node(x) if isinstance(x, Tensor) else x, outputs)
        )
        self._graph.eliminate_dead_code()
        return fx.GraphModule(self._held, self._graph)

    def varies(self, tensor: Tensor) -> bool:
        """Return whether the values of ``tensor`` depend on the inputs."""
        return self._node(tensor) in self._varying

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and write it down."""
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        varies = any(self.varies(x) for x in given)
        if varies:
            _refuse_shapes(func, args)
        self._refuse_writes(func, args)
        out = func(*args, **kwargs)
        made = tree_leaves(out)
        if not any(isinstance(x, Tensor) for x in made):
            if varies and any(x is not None for x in made):
                raise RecordError(f"{func} reads a value of the input on the host")
            return out
        node = self._graph.call_function(
            func, *tree_map(lambda x: self._node(x) if isinstance(x, Tensor) else x, (args, kwargs))
        )
        self._name_results(node, out, varies)
        return out

    def _name_results(self, node: fx.Node, out: Any, varies: bool) -> None:
        if varies:
            self._varying.add(node)
        if isinstance(out, Tensor):
            self._nodes[out] = node
            return
        for place, value in enumerate(out):
            part = self._graph.call_function(operator.getitem, (node, place))
            self._name_results(part, value, varies)

    def _node(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor; one that no operation here made is part of the model."""
        node = self._nodes.get(tensor)
        if node is None:
            node = self._nodes[tensor] = self._shared(tensor) or self._constant(tensor)
        return node

    def _shared(self, tensor: Tensor) -> fx.Node | None:
        """Return the node of a tensor on the same memory, which ``.data`` does not dispatch.

        Raises:
            RecordError: The memory belongs to an input or a result, in another shape.
        """
        if tensor.numel() == 0 or id(tensor) in self._names:
            return None
        sharing = [
            (other, node)
            for other, node in list(self._nodes.items())
            if node in self._varying and _memory(other) == _memory(tensor)
        ]
        for other, node in sharing:
            if _layout(other) == _layout(tensor):
                return node
        if sharing:
            raise RecordError("a view of the input was made past torch's dispatcher")
        return None

    def _constant(self, tensor: Tensor) -> fx.Node:
        name = self._names.get(id(tensor), f"constant_{len(self._held)}")
        self._held[name] = tensor
        return self._graph.get_attr(name)

    def _refuse_writes(self, func: Any, args: tuple[Any, ...]) -> None:
        """Raise if an operation writes to the model, whose program has no state."""
        if not func._schema.is_mutable:
            return
        pairs = zip(func._schema.arguments, args, strict=False)
        written = tree_leaves([value for argument, value in pairs if argument.is_write])
        names = [self._names[id(x)] for x in written if id(x) in self._names]
        if names:
            raise RecordError(f"{func} writes to {names[0]}, a parameter or buffer of the model")


class HostReads(TorchFunctionMode):
    """Refuses reads of values that no dispatcher sees, such as ``Tensor.tolist``."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run a function, unless it reads a value."""
        if func in _READS and self._recorder.varies(args[0]):
            name = getattr(func, "__name__", func)
            raise RecordError(f"Tensor.{name} reads values of the input on the host")
        return func(*args, **(kwargs or {}))


def _refuse_shapes(func: Any, args: tuple[Any, ...]) -> None:
    """Raise if the shape of a result depends on values."""
    if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default,
                torch.ops.aten.index_put_.default):  # fmt: skip
        by_mask = any(x is not None and x.dtype in _BOOLS for x in args[1])
        if by_mask and func is torch.ops.aten.index.Tensor:
            raise RecordError("a selection by a mask has a shape that depends on the input")
        return
    if torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags:
        raise RecordError(f"{func} has a result whose shape or value depends on the input")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
