"""The nodes that NVIDIA's libspconv reads, and their reader.

The facts are from the public sources of ``NVIDIA-AI-IOT/Lidar_AI_Solution``, folder
``3DSparseConvolution`` (commit 0fdfb308). The parser reads nodes without a domain, of the types
``SparseConvolution``, ``Add``, ``Relu``, ``ScatterDense``, ``Reshape`` and ``Transpose``. A value
is a sparse tensor: coordinates travel with the features. Weights and biases are float16
initialisers, and the bias is not optional.
"""

from __future__ import annotations

from typing import Any

import torch

from tritonspconv import ops
from tritonspconv.export.onnx.errors import OnnxExportError
from tritonspconv.export.onnx.graph import DOMAIN, Graph, Node
from tritonspconv.export.onnx.network import Attributes, Handler, Run
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import kernel_map

OPSET = 11
OUTPUT_BOUND = 200_000
"""The largest number of output sites that a layer may have; the reader allots memory for it."""


def rename(graph: Graph) -> None:
    """Turn a folded graph into nodes that libspconv reads.

    Raises:
        OnnxExportError: The graph has something that libspconv has no node for.
    """
    described = graph.signature["inputs"]
    if any(given["kind"] != "sparse" for given in described) or len(described) != 1:
        raise _unreadable("a network whose input is not one sparse tensor")
    (source,) = described
    _Renamer(graph, source).run()
    graph.inputs = [x for x in graph.inputs if x.name == source["features"]]
    indices = {made["indices"] for made in graph.signature["outputs"] if made["kind"] == "sparse"}
    graph.outputs = [x for x in graph.outputs if x.name not in indices]
    for value in (*graph.inputs, *graph.outputs):
        value.dtype = torch.float16
    for made in graph.signature["outputs"]:
        if made["kind"] == "sparse":
            made["indices"] = None
    graph.signature["dialect"] = "libspconv"
    graph.drop_unused()


def _unreadable(what: str) -> OnnxExportError:
    return OnnxExportError(
        f"export_onnx: libspconv does not read {what}. It reads submanifold, strided and inverse "
        "convolutions of three axes in bounded grids, additions, ReLUs, and a dense tensor with "
        'reshapes and transpositions behind it. Write dialect="tritonspconv".'
    )


class _Renamer:
    """Turns the nodes of a graph into those of libspconv."""

    def __init__(self, graph: Graph, source: dict[str, Any]) -> None:
        self._graph = graph
        # The grid of each value that has rows.
        self._shapes: dict[str, list[int]] = {}
        if source["spatial_shape"] is not None:
            self._shapes[source["features"]] = source["spatial_shape"]

    def run(self) -> None:
        """Replace the nodes of the graph."""
        self._graph.nodes = [self._renamed(node) for node in self._graph.nodes]

    def _renamed(self, node: Node) -> Node:
        if node.domain == DOMAIN:
            if node.op == "SparseConvolution":
                return self._convolution(node)
            if node.op == "SparseToDense":
                return self._scatter(node)
            raise _unreadable(f"{node.name}, a {node.op}")
        known = self._shapes.get(node.inputs[0]) if node.inputs else None
        if node.op == "Gemm" and known is not None:
            return self._product(node, known)
        if node.op in ("Add", "Relu", "Identity"):
            if any(name in self._graph.constants for name in node.inputs):
                raise _unreadable(f"{node.name}, an {node.op} with a constant")
            if node.op == "Identity":
                raise _unreadable(f"{node.name}, one tensor under two names")
            if known is not None:
                self._shapes[node.outputs[0]] = known
            return Node(node.op, node.inputs, node.outputs, {}, "", node.name)
        if node.op == "Reshape" and known is None:
            dims = self._graph.constants[node.inputs[1]].tolist()
            return Node("Reshape", node.inputs[:1], node.outputs, {"dims": dims}, "", node.name)
        if node.op == "Transpose" and known is None:
            dims = list(node.attributes["perm"].ints)
            return Node("Transpose", node.inputs, node.outputs, {"dims": dims}, "", node.name)
        raise _unreadable(f"{node.name}, a {node.op}")

    def _convolution(self, node: Node) -> Node:
        a = node.attributes
        shape = a.get("input_spatial_shape")
        if a["ndim"] != 3 or a["transposed"] or "taps" in a or shape is None:
            raise _unreadable(f"{node.name}, a layer of another kind")
        if a["sites"] == "cells" or (len(node.inputs) > 4 and not a["inverse"]):
            raise _unreadable(f"{node.name}, whose output sites follow another rule")
        if a["subm"] and a["padding"] != _centred(a):
            raise _unreadable(f"{node.name}, a submanifold window that is not centred")
        self._shapes[node.outputs[0]] = a["output_spatial_shape"]
        weight, bias = node.inputs[2], (*node.inputs, "")[3]
        return self._node(
            node, weight, bias, a["output_spatial_shape"], shape,
            in_channels=a["in_channels"], out_channels=a["out_channels"],
            kernel_size=a["kernel_size"], stride=a["stride"], dilation=a["dilation"],
            padding=a["padding"], inverse=a["inverse"], subm=a["subm"],
            output_padding=a["output_padding"], rulebook=a["indice_key"],
            activation=a.get("act_type", "None"),
        )  # fmt: skip

    def _product(self, node: Node, shape: list[int]) -> Node:
        """Write a product of rows and a matrix as a submanifold layer of one tap."""
        matrix = self._graph.constants[node.inputs[1]]
        matrix = matrix if node.attributes.get("transB") else matrix.t()
        weight = f"{node.inputs[1]}.taps"
        self._graph.constants[weight] = matrix.reshape(matrix.shape[0], 1, 1, 1, -1)
        self._shapes[node.outputs[0]] = shape
        ones, zeros = [1] * 3, [0] * 3
        return self._node(
            node, weight, (*node.inputs, "")[2], shape, shape,
            in_channels=matrix.shape[1], out_channels=matrix.shape[0], kernel_size=ones,
            stride=ones, dilation=ones, padding=zeros, inverse=0, subm=1, output_padding=zeros,
            rulebook=f"{node.name}.one_tap", activation="None",
        )  # fmt: skip

    def _node(
        self,
        node: Node,
        weight: str,
        bias: str,
        out_shape: list[int],
        shape: list[int],
        **more: Any,
    ) -> Node:
        constants = self._graph.constants
        if not bias:
            bias = f"{weight}.no_bias"
            constants[bias] = torch.zeros(more["out_channels"])
        halves = []
        for name in (weight, bias):
            halves.append(f"{name}.half")
            constants[halves[-1]] = constants[name].half()
        attributes = {
            "ndim": 3, "input_spatial_shape": shape, "output_spatial_shape": out_shape,
            "transposed": 0, "groups": 1, "output_bound": OUTPUT_BOUND, **more,
        }  # fmt: skip
        inputs = [node.inputs[0], *halves]
        return Node("SparseConvolution", inputs, node.outputs[:1], attributes, "", node.name)

    def _scatter(self, node: Node) -> Node:
        a, name = node.attributes, node.inputs[0]
        if not a["channels_first"]:
            raise _unreadable(f"{node.name}, a dense tensor with the channels last")
        attributes = {
            "input_spatial_shape": a["spatial_shape"], "format": "zyx",
            "output_shape": [a["batch_size"], a["channels"], *a["spatial_shape"]],
        }  # fmt: skip
        return Node("ScatterDense", [name], node.outputs, attributes, "", node.name)


