"""The nodes of Autoware's TensorRT plug-ins for spconv, and their reader.

Facts from the public sources of ``autowarefoundation/autoware_universe``,
``perception/autoware_tensorrt_plugins`` (commit 79578ecc and later), and of the exporter for them:
a layer is two nodes of the domain ``autoware``. ``GetIndicePairsImplicitGemm`` makes the pairs of
rows of a relation, and layers of one relation share it. ``ImplicitGemm`` multiplies.

Newer plug-ins also take the bias as a sixth input and the ReLU as ``act_type``. Older ones ignore
the attribute, so both are nodes of their own here, which every version runs.
"""

from __future__ import annotations

from typing import Any

import torch

from tritonspconv import ops
from tritonspconv.export.onnx.errors import OnnxExportError
from tritonspconv.export.onnx.graph import DOMAIN as OURS
from tritonspconv.export.onnx.graph import Graph, Node
from tritonspconv.export.onnx.network import Attributes, Handler, Run
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import KernelMap, kernel_map

DOMAIN = "autoware"
# spconv's ConvAlgo.MaskImplicitGemm.
_ALGO = 1


def rename(graph: Graph) -> None:
    """Turn a folded graph into nodes of the plug-ins and standard nodes.

    Raises:
        OnnxExportError: The graph has something that the plug-ins have no node for.
    """
    made: list[Node] = []
    pairs: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.domain != OURS:
            made.append(node)
        elif node.op == "SparseConvolution":
            made += _convolution(graph, node, pairs)
        elif node.op == "SparseToDense":
            made += _dense(graph, node)
        else:
            raise _unreadable(f"{node.name}, a {node.op}")
    graph.nodes = made
    graph.signature["dialect"] = "autoware"
    graph.drop_unused()


def _unreadable(what: str) -> OnnxExportError:
    return OnnxExportError(
        f"export_onnx: Autoware's plug-ins do not read {what}. They read submanifold and strided "
        'convolutions of three axes in bounded grids. Write dialect="tritonspconv".'
    )


def _convolution(graph: Graph, node: Node, pairs: dict[str, list[str]]) -> list[Node]:
    a = node.attributes
    shape = a.get("input_spatial_shape")
    if a["ndim"] != 3 or a["transposed"] or a["inverse"] or "taps" in a or shape is None:
        raise _unreadable(f"{node.name}, a layer of another kind")
    if a["sites"] == "cells" or len(node.inputs) > 4:
        raise _unreadable(f"{node.name}, whose output sites follow another rule")
    made: list[Node] = []
    key = a["indice_key"]
    if key not in pairs:
        outputs = ("indices", "pair_fwd", "pair_mask", "mask_argsort", "num_act_out")
        pairs[key] = [f"{node.name}.{name}" for name in outputs]
        if len(node.outputs) > 1:
            pairs[key][0] = node.outputs[1]
        attributes = {
            "batch_size": graph.signature["batch_size"], "spatial_shape": shape, "algo": _ALGO,
            "ksize": a["kernel_size"], "stride": a["stride"], "padding": a["padding"],
            "dilation": a["dilation"], "out_padding": a["output_padding"], "subm": a["subm"],
            "transpose": 0, "is_train": 0,
        }  # fmt: skip
        made.append(
            Node(
                "GetIndicePairsImplicitGemm", [node.inputs[1]], pairs[key], attributes, DOMAIN,
                f"{node.name}.pairs",
            )
        )  # fmt: skip
    bias = (*node.inputs, "")[3]
    relu = a.get("act_type") == "ReLU"
    names = [node.outputs[0]]
    for needed, suffix in ((relu, "unclamped"), (bool(bias), "unbiased")):
        if needed:
            names.insert(0, f"{node.name}.{suffix}")
    attributes = {
        "is_subm": a["subm"], "is_train": 0, "act_alpha": 0.0, "act_beta": 0.0,
        "output_scale": 1.0, "output_add_scale": 0.0,
    }  # fmt: skip
    inputs = [node.inputs[0], node.inputs[2], *pairs[key][1:4]]
    made.append(Node("ImplicitGemm", inputs, [names[0]], attributes, DOMAIN, node.name))
    if bias:
        made.append(Node("Add", [names[0], bias], [names[1]], {}, "", f"{node.name}.bias"))
        names.pop(0)
    if relu:
        made.append(Node("Relu", [names[0]], [names[1]], {}, "", f"{node.name}.relu"))
    return made


def _dense(graph: Graph, node: Node) -> list[Node]:
    """Write a dense tensor with standard nodes."""
    from onnx import numpy_helper

    a, name = node.attributes, node.name
    features, indices = node.inputs
    shape = f"{name}.shape"
    sizes = [a["batch_size"], *a["spatial_shape"], a["channels"]]
    graph.constants[shape] = torch.tensor(sizes)
    last = [f"{name}.zeros", f"{name}.long", f"{name}.channels_last"]
    scattered = last[2] if a["channels_first"] else node.outputs[0]
    zero = {"value": numpy_helper.from_array(torch.zeros(1, dtype=_dtype(graph)).numpy())}
    made = [
        Node("ConstantOfShape", [shape], [last[0]], zero, "", last[0]),
        Node("Cast", [indices], [last[1]], {"to": torch.int64}, "", last[1]),
        Node("ScatterND", [last[0], last[1], features], [scattered], {}, "", last[2]),
    ]
    if a["channels_first"]:
        axes = [0, len(sizes) - 1, *range(1, len(sizes) - 1)]
        made.append(Node("Transpose", [scattered], node.outputs, {"perm": axes}, "", name))
    return made


def _dtype(graph: Graph) -> torch.dtype:
    """Return the dtype of the features."""
    return next(value.dtype for value in graph.inputs if value.dtype.is_floating_point)


def _read_pairs(run: Run, node: Any, a: Attributes) -> None:
    sites = run.sites_of(node.input[0], a["spatial_shape"])
    size, dilation = tuple(a["ksize"]), tuple(a["dilation"])
    if a["subm"]:
        geometry = ConvGeometry.submanifold(size, dilation)
    else:
        geometry = ConvGeometry(size, tuple(a["stride"]), tuple(a["padding"]), dilation)
    found = kernel_map(sites, geometry)
    run.set_sites(node.output[0], found.out_sites)
    # A kernel map replaces the three tensors of pairs, because only spconv uses their form.
    run.values.update(dict.fromkeys(node.output[1:4], found))
    run.values[node.output[4]] = torch.tensor(found.n_out, dtype=torch.int32)


def _read_gemm(run: Run, node: Any, a: Attributes) -> None:
    feats, weight, found, *_ = map(run.value, node.input)
    assert isinstance(found, KernelMap)
    run.values[node.output[0]] = ops.sparse_conv(feats, weight, found, weight_layout="OVI")


NODES: dict[tuple[str, str], Handler] = {
    (DOMAIN, "GetIndicePairsImplicitGemm"): _read_pairs,
    (DOMAIN, "ImplicitGemm"): _read_gemm,
}
"""The functions that run the nodes of a file for Autoware."""
