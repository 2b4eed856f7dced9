"""Functions of torch on rows, as nodes of standard ONNX."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonspconv.coords.row_tensor import plain
from tritonspconv.export.onnx.errors import name_of
from tritonspconv.export.onnx.operands import cast, first_rows, made_of, one_row_each, operand
from tritonspconv.export.onnx.products import product_rules
from tritonspconv.export.onnx.trace import Kwargs, Recorder, Rule
from tritonspconv.export.onnx.values import Args, Function, RowCount, Rows

# Functions of one tensor that are a node without attributes.
_UNARY = {
    "abs": "Abs", "acos": "Acos", "asin": "Asin", "atan": "Atan", "ceil": "Ceil", "cos": "Cos",
    "cosh": "Cosh", "erf": "Erf", "exp": "Exp", "floor": "Floor", "log": "Log", "neg": "Neg",
    "negative": "Neg", "reciprocal": "Reciprocal", "relu": "Relu", "round": "Round",
    "sigmoid": "Sigmoid", "sign": "Sign", "sin": "Sin", "sinh": "Sinh", "softsign": "Softsign",
    "sqrt": "Sqrt", "tan": "Tan", "tanh": "Tanh", "__abs__": "Abs", "__neg__": "Neg",
    "mish": "Mish", "hardswish": "HardSwish",
}  # fmt: skip
# Functions of two tensors: the node, and whether the right operand comes first.
_BINARY = {
    "add": ("Add", False), "__add__": ("Add", False), "__radd__": ("Add", True),
    "sub": ("Sub", False), "subtract": ("Sub", False), "__sub__": ("Sub", False),
    "rsub": ("Sub", True), "__rsub__": ("Sub", True),
    "mul": ("Mul", False), "multiply": ("Mul", False), "__mul__": ("Mul", False),
    "__rmul__": ("Mul", True),
    "div": ("Div", False), "divide": ("Div", False), "true_divide": ("Div", False),
    "__truediv__": ("Div", False), "__rtruediv__": ("Div", True), "__rdiv__": ("Div", True),
    "pow": ("Pow", False), "__pow__": ("Pow", False), "__rpow__": ("Pow", True),
    "maximum": ("Max", False), "minimum": ("Min", False),
}  # fmt: skip
_IN_PLACE_OPERATORS = {
    "__iadd__": "add", "__isub__": "sub", "__imul__": "mul", "__itruediv__": "div",
}  # fmt: skip
# The node, and the keyword arguments that become its attributes, with their defaults.
_ACTIVATIONS: dict[str, tuple[str, dict[str, tuple[str, float]]]] = {
    "leaky_relu": ("LeakyRelu", {"negative_slope": ("alpha", 0.01)}),
    "elu": ("Elu", {"alpha": ("alpha", 1.0)}),
    "celu": ("Celu", {"alpha": ("alpha", 1.0)}),
}
_ALIASES = ("contiguous", "detach", "data", "requires_grad_", "cpu", "cuda")
_CASTS = {
    "float": torch.float32, "double": torch.float64, "half": torch.float16,
    "bfloat16": torch.bfloat16, "int": torch.int32, "long": torch.int64,
}  # fmt: skip
_VIEWS = ("reshape", "view", "flatten", "unsqueeze", "squeeze")
_REDUCTIONS = {"sum": "ReduceSum", "mean": "ReduceMean", "amax": "ReduceMax", "amin": "ReduceMin"}


def _unary(op: str) -> Rule:
    def rule(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
        out = one_row_each(recorder, func, args, kwargs)
        x = first_rows(args, kwargs)
        return made_of(recorder, out, recorder.emit(op, [operand(recorder, x, out.dtype)]), x)

    return rule


def _binary(op: str, swap: bool) -> Rule:
    def rule(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
        if kwargs.get("alpha", 1) != 1 or kwargs.get("rounding_mode") is not None:
            recorder.refuse(f"calls {name_of(func)} with alpha or a rounding mode")
        out = one_row_each(recorder, func, args, kwargs)
        pair = [*args, *(kwargs[name] for name in ("other", "exponent") if name in kwargs)]
        names = [operand(recorder, x, out.dtype) for x in (pair[::-1] if swap else pair)]
        return made_of(recorder, out, recorder.emit(op, names), first_rows(args, kwargs))

    return rule


def _activation(op: str, options: dict[str, tuple[str, float]]) -> Rule:
    def rule(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
        out = one_row_each(recorder, func, args, kwargs)
        x = first_rows(args, kwargs)
        given = dict(zip(("input", *options), args, strict=False)) | kwargs
        attributes = {
            name: float(given.get(key, default)) for key, (name, default) in options.items()
        }
        return made_of(recorder, out, recorder.emit(op, [recorder.name_of(x)], attributes), x)

    return rule


def _gelu(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    out = one_row_each(recorder, func, args, kwargs)
    attributes = {"approximate": kwargs.get("approximate", "none")}
    name = recorder.emit("Gelu", [recorder.name_of(args[0])], attributes)
    return made_of(recorder, out, name, args[0])


def _silu(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    out = one_row_each(recorder, func, args, kwargs)
    x = recorder.name_of(args[0])
    return made_of(recorder, out, recorder.emit("Mul", [x, recorder.emit("Sigmoid", [x])]), args[0])


def _square(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    x = recorder.name_of(args[0])
    out = one_row_each(recorder, func, args, kwargs)
    return made_of(recorder, out, recorder.emit("Mul", [x, x]), args[0])


def _rsqrt(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    x = recorder.name_of(args[0])
    out = one_row_each(recorder, func, args, kwargs)
    name = recorder.emit("Reciprocal", [recorder.emit("Sqrt", [x])])
    return made_of(recorder, out, name, args[0])


def _clamp(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Clamp between numbers."""
    out = one_row_each(recorder, func, args, kwargs)
    name = name_of(func)
    if name == "relu6":
        low, high = 0.0, 6.0
    elif name == "hardtanh":
        given = dict(zip(("input", "min_val", "max_val"), args, strict=False)) | kwargs
        low, high = given.get("min_val", -1.0), given.get("max_val", 1.0)
    else:
        names = {"clamp_min": ("min",), "clamp_max": ("max",)}.get(name, ("min", "max"))
        given = dict(zip(("input", *names), args, strict=False)) | kwargs
        low, high = given.get("min"), given.get("max")
    x = first_rows(args, kwargs)
    bounds = ["" if end is None else operand(recorder, end, out.dtype) for end in (low, high)]
    made = recorder.emit("Clip", [operand(recorder, x, out.dtype), *bounds])
    return made_of(recorder, out, made, x)


