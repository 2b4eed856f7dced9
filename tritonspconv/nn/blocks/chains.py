"""Find convolutions, with the norm, the addition and the ReLU behind them, in a recorded graph."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

from tritonspconv.nn.blocks.record import Recording
from tritonspconv.nn.fusable import LayerFamily, is_unwatched

StageKind = Literal["norm", "add", "relu"]
_ORDER: dict[StageKind, int] = {"norm": 0, "add": 1, "relu": 2}

_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_IN_PLACE = (operator.iadd, "add_")
# Operations that change no argument and have no other effect.
_PURE_FUNCTIONS = frozenset(
    (
        builtins.getattr,
        operator.getitem,
        operator.add,
        operator.sub,
        operator.mul,
        torch.add,
        torch.cat,
        torch.relu,
    )
)
_PURE_METHODS = frozenset(("add", "relu"))


@dataclass(frozen=True)
class Stage:
    """An operation behind a convolution.

    Attributes:
        kind: The kind of the stage.
        on_features: True: the code calls it on the features and puts the result back.
        path: The module that it calls; None: it calls a function or a method.
        call: The function, of the operand or, for an addition, of both operands.
        residual: The other operand of an addition.
        residual_first: True: the residual is the first operand.
        in_place: True: an addition writes its result into the first operand.
        label: The stage's name in a report.
    """

    kind: StageKind
    on_features: bool
    path: tuple[str, ...] | None = None
    call: Callable[..., Any] | None = None
    residual: fx.Node | None = None
    residual_first: bool = False
    in_place: bool = False
    label: str = ""


@dataclass
class Chain:
    """A convolution and the stages behind it.

    Attributes:
        conv: The path of the convolution.
        input: Its input.
        stages: The stages that follow, in order.
        nodes: All nodes of the graph that the chain replaces; the last one is the result.
    """

    conv: tuple[str, ...]
    input: fx.Node
    stages: list[Stage] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join([".".join(self.conv), *(stage.label for stage in self.stages)])


class ChainFinder:
    """Finds the chains of a recording.

    Args:
        recording: The recording of ``root.forward``.
        root: The module.
        family: The layers that may be fused.
    """

    def __init__(self, recording: Recording, root: nn.Module, family: LayerFamily) -> None:
        self._graph = recording.graph
        self._root = root
        self._family = family
        self._place = {node: place for place, node in enumerate(self._graph.nodes)}
        self._taken: set[fx.Node] = set()

    def find(self) -> list[Chain]:
        """Return all chains of at least one stage; no node is in two."""
        chains = []
        for node in self._graph.nodes:
            if self._is_conv(node) and node not in self._taken:
                chain = self._follow(node)
                if chain.stages:
                    self._taken.update(chain.nodes)
                    chains.append(chain)
        return chains

    def containers_to_inline(self) -> frozenset[str]:
        """Return the containers whose last convolution can take up the next operation.

        Call :meth:`find` first, because operations that a chain already holds do not count.
        """
        found: set[str] = set()
        for node in self._graph.nodes:
            if node.op != "call_module" or node in self._taken or len(node.args) != 1:
                continue
            module = self._module(node)
            if self._ends_with_conv(module) and self._next(node) is not None:
                found |= {
                    f"{node.target}.{name}" if name else str(node.target)
                    for name, child in module.named_modules()
                    if self._family.is_container(child)
                }
        return frozenset(found)

    def _ends_with_conv(self, module: nn.Module) -> bool:
        """Return whether ``module`` is a container that ends with a convolution or its norm."""
        family = self._family
        if not family.is_container(module) or not is_unwatched(module):
            return False
        if not getattr(module, "fuse_layers", True):
            return False
        children = [child for child in module._modules.values() if child is not None]
        while children and family.batch_norm(children[-1]) is not None:
            children.pop()
        if not children:
            return False
        return family.conv(children[-1]) is not None or self._ends_with_conv(children[-1])

    def _is_conv(self, node: fx.Node) -> bool:
        return (
            node.op == "call_module"
            and len(node.args) == 1
            and isinstance(node.args[0], fx.Node)
            and not node.kwargs
            and self._family.conv(self._module(node)) is not None
        )

    def _follow(self, conv: fx.Node) -> Chain:
        """Return the longest chain that begins with ``conv``."""
        input = conv.args[0]
        assert isinstance(input, fx.Node)
        chain = Chain(_path(conv), input, nodes=[conv])
        while True:
            found = self._next(chain.nodes[-1])
            if found is None:
                return chain
            stages, nodes = found
            order = [_ORDER[stage.kind] for stage in [*chain.stages, *stages]]
            if order != sorted(set(order)) or not self._may_wait(chain, nodes):
                return chain
            chain.stages += stages
            chain.nodes += nodes

    def _next(self, value: fx.Node) -> tuple[list[Stage], list[fx.Node]] | None:
        """Return the next operation on the sparse tensor ``value``, if it is the only one."""
        users = list(value.users)
        if any(user in self._taken for user in users):
            return None
        if len(users) == 1:
            stage = self._stage(users[0], value, on_features=False)
            return None if stage is None else ([stage], users)
        if len(users) != 2:
            return None
        read, put_back = sorted(users, key=self._place.__getitem__)
        if not self._reads_features(read, value) or not self._replaces(put_back, value):
            return None
        stages, nodes, features = [], [read], read
        while put_back.args[1] is not features:
            if len(features.users) != 1:
                return None
            (user,) = features.users
            stage = self._stage(user, features, on_features=True)
            if stage is None:
                return None
            stages.append(stage)
            nodes.append(user)
            features = user
        if len(features.users) != 1 or not stages:
            return None
        return stages, [*nodes, put_back]

    def _reads_features(self, node: fx.Node, value: fx.Node) -> bool:
        return (
            node.target is builtins.getattr
            and node.args[0] is value
            and node.args[1] in self._family.feature_names
        )

    def _replaces(self, node: fx.Node, value: fx.Node) -> bool:
        return (
            node.op == "call_method"
            and node.target == self._family.replace
            and len(node.args) == 2
            and node.args[0] is value
            and node.args[1] is not value
            and not node.kwargs
        )

    def _stage(self, node: fx.Node, operand: fx.Node, *, on_features: bool) -> Stage | None:
        """Return ``node`` as a stage of ``operand``, or None if it is something else."""
        if node.op == "call_module":
            if node.args != (operand,) or node.kwargs:
                return None
            module, path = self._module(node), _path(node)
            if self._family.batch_norm(module) is not None:
                return Stage("norm", on_features, path, label=".".join(path))
            if self._family.is_relu(module):
                return Stage("relu", on_features, path, label=".".join(path))
            return None
        if node.op == "call_method":
            method = str(node.target)
            call = operator.methodcaller(method) if len(node.args) == 1 else _method(method)
        else:
            method, call = "", node.target
        if self._is_relu_call(node, operand):
            return Stage("relu", on_features, call=_partial(call, node), label="relu")
        adds = node.target in _ADD_FUNCTIONS or (on_features and method in ("add", "add_"))
        if not adds or len(node.args) != 2 or node.kwargs:
            return None
        first, second = node.args
        if (first is operand) == (second is operand):
            return None
        residual = second if first is operand else first
        if not isinstance(residual, fx.Node) or (second is operand and node.target in _IN_PLACE):
            return None
        assert callable(call)
        return Stage(
            "add", on_features, call=call, residual=residual,
            residual_first=second is operand, in_place=node.target in _IN_PLACE,
            label=f"+ {_source(residual)}",
        )  # fmt: skip

    def _is_relu_call(self, node: fx.Node, operand: fx.Node) -> bool:
        if not node.args or node.args[0] is not operand:
            return False
        if node.op == "call_method":
            return node.target in ("relu", "relu_") and len(node.args) == 1 and not node.kwargs
        return (
            node.target in self._family.relu_functions
            and not any(isinstance(argument, fx.Node) for argument in node.args[1:])
            and set(node.kwargs) <= {"inplace"}
        )

    def _may_wait(self, chain: Chain, nodes: list[fx.Node]) -> bool:
        """Return whether the convolution gives the same result if it runs as late as ``nodes``.

        Code between the two must not change the convolution's input or the statistics of its norm,
        and must not need a kernel map that the convolution records.
        """
        inside = {*chain.nodes, *nodes}
        first, last = self._place[chain.nodes[0]], self._place[nodes[-1]]
        norms = {node.target for node in inside if node.op == "call_module"}
        return all(
            node in inside
            or not first < self._place[node] < last
            or (self._is_quiet(node) and node.target not in norms)
            for node in self._graph.nodes
        )

    def _is_quiet(self, node: fx.Node) -> bool:
        """Return whether ``node`` changes nothing but its result, and a norm's statistics."""
        if node.op in ("placeholder", "get_attr"):
            return True
        if node.op == "call_function":
            pure = (
                node.target in _PURE_FUNCTIONS
                or node.target in self._family.functions
                or node.target is self._family.tensor
            )
            # The last argument of many activations makes them work in place.
            return pure and not node.kwargs.get("inplace") and True not in node.args
        if node.op == "call_method":
            return node.target in _PURE_METHODS or node.target == self._family.replace
        if node.op == "call_module":
            return self._is_quiet_module(self._module(node))
        return False

    def _is_quiet_module(self, module: nn.Module) -> bool:
        family = self._family
        if family.is_container(module):
            before = None
            for child in module._modules.values():
                if child is None:
                    return False
                # An in-place ReLU may change the result of a convolution or a norm.
                follows = before is not None and (
                    family.conv(before) is not None or family.batch_norm(before) is not None
                )
                if not self._is_quiet_module(child) and not (follows and family.is_relu(child)):
                    return False
                before = child
            return True
        conv = family.conv(module)
        if conv is not None:
            return not getattr(module, "inverse", False)
        if family.is_relu(module):
            return not any(getattr(inner, "inplace", False) for inner in module.modules())
        return family.batch_norm(module) is not None or type(module) is nn.Identity

    def _module(self, node: fx.Node) -> nn.Module:
        return self._root.get_submodule(str(node.target))


def _path(node: fx.Node) -> tuple[str, ...]:
    return tuple(str(node.target).split("."))


def _source(node: fx.Node) -> str:
    """Return a name for the tensor whose features ``node`` is, or for ``node`` itself."""
    if node.target is builtins.getattr and isinstance(node.args[0], fx.Node):
        return _source(node.args[0])
    return str(node.target) if node.op == "call_module" else node.name


def _method(name: str) -> Callable[[Any, Any], Any]:
    return lambda value, other: getattr(value, name)(other)


def _partial(call: Any, node: fx.Node) -> Callable[[Any], Any]:
    """Return ``call`` with the arguments of ``node`` behind the first."""
    arguments, options = node.args[1:], node.kwargs
    return lambda value: call(value, *arguments, **options)
