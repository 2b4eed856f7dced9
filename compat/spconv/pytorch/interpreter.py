"""``spconv.pytorch.interpreter``: run a traced network through handlers of one's own.

Exporters register a handler for each kind of module, function and method, and run a
``torch.fx.GraphModule``. Each handler computes its nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = [
    "REGISTERED_NODE_HANDLERS",
    "NetworkInterpreter",
    "get_node_handler",
    "register_method_handler",
    "register_node_handler",
]

Handler = Callable[..., Any]

# The keys are module classes, functions, or pairs (class of the object, name of the method).
REGISTERED_NODE_HANDLERS: dict[Any, Handler] = {}


def register_node_handler(*names: Any) -> Callable[[Handler], Handler]:
    """Return a decorator that registers a handler.

    Args:
        *names: Module classes and functions that it handles.
    """

    def register(handler: Handler) -> Handler:
        REGISTERED_NODE_HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def register_method_handler(name: str, tensor_classes: Any) -> Callable[[Handler], Handler]:
    """Return a decorator that registers a handler of a method.

    Args:
        name: The method's name.
        tensor_classes: A class or a list of classes that have the method.
    """
    classes = tensor_classes if isinstance(tensor_classes, list | tuple) else [tensor_classes]
    return register_node_handler(*((kind, name) for kind in classes))


def get_node_handler(name: Any) -> Handler:
    """Return the handler of a module class, a function, or a (class, method name).

    Raises:
        AssertionError: None is registered.
    """
    if name not in REGISTERED_NODE_HANDLERS:
        raise AssertionError(
            f"no handler is registered for {name}. Registered: {list(REGISTERED_NODE_HANDLERS)}. "
            "Use register_node_handler or register_method_handler."
        )
    return REGISTERED_NODE_HANDLERS[name]


class NetworkInterpreter(torch.fx.Interpreter):
    """Runs a graph; a handler computes each module, function and method.

    A handler is called as ``handler(network_ctx, target, args, kwargs, node_name)``. For a module
    ``target`` is the module, and its class finds the handler; for a method ``target`` is its name.

    Args:
        network_ctx: The first argument of every handler, such as the network that handlers build.
        module: The traced network.
        inputs: Its inputs.
        verbose: Print every call.
    """

    def __init__(
        self,
        network_ctx: Any,
        module: torch.fx.GraphModule,
        inputs: Sequence[Any],
        verbose: bool = False,
    ) -> None:
        super().__init__(module)
        self.network_ctx = network_ctx
        self._inputs = inputs
        self._outputs: Any = None
        self._cur_node_name: str | None = None
        self._verbose = verbose

    def run(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run the graph and return the arguments of its output node."""
        super().run(*self._inputs)
        assert self._outputs is not None
        return self._outputs

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run one node, under whose name its handler is called."""
        self._cur_node_name = str(n)
        return super().run_node(n)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call the handler of a module's class."""
        module = self.fetch_attr(target)
        kind = getattr(module, "_base_class_origin", type(module))
        return self._handle(kind, module, args, kwargs, f"Module.{kind.__name__} {target}")

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call the handler of a function."""
        return self._handle(target, target, args, kwargs, f"Func {target}")

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call the handler of a method of the first argument's class."""
        return self._handle((type(args[0]), target), target, args, kwargs, f"Method {target}")

    def output(self, target: Any, args: Any, kwargs: Any) -> None:
        """Keep the results."""
        self._outputs = args

    def _handle(self, key: Any, target: Any, args: Any, kwargs: Any, shown: str) -> Any:
        handler = get_node_handler(key)
        result = handler(self.network_ctx, target, args, kwargs, self._cur_node_name)
        if self._verbose:
            print(f"[{shown}]({args}|{kwargs}) => {result}")  # noqa: T201
        return result
