"""Operands and results of functions on rows, as values of the graph."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tritonspconv.coords.row_tensor import plain
from tritonspconv.export.onnx.errors import name_of
from tritonspconv.export.onnx.trace import Kwargs, Recorder
from tritonspconv.export.onnx.values import Args, Function, RowCount, Rows


def operand(recorder: Recorder, x: Any, dtype: torch.dtype) -> str:
    """Return an operand of a node as a value of one dtype."""
    if isinstance(x, Rows):
        return cast(recorder, recorder.name_of(x), x.dtype, dtype)
    if isinstance(x, Tensor):
        return recorder.parameter(x, dtype)
    if isinstance(x, numbers.Real):
        value = torch.tensor(x, dtype=dtype)
        return recorder.constant(value, f"number.{x}", ("number", float(x), dtype))
    if isinstance(x, RowCount):
        x._refuse()
    return recorder.refuse(f"computes with a {type(x).__name__}")


def cast(recorder: Recorder, name: str, found: torch.dtype, wanted: torch.dtype) -> str:
    """Return a value in another dtype."""
    if found == wanted:
        return name
    return recorder.emit("Cast", [name], {"to": wanted})


def one_row_each(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Tensor:
    """Compute a function, and check that its result has the rows of its operands."""
    out = recorder.run(func, args, kwargs)
    first = first_rows(args, kwargs)
    if not isinstance(out, Tensor) or out.ndim == 0 or out.shape[0] != plain(first).shape[0]:
        recorder.refuse(f"calls {name_of(func)}, whose result does not have one row for each site")
    return out


def first_rows(*values: Any) -> Rows:
    """Return the first of the rows among arguments."""
    return next(leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Rows))


def made_of(recorder: Recorder, out: Tensor, name: str, source: Rows) -> Rows:
    """Return the result of a node as a tensor of the run, at the rows of ``source``."""
    return recorder.rows(out, name, source.bounds)
