"""Linear layers and norms by fixed statistics on rows, as nodes of standard ONNX."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tritonspconv.coords.row_tensor import plain
from tritonspconv.export.onnx.errors import name_of
from tritonspconv.export.onnx.operands import made_of, one_row_each, operand
from tritonspconv.export.onnx.trace import Kwargs, Recorder, Rule
from tritonspconv.export.onnx.values import Args, Function, Rows


def product(
    recorder: Recorder, x: Rows, weight: Tensor, bias: Tensor | None, out: Tensor, *,
    transposed: bool, hint: str = "",
) -> Rows:  # fmt: skip
    """Record ``x @ weight + bias``, or ``x @ weight.T + bias``."""
    if plain(x).ndim != 2:
        recorder.refuse("multiplies rows of more than two axes by a matrix")
    names = [operand(recorder, x, out.dtype), recorder.parameter(weight, out.dtype)]
    if bias is not None:
        names.append(recorder.parameter(bias, out.dtype, flat=True))
    made = recorder.emit("Gemm", names, {"transB": int(transposed)}, hint=hint)
    return recorder.rows(out, made, x.bounds)


def _linear(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    out = one_row_each(recorder, func, args, kwargs)
    weight, bias = given["weight"], given.get("bias")
    return product(recorder, given["input"], weight, bias, out, transposed=True)


def _matmul(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Multiply rows by a matrix, or add such a product to a vector."""
    bias = args[0] if name_of(func) == "addmm" else None
    x, weight = args[-2:] if not kwargs else (None, None)
    if not isinstance(x, Rows) or not isinstance(weight, Tensor):
        recorder.refuse(f"calls {name_of(func)} with rows anywhere but as the left factor")
    assert isinstance(weight, Tensor)
    out = one_row_each(recorder, func, args, kwargs)
    return product(recorder, x, weight, bias, out, transposed=False)


def norm_node(
    recorder: Recorder, x: str, vectors: Iterable[Tensor | None], eps: float, dtype: torch.dtype
) -> str:
    """Record a batch norm by fixed statistics: ``(mean, variance, weight, bias)``, each [C]."""
    mean, variance, weight, bias = vectors
    names = [x]
    for vector, number in ((weight, 1), (bias, 0), (mean, 0), (variance, 1)):
        if vector is not None:
            names.append(recorder.parameter(vector, dtype))
            continue
        assert mean is not None
        filled = torch.full(mean.shape, number, dtype=dtype)
        key = ("filled", number, mean.shape, dtype)
        names.append(recorder.constant(filled, f"vector.of.{number}", key))
    return recorder.emit("BatchNormalization", names, {"epsilon": float(eps)})


def _batch_norm(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    names = "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("training") or given["running_mean"] is None:
        recorder.refuse(
            "normalises by the statistics of the scan. Call model.eval(), and keep running "
            "statistics in batch norms"
        )
    x = given["input"]
    out = one_row_each(recorder, func, args, kwargs)
    vectors = (given[name] for name in ("running_mean", "running_var", "weight", "bias"))
    value = operand(recorder, x, out.dtype)
    return made_of(recorder, out, norm_node(recorder, value, vectors, given["eps"], out.dtype), x)


def _layer_norm(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    names = "input", "normalized_shape", "weight", "bias", "eps"
    given = dict(zip(names, args, strict=False)) | kwargs
    x = given["input"]
    axis = plain(x).ndim - len(given["normalized_shape"])
    if axis < 1:
        recorder.refuse("normalises over all rows")
    out = one_row_each(recorder, func, args, kwargs)
    weight = given.get("weight")
    if weight is None:
        shape = tuple(given["normalized_shape"])
        key = ("filled", 1, shape, out.dtype)
        scale = recorder.constant(torch.ones(shape, dtype=out.dtype), "vector.of.1", key)
    else:
        scale = recorder.parameter(weight, out.dtype)
    inputs = [operand(recorder, x, out.dtype), scale]
    if given.get("bias") is not None:
        inputs.append(recorder.parameter(given["bias"], out.dtype))
    attributes = {"axis": axis, "epsilon": float(given.get("eps", 1e-5))}
    return made_of(recorder, out, recorder.emit("LayerNormalization", inputs, attributes), x)


def product_rules() -> dict[str, Rule]:
    """Return the rules by the names of the functions."""
    return {
        **dict.fromkeys(("matmul", "mm", "addmm", "__matmul__"), _matmul),
        "linear": _linear,
        "batch_norm": _batch_norm,
        "layer_norm": _layer_norm,
    }
