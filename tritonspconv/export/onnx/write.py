"""Write a graph to a file."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from tritonspconv.export.onnx.graph import DOMAIN, OPSET, VERSION, Graph, Node, Value

SIGNATURE = "tritonspconv.signature"


def model_of(graph: Graph, opset: int = OPSET) -> Any:
    """Return a graph as ``onnx.ModelProto``."""
    import onnx
    from onnx import helper

    proto = helper.make_graph(
        [_node(node) for node in graph.nodes],
        "tritonspconv",
        [_value(value) for value in graph.inputs],
        [_value(value) for value in graph.outputs],
        [_constant(name, value) for name, value in graph.constants.items()],
    )
    domains = {node.domain for node in graph.nodes if node.domain}
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(name, VERSION) for name in sorted(domains)]
    model = helper.make_model(
        proto, opset_imports=imports, producer_name="tritonspconv",
        ir_version=min(10, onnx.IR_VERSION),
    )  # fmt: skip
    entry = model.metadata_props.add()
    entry.key, entry.value = SIGNATURE, json.dumps(graph.signature)
    return model


def checked(model: Any) -> None:
    """Check a model with onnx's own checker; it needs the schemas of our domain."""
    import onnx

    from tritonspconv.export.onnx.schema import register

    if any(entry.domain == DOMAIN for entry in model.opset_import):
        register()
    onnx.checker.check_model(model)


def onnx_dtype(dtype: torch.dtype) -> int:
    """Return the number that ONNX has for a dtype."""
    from onnx import TensorProto

    return {
        torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16,
        torch.float64: TensorProto.DOUBLE, torch.bfloat16: TensorProto.BFLOAT16,
        torch.int32: TensorProto.INT32, torch.int64: TensorProto.INT64,
        torch.int8: TensorProto.INT8, torch.uint8: TensorProto.UINT8,
        torch.bool: TensorProto.BOOL,
    }[dtype]  # fmt: skip


def _node(node: Node) -> Any:
    from onnx import AttributeProto, helper

    inputs = list(node.inputs)
    while inputs and not inputs[-1]:
        inputs.pop()
    made = helper.make_node(
        node.op, inputs, node.outputs, name=node.name, domain=node.domain or None
    )
    for name, value in node.attributes.items():
        if isinstance(value, AttributeProto):
            made.attribute.append(value)
            continue
        if isinstance(value, torch.dtype):
            value = onnx_dtype(value)
        kind = AttributeProto.INTS if value == [] else None
        made.attribute.append(helper.make_attribute(name, value, attr_type=kind))
    return made


def _value(value: Value) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(value.name, onnx_dtype(value.dtype), value.shape)


def _constant(name: str, value: Tensor) -> Any:
    from onnx import helper, numpy_helper

    value = value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16:
        raw = value.view(torch.int16).numpy().tobytes()
        return helper.make_tensor(name, onnx_dtype(value.dtype), value.shape, raw, raw=True)
    return numpy_helper.from_array(value.numpy(), name)
