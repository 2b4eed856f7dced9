"""Standard ONNX operators of sparse networks in torch, and all others in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Attributes = dict[str, Any]
Operator = Callable[[Sequence[Any], Attributes], Tensor]


def _batch_norm(x: Sequence[Any], a: Attributes) -> Tensor:
    feats, scale, shift, mean, variance = x
    return F.batch_norm(feats, mean, variance, scale, shift, eps=a.get("epsilon", 1e-5))


def _gemm(x: Sequence[Any], a: Attributes) -> Tensor:
    left = x[0].t() if a.get("transA") else x[0]
    right = x[1].t() if a.get("transB") else x[1]
    out = left @ right * a.get("alpha", 1.0) if a.get("alpha", 1.0) != 1 else left @ right
    if len(x) < 3 or x[2] is None:
        return out
    return out + (x[2] if a.get("beta", 1.0) == 1 else x[2] * a["beta"])


def _clip(x: Sequence[Any], a: Attributes) -> Tensor:
    low, high = (*x[1:], None, None)[:2]
    out = x[0] if low is None else torch.maximum(x[0], low)
    return out if high is None else torch.minimum(out, high)


def _slice(x: Sequence[Any], a: Attributes) -> Tensor:
    out, starts, ends = x[:3]
    axes = range(len(starts)) if len(x) < 4 or x[3] is None else x[3].tolist()
    steps = [1] * len(starts) if len(x) < 5 or x[4] is None else x[4].tolist()
    for start, end, axis, step in zip(starts.tolist(), ends.tolist(), axes, steps, strict=True):
        if step > 0:
            index = (slice(None),) * (axis % out.ndim)
            out = out[(*index, slice(start, end, step))]
        else:
            chosen = range(out.shape[axis])[start : None if end < -out.shape[axis] else end : step]
            out = out.index_select(axis, torch.tensor(list(chosen), device=out.device))
    return out


def _reshape(x: Sequence[Any], a: Attributes) -> Tensor:
    shape = x[1].tolist()
    if not a.get("allowzero"):
        shape = [x[0].shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    if 0 in x[0].shape and -1 in shape:
        # Without elements torch cannot infer an open size.
        known = [size for size in shape if size != -1]
        shape = [0 if size == -1 and 0 not in known else size for size in shape]
    return x[0].reshape(shape)


def _reduce(function: Any) -> Operator:
    def run(x: Sequence[Any], a: Attributes) -> Tensor:
        axes = x[1].tolist() if len(x) > 1 and x[1] is not None else list(range(x[0].ndim))
        return function(x[0], dim=axes, keepdim=bool(a.get("keepdims", 1)))

    return run


def _conv(x: Sequence[Any], a: Attributes) -> Tensor:
    feats, weight = x[:2]
    ndim = feats.ndim - 2
    pads = a.get("pads") or [0] * 2 * ndim
    if a.get("auto_pad", "NOTSET") != "NOTSET":
        raise NotImplementedError("Conv with auto_pad")
    # Torch lists the padding of the last axis first.
    padding = [p for axis in range(ndim - 1, -1, -1) for p in (pads[axis], pads[axis + ndim])]
    function = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
    return function(
        F.pad(feats, padding), weight, x[2] if len(x) > 2 else None,
        stride=a.get("strides") or 1, dilation=a.get("dilations") or 1, groups=a.get("group", 1),
    )  # fmt: skip


def _gather(x: Sequence[Any], a: Attributes) -> Tensor:
    axis, places = a.get("axis", 0) % x[0].ndim, x[1].long()
    out = x[0].index_select(axis, places.reshape(-1) % max(x[0].shape[axis], 1))
    return out.reshape(*x[0].shape[:axis], *places.shape, *x[0].shape[axis + 1 :])


def _scatter(x: Sequence[Any], a: Attributes) -> Tensor:
    if a.get("reduction", "none") != "none":
        raise NotImplementedError("ScatterND with a reduction")
    out = x[0].clone()
    out[x[1].long().unbind(-1)] = x[2]
    return out


def _constant_of_shape(x: Sequence[Any], a: Attributes) -> Tensor:
    value = a.get("value", torch.zeros(1))
    return value.reshape(()).expand(x[0].tolist()).clone()


def _one(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda x, a: function(x[0])


def _two(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda x, a: function(x[0], x[1])


def _div(left: Tensor, right: Tensor) -> Tensor:
    rounding = None if left.is_floating_point() else "trunc"
    return torch.div(left, right, rounding_mode=rounding)


OPERATORS: dict[str, Operator] = {
    "Abs": _one(torch.abs), "Acos": _one(torch.acos), "Asin": _one(torch.asin),
    "Atan": _one(torch.atan), "Ceil": _one(torch.ceil), "Cos": _one(torch.cos),
    "Cosh": _one(torch.cosh), "Erf": _one(torch.erf), "Exp": _one(torch.exp),
    "Floor": _one(torch.floor), "Log": _one(torch.log), "Neg": _one(torch.neg),
    "Reciprocal": _one(torch.reciprocal), "Relu": _one(torch.relu), "Round": _one(torch.round),
    "Sigmoid": _one(torch.sigmoid), "Sign": _one(torch.sign), "Sin": _one(torch.sin),
    "Sinh": _one(torch.sinh), "Softsign": _one(F.softsign), "Sqrt": _one(torch.sqrt),
    "Tan": _one(torch.tan), "Tanh": _one(torch.tanh), "Identity": _one(lambda x: x),
    "Mish": _one(F.mish), "HardSwish": _one(F.hardswish),
    "Add": _two(torch.add), "Sub": _two(torch.sub), "Mul": _two(torch.mul), "Div": _two(_div),
    "Pow": _two(torch.pow), "Max": _two(torch.maximum), "Min": _two(torch.minimum),
    "MatMul": _two(torch.matmul),
    "LeakyRelu": lambda x, a: F.leaky_relu(x[0], a.get("alpha", 0.01)),
    "Elu": lambda x, a: F.elu(x[0], a.get("alpha", 1.0)),
    "Celu": lambda x, a: F.celu(x[0], a.get("alpha", 1.0)),
    "Gelu": lambda x, a: F.gelu(x[0], approximate=a.get("approximate", "none")),
    "Softmax": lambda x, a: torch.softmax(x[0], a.get("axis", -1)),
    "LogSoftmax": lambda x, a: torch.log_softmax(x[0], a.get("axis", -1)),
    "Concat": lambda x, a: torch.cat(list(x), dim=a["axis"]),
    "Cast": lambda x, a: x[0].to(a["to"]),
    "Transpose": lambda x, a: x[0].permute(a.get("perm") or list(range(x[0].ndim))[::-1]),
    "LayerNormalization": lambda x, a: F.layer_norm(
        x[0], x[0].shape[a.get("axis", -1) % x[0].ndim :], x[1], x[2] if len(x) > 2 else None,
        a.get("epsilon", 1e-5),
    ),
    "ReduceSum": _reduce(torch.sum), "ReduceMean": _reduce(torch.mean),
    "ReduceMax": _reduce(torch.amax), "ReduceMin": _reduce(torch.amin),
    "BatchNormalization": _batch_norm, "Gemm": _gemm, "Clip": _clip, "Slice": _slice,
    "Reshape": _reshape, "Conv": _conv, "Gather": _gather, "ScatterND": _scatter,
    "ConstantOfShape": _constant_of_shape,
}  # fmt: skip
"""The function of each operator, of its inputs (None: absent) and its attributes."""


def run_in_numpy(model: Any, node: Any, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Run any other node with the reference operators of the onnx package, on the CPU."""
    import numpy
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    device = next((x.device for x in inputs if x is not None), torch.device("cpu"))
    graph = helper.make_graph(
        [node], "node", [helper.make_empty_tensor_value_info(n) for n in node.input if n],
        [helper.make_empty_tensor_value_info(n) for n in node.output if n],
    )  # fmt: skip
    alone = helper.make_model(graph, opset_imports=list(model.opset_import))
    given = {
        name: x.cpu().numpy() for name, x in zip(node.input, inputs, strict=False) if x is not None
    }
    found = ReferenceEvaluator(alone).run(None, given)
    return [torch.from_numpy(numpy.array(x)).to(device) for x in found]
