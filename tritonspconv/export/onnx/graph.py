"""The record of a network: nodes, constants, inputs and outputs, without the onnx package."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DOMAIN = "tritonspconv"
OPSET = 20
VERSION = 1
"""Version of the nodes in :data:`DOMAIN`."""


@dataclass
class Value:
    """An input or output of the file.

    Attributes:
        name: Its name in the graph.
        dtype: Type of its elements.
        shape: A number, or the name of a size that differs from scan to scan, per axis.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass
class Node:
    """One operation.

    Attributes:
        op: Its type.
        inputs: Names of values; "" where an optional input is absent.
        outputs: Names of values; "" where an optional output is absent.
        attributes: Attributes by name. A value is an int, a float, a string, a list of these, or an
            ``AttributeProto``.
        domain: "" for standard ONNX.
        name: A unique name, made of the path of the module that ran.
    """

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    domain: str = ""
    name: str = ""


@dataclass
class Graph:
    """A network.

    Attributes:
        inputs: Values that the caller gives.
        outputs: Values that the caller gets.
        nodes: Nodes in the order of their execution.
        constants: Weights and other tensors that no scan changes, by name.
        signature: Description of the inputs and outputs as JSON data; see ``checks.Signature``.
    """

    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    signature: dict[str, Any] = field(default_factory=dict)

    def uses(self) -> Counter[str]:
        """Return how many nodes and outputs read each value."""
        counted = Counter(name for node in self.nodes for name in node.inputs if name)
        counted.update(value.name for value in self.outputs)
        return counted

    def rename(self, names: dict[str, str]) -> None:
        """Give values other names, by the old name."""
        for node in self.nodes:
            node.inputs = [names.get(name, name) for name in node.inputs]
            node.outputs = [names.get(name, name) for name in node.outputs]
        for value in self.outputs:
            value.name = names.get(value.name, value.name)

    def drop_unused(self) -> None:
        """Remove nodes and constants that no output depends on."""
        needed = {value.name for value in self.outputs}
        kept = []
        for node in reversed(self.nodes):
            if needed & set(node.outputs):
                needed.update(name for name in node.inputs if name)
                kept.append(node)
        self.nodes = kept[::-1]
        self.constants = {name: x for name, x in self.constants.items() if name in needed}