def _centred(a: Attributes) -> list[int]:
    return [d * (k // 2) for k, d in zip(a["kernel_size"], a["dilation"], strict=True)]


def _read_convolution(run: Run, node: Any, a: Attributes) -> None:
    sites = run.row_sites[node.input[0]]
    size, dilation = tuple(a["kernel_size"]), tuple(a["dilation"])
    if a["inverse"]:
        found = run.maps[a["rulebook"]].inverse()
    elif a["subm"]:
        found = kernel_map(sites, ConvGeometry.submanifold(size, dilation))
    else:
        geometry = ConvGeometry(size, tuple(a["stride"]), tuple(a["padding"]), dilation)
        found = run.maps[a["rulebook"]] = kernel_map(sites, geometry)
    feats, weight, bias = (run.value(name).float() for name in node.input)
    out = ops.sparse_conv(
        feats, weight, found, bias, weight_layout="OVI", relu=a["activation"] == "ReLU"
    )
    run.values[node.output[0]] = out
    run.row_sites[node.output[0]] = found.out_sites


def _read_scatter(run: Run, node: Any, a: Attributes) -> None:
    run.values[node.output[0]] = ops.to_dense(
        run.value(node.input[0]), run.row_sites[node.input[0]]
    )


def _read_add(run: Run, node: Any, a: Attributes) -> None:
    left, right = map(run.value, node.input)
    _keep_sites(run, node, left + right)


def _read_relu(run: Run, node: Any, a: Attributes) -> None:
    _keep_sites(run, node, run.value(node.input[0]).relu())


def _keep_sites(run: Run, node: Any, out: torch.Tensor) -> None:
    run.values[node.output[0]] = out
    if node.input[0] in run.row_sites:
        run.row_sites[node.output[0]] = run.row_sites[node.input[0]]


def _read_reshape(run: Run, node: Any, a: Attributes) -> None:
    run.values[node.output[0]] = run.value(node.input[0]).reshape(a["dims"])


def _read_transpose(run: Run, node: Any, a: Attributes) -> None:
    run.values[node.output[0]] = run.value(node.input[0]).permute(a["dims"])


NODES: dict[tuple[str, str], Handler] = {
    ("", "SparseConvolution"): _read_convolution,
    ("", "ScatterDense"): _read_scatter,
    ("", "Add"): _read_add,
    ("", "Relu"): _read_relu,
    ("", "Reshape"): _read_reshape,
    ("", "Transpose"): _read_transpose,
}
"""The functions that run the nodes of a file for libspconv."""