def _axes(recorder: Recorder, func: Function, given: Any, ndim: int) -> list[int]:
    """Return axes behind the rows, or end the export."""
    axes = [given] if isinstance(given, int) else given
    if axes is None or any(not isinstance(axis, int) or axis % ndim == 0 for axis in axes):
        recorder.refuse(f"calls {name_of(func)} over the rows, for which there is no node here")
    return [axis % ndim for axis in axes]


def _reduction(op: str) -> Rule:
    def rule(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
        x, ndim = args[0], plain(args[0]).ndim
        given = dict(zip(("input", "dim", "keepdim"), args, strict=False)) | kwargs
        axes = _axes(recorder, func, given.get("dim"), ndim)
        out = one_row_each(recorder, func, args, kwargs)
        attributes = {"keepdims": int(given.get("keepdim", False))}
        inputs = [operand(recorder, x, out.dtype), _integers(recorder, axes)]
        made = recorder.emit(op, inputs, attributes)
        return made_of(recorder, out, made, x)

    return rule


def _softmax(op: str) -> Rule:
    def rule(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
        given = dict(zip(("input", "dim"), args, strict=False)) | kwargs
        (axis,) = _axes(recorder, func, given.get("dim"), plain(args[0]).ndim)
        out = one_row_each(recorder, func, args, kwargs)
        made = recorder.emit(op, [operand(recorder, args[0], out.dtype)], {"axis": axis})
        return made_of(recorder, out, made, args[0])

    return rule


def _cat(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Join columns."""
    given = dict(zip(("tensors", "dim"), args, strict=False)) | kwargs
    tensors = given["tensors"]
    if not all(isinstance(x, Rows) for x in tensors):
        recorder.refuse("joins rows of the scan with a tensor of a fixed number of rows")
    (axis,) = _axes(recorder, func, given.get("dim", given.get("axis", 0)), plain(tensors[0]).ndim)
    out = one_row_each(recorder, func, args, kwargs)
    names = [operand(recorder, x, out.dtype) for x in tensors]
    return made_of(recorder, out, recorder.emit("Concat", names, {"axis": axis}), tensors[0])


def _columns(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Read columns: ``x[:, 2]``, ``x[:, 1:]``, ``x[:, [0, 3]]``, ``x[:, None]``."""
    x, place = args
    first, *rest = place if isinstance(place, tuple) else (place,)
    if not isinstance(first, slice) or first != slice(None):
        recorder.refuse("selects rows, so that their number depends on values")
    kinds = [type(item) for item in rest if item is not None]
    if not all(kind in (int, slice, list) for kind in kinds) or (
        list in kinds and (int in kinds or kinds.count(list) > 1)
    ):
        recorder.refuse("reads columns in a form that has no node here")
    out = one_row_each(recorder, func, args, kwargs).clone()
    name, sizes = recorder.name_of(x), list(plain(x).shape)
    for axis, item in enumerate((item for item in rest if item is not None), start=1):
        if isinstance(item, list):
            chosen = _integers(recorder, item)
            name, sizes[axis] = recorder.emit("Gather", [name, chosen], {"axis": axis}), len(item)
        elif item != slice(None):
            item = slice(item, item + 1 or None) if isinstance(item, int) else item
            start, end, step = item.indices(sizes[axis])
            ends = [_integers(recorder, [number]) for number in (start, end, axis, step)]
            name, sizes[axis] = recorder.emit("Slice", [name, *ends]), len(range(start, end, step))
    if sizes[1:] != list(out.shape[1:]):
        name = _reshaped(recorder, name, out)
    x.cell.has_views = True
    rows = made_of(recorder, out, name, x)
    rows.cell.has_views = True
    return rows


def _integers(recorder: Recorder, values: list[int]) -> str:
    """Return a constant int64 vector."""
    key = ("integers", *values)
    return recorder.constant(torch.tensor(values), f"integers.{'.'.join(map(str, values))}", key)


def _reshaped(recorder: Recorder, name: str, out: Tensor) -> str:
    """Return a value with the axes of ``out``; a size of 0 keeps the number of rows."""
    return recorder.emit("Reshape", [name, _integers(recorder, [0, *out.shape[1:]])])


def _reshape(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Change axes behind the first."""
    x = args[0]
    rows = plain(x).shape[0]
    sizes = [rows if isinstance(size, RowCount) else size for size in args[1:]]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = [[rows if isinstance(size, RowCount) else size for size in sizes[0]]]
    # Run torch's function first, because its error about sizes is better.
    out = one_row_each(recorder, func, (x, *sizes), kwargs).clone()
    made = _reshaped(recorder, recorder.name_of(x), out)
    x.cell.has_views = True
    rows_out = made_of(recorder, out, made, x)
    rows_out.cell.has_views = True
    return rows_out


def _alias(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Return the same value."""
    out = recorder.run(func, args, kwargs)
    if out.device != args[0].device:
        recorder.refuse("moves features to another device")
    return recorder.share(out, args[0])


def _clone(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Return the same value in other memory."""
    return recorder.rows(recorder.run(func, args, kwargs), args[0].cell.name, args[0].bounds)


def _to(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Convert to another dtype."""
    x = args[0]
    out = recorder.run(func, args, kwargs)
    if out.device != x.device:
        recorder.refuse("moves features to another device")
    if out.dtype == x.dtype:
        return x if out.data_ptr() == x.data_ptr() else _clone(recorder, func, args, kwargs)
    return made_of(recorder, out, cast(recorder, recorder.name_of(x), x.dtype, out.dtype), x)


def _dropout(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
    given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    if given.get("training", True):
        recorder.refuse("drops features at random. Call model.eval()")
    return given["input"]


def _in_place(rule: Rule, outside: Function) -> Rule:
    """Return the rule of a function that writes its result over its first operand."""

    def in_place(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
        target = args[0]
        if not isinstance(target, Rows):
            recorder.refuse(f"writes rows of the scan into a tensor by {name_of(func)}")
        if target.cell.has_views:
            recorder.refuse(
                f"changes a tensor by {name_of(func)} of which other tensors show a part"
            )
        made = rule(recorder, outside, args, kwargs)
        if made.dtype != target.dtype or made.shape != target.shape:
            recorder.refuse(f"changes the dtype or the shape of a tensor by {name_of(func)}")
        with torch._C.DisableTorchFunction():
            plain(target).copy_(plain(made))
        target.cell.name = made.cell.name
        return target

    return in_place


def _with_inplace_option(rule: Rule) -> Rule:
    """Return a rule that understands ``inplace=True``."""

    def choose(recorder: Recorder, func: Function, args: Args, kwargs: Kwargs) -> Any:
        if not kwargs.pop("inplace", False):
            return rule(recorder, func, args, kwargs)
        return _in_place(rule, func)(recorder, func, args, kwargs)

    return choose


def _owners(name: str) -> list[Function]:
    """Return the functions of a name in torch, its tensors and its functional API."""
    found = (getattr(owner, name, None) for owner in (torch, Tensor, F, torch.special))
    return [func for func in found if callable(func)]


def function_rules() -> dict[Function, Rule]:
    """Return the rules of torch's functions."""
    by_name: dict[str, Rule] = {name: _unary(op) for name, op in _UNARY.items()}
    by_name |= {name: _binary(*how) for name, how in _BINARY.items()}
    by_name |= {name: _activation(*how) for name, how in _ACTIVATIONS.items()}
    by_name |= {name: _reduction(op) for name, op in _REDUCTIONS.items()}
    by_name |= {"softmax": _softmax("Softmax"), "log_softmax": _softmax("LogSoftmax")}
    by_name |= {"gelu": _gelu, "silu": _silu, "square": _square, "rsqrt": _rsqrt}
    by_name |= dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max"), _clamp)
    by_name |= dict.fromkeys(("relu6", "hardtanh"), _clamp)
    by_name |= dict.fromkeys(("cat", "concat", "concatenate"), _cat)
    by_name |= product_rules()
    by_name |= {"__getitem__": _columns, "clone": _clone, "dropout": _dropout}
    by_name |= dict.fromkeys(_VIEWS, _reshape)
    by_name |= dict.fromkeys(_ALIASES, _alias)
    by_name |= dict.fromkeys(("to", "type", *_CASTS), _to)
    rules: dict[Function, Rule] = {}
    for name, rule in by_name.items():
        for func in _owners(name):
            rules[func] = _with_inplace_option(rule)
        if name.startswith("__"):
            continue
        for func in _owners(f"{name}_"):
            rules[func] = _in_place(rule, _owners(name)[0])
    for operator, name in _IN_PLACE_OPERATORS.items():
        rules[getattr(Tensor, operator)] = _in_place(by_name[name], getattr(torch, name))
    rules[Tensor.data.__get__] = _alias  # pyright: ignore[reportAttributeAccessIssue]
    return rules
