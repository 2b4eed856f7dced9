"""Fold batch norms and ReLUs into the layers before them, in the graph.

In the graph the order of operations is known, also where a network calls its norms by hand. A norm
is folded if it reads the output of a layer that nothing else reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.export.onnx.graph import DOMAIN, Graph, Node
from tritonspconv.kernels.channel_norm import ChannelNorm


def fold(graph: Graph) -> None:
    """Fold every batch norm, and every ReLU behind a sparse convolution, where that is possible."""
    makers = {name: node for node in graph.nodes for name in node.outputs if name}
    for node in list(graph.nodes):
        layer = makers.get(node.inputs[0]) if node.inputs else None
        if layer is None or graph.uses()[node.inputs[0]] != 1:
            continue
        if layer.outputs[0] != node.inputs[0] or layer.attributes.get("act_type"):
            continue
        if _is_norm(node) and (_is_conv(layer) or _is_product(layer)):
            _fold_norm(graph, layer, node)
        elif node.op == "Relu" and not node.domain and _is_conv(layer):
            layer.attributes["act_type"] = "ReLU"
        else:
            continue
        layer.outputs[0] = node.outputs[0]
        makers[node.outputs[0]] = layer
        graph.nodes.remove(node)
    graph.drop_unused()


def _is_norm(node: Node) -> bool:
    return node.op == "BatchNormalization" and not node.domain


def _is_conv(node: Node) -> bool:
    return node.op == "SparseConvolution" and node.domain == DOMAIN


def _is_product(node: Node) -> bool:
    return node.op == "Gemm" and not node.domain


def _fold_norm(graph: Graph, layer: Node, norm: Node) -> None:
    """Give a layer weights of its own that hold the norm."""
    weight, bias, mean, variance = (graph.constants[name] for name in norm.inputs[1:5])
    numbers = ChannelNorm(mean, variance, weight, bias, norm.attributes["epsilon"])
    scale, shift = numbers.scale_and_shift()
    place = 2 if _is_conv(layer) else 1
    kernel = graph.constants[layer.inputs[place]]
    # Output channels are the first axis, except in a product that is not transposed.
    last = _is_product(layer) and not layer.attributes.get("transB")
    factor = scale if last else scale.reshape(-1, *(1,) * (kernel.ndim - 1))
    old = layer.inputs[place + 1] if len(layer.inputs) > place + 1 else ""
    if old:
        shift = shift + graph.constants[old] * scale
    inputs = [*layer.inputs, ""] if len(layer.inputs) == place + 1 else layer.inputs
    inputs[place] = _add(graph, f"{layer.inputs[place]}.folded", kernel * factor, kernel.dtype)
    inputs[place + 1] = _add(graph, f"{inputs[place]}.bias", shift, kernel.dtype)
    layer.inputs = inputs


def _add(graph: Graph, name: str, value: Tensor, dtype: torch.dtype) -> str:
    while name in graph.constants:
        name += "_"
    graph.constants[name] = value.to(dtype)
    return name
