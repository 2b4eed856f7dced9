"""Rules of ``RowTensor``: how functions treat rows that are padded to a capacity.

A rule is one of these:

- *each row by itself*: the function runs on all rows, and its result is a row tensor again;
- *along other axes*: the same, if no axis of the call is the rows;
- *no values*: the function reads shapes, dtypes or devices;
- a rule of its own: sparse operations, batch norm in training, losses, columns.

Every other function is refused, because a sum over rows would count the padding, and a selection of
rows has a shape that depends on the data.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonspconv.coords import ActiveSites
from tritonspconv.coords.row_tensor import (
    RULES,
    RowTensor,
    as_rows,
    bounds_of,
    plain,
    plain_tree,
    refusal,
    row_tensors,
    shared_bounds,
)
from tritonspconv.kernel_map import KernelMap
from tritonspconv.ops.batch_norm import train_norm
from tritonspconv.ops.bounded_norm import batch_norm
from tritonspconv.ops.channelwise import sparse_channelwise_conv
from tritonspconv.ops.conv import sparse_conv
from tritonspconv.ops.dense import to_dense
from tritonspconv.ops.global_pool import global_broadcast, global_pool
from tritonspconv.ops.pointwise import pointwise_conv
from tritonspconv.ops.pool import sparse_pool

Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_EACH_ROW = _names("""
    abs absolute acos acosh add add_ addcdiv addcmul asin asinh atan atan2 atanh bfloat16
    bitwise_and bitwise_not bitwise_or bitwise_xor bool byte ceil celu celu_ clamp clamp_ clamp_max
    clamp_min clip clone contiguous copysign cos cosh cpu cuda deg2rad detach div div_ divide double
    dropout dropout_ elu elu_ empty_like eq erf erfc erfinv exp exp2 expm1 fill_ float float_power
    floor floor_divide fmod frac full_like ge gelu greater greater_equal gt half hardshrink
    hardsigmoid hardswish hardtanh hardtanh_ heaviside hypot int isfinite isinf isnan le leaky_relu
    leaky_relu_ lerp less less_equal lgamma log log10 log1p log2 logical_and logical_not logical_or
    logical_xor logit logsigmoid long lt masked_fill masked_fill_ maximum minimum mish mul mul_
    multiply nan_to_num nan_to_num_ ne neg negative not_equal ones_like pow prelu rand_like
    randn_like reciprocal relu relu6 relu_ remainder requires_grad_ round rsqrt rsub selu selu_ sgn
    short sigmoid sigmoid_ sign silu sin sinh softplus softshrink softsign sqrt square sub sub_
    subtract tan tanh tanh_ tanhshrink threshold to true_divide trunc type type_as where xlogy zero_
    zeros_like
    __abs__ __add__ __and__ __eq__ __floordiv__ __ge__ __gt__ __iadd__ __imul__ __invert__ __isub__
    __itruediv__ __le__ __lt__ __mod__ __mul__ __ne__ __neg__ __or__ __pos__ __pow__ __radd__
    __rand__ __rfloordiv__ __rmul__ __ror__ __rpow__ __rsub__ __rtruediv__ __rxor__ __sub__
    __truediv__ __xor__
""")
# The name, and the place of the axis among the arguments.
_ALONG_AXES = {
    **dict.fromkeys(
        _names(
            "all amax amin any argmax argmin cumsum glu log_softmax logsumexp max mean median min "
            "nanmean nansum prod softmax softmin std sum unsqueeze var"
        ),
        1,
    ),
    **dict.fromkeys(["norm", "normalize", "topk"], 2),
}
_NO_VALUES = _names("""
    data_ptr dim element_size get_device is_complex is_contiguous is_floating_point is_inference
    is_pinned is_same_size ndimension nelement numel register_hook retain_grad size storage_offset
    stride untyped_storage __hash__ __len__
""")
_PROPERTIES = _names("""
    _backward_hooks _version device dtype grad grad_fn is_cpu is_cuda is_leaf is_meta is_mkldnn
    is_quantized is_sparse itemsize layout names nbytes ndim output_nr requires_grad shape
""")
_SAME_FIRST_AXIS = _names("expand expand_as flatten repeat reshape squeeze view")
_PRODUCTS = ["addmm", "linear", "matmul", "mm", "__matmul__"]
_LOSSES = (
    F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.cross_entropy, F.huber_loss,
    F.l1_loss, F.mse_loss, F.nll_loss, F.smooth_l1_loss,
)  # fmt: skip
_CLASS_LOSSES = (F.cross_entropy, F.nll_loss)


def _run(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Run a function on ordinary tensors."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*plain_tree(args), **plain_tree(kwargs))


def _wrapped(func: Function, out: Any, args: Args, kwargs: Kwargs) -> Any:
    """Return the results of a function on rows as row tensors."""
    if isinstance(out, tuple):  # values and places of a maximum
        return type(out)([_wrapped(func, value, args, kwargs) for value in out])
    if not isinstance(out, Tensor):
        return out
    return as_rows(out, shared_bounds(func, args, kwargs))


def _sums_over_rows_backward(args: Args, kwargs: Kwargs) -> bool:
    """Return whether the gradient of an operand that has no rows is a sum over the rows."""
    if not torch.is_grad_enabled():
        return False
    operands = (*args, *kwargs.values())
    return any(isinstance(x, Tensor) and not isinstance(x, RowTensor) and x.requires_grad
               for x in operands)  # fmt: skip


def _shielded(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Run a function so that padding adds nothing to the gradient of its other operands.

    Padding rows of operands become zero. Padding rows of the result become zero too, and so does
    their gradient. Without both, an infinite value times a gradient of zero would be NaN.
    """
    bounds = shared_bounds(func, args, kwargs)

    def without_padding(x: Any) -> Any:
        if not isinstance(x, RowTensor) or not x.is_floating_point():
            return x
        return as_rows(_zero_padding(plain(x), bounds.mask(x.shape[0])), bounds)

    args = tuple(map(without_padding, args))
    kwargs = {name: without_padding(x) for name, x in kwargs.items()}
    out = _run(func, args, kwargs)
    return as_rows(_zero_padding(out, bounds.mask(out.shape[0])), bounds)


def _zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x
    return torch.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), x, torch.zeros_like(x[:1]))


def _each_row(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Run a function that treats each row by itself."""
    rows = [plain(x) for x in row_tensors((args, kwargs))]
    size, ndim = rows[0].shape[0], max(x.ndim for x in rows)
    if any(x.ndim == ndim and x.shape[0] != size for x in rows):
        raise refusal(func, "its operands have different numbers of rows")
    if _sums_over_rows_backward(args, kwargs):
        out: Any = _shielded(func, args, kwargs)
    else:
        out = _run(func, args, kwargs)
    if isinstance(out, Tensor) and (out.ndim != ndim or out.shape[0] != size):
        raise refusal(func, f"its result {list(out.shape)} does not have one row for each site")
    if out is plain(args[0]) or _is_in_place(func):
        return args[0]
    return _wrapped(func, out, args, kwargs)


def _is_in_place(func: Function) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def _along_axes(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Run a function along axes that must not be the axis of rows."""
    name = getattr(func, "__name__", "")
    place = _ALONG_AXES.get(name, 1)
    default = 1 if name == "normalize" else -1 if name in ("topk", "glu") else None
    given = kwargs.get("dim", kwargs.get("axis", args[place] if len(args) > place else default))
    axes = (given,) if isinstance(given, int) else given
    if axes is None or not all(isinstance(axis, int) for axis in axes):
        raise refusal(func, "without an axis it runs over all rows, padding included")
    ndim = plain(args[0]).ndim + (name == "unsqueeze")
    if any(axis % ndim == 0 for axis in axes):
        raise refusal(func, "it runs over all rows, padding included")
    return _wrapped(func, _run(func, args, kwargs), args, kwargs)


def _columns(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Read or write columns: ``x[:, ...]``."""
    place = args[1]
    first = next(iter(place), None) if isinstance(place, tuple) else place
    if not (isinstance(first, slice) and first == slice(None)):
        raise refusal(func, "a selection of rows has a size that depends on the data")
    return _wrapped(func, _run(func, args, kwargs), args, kwargs)


def _join_columns(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Join columns of the same rows."""
    tensors = kwargs.get("tensors", args[0] if args else ())
    axis = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    if axis % plain(tensors[0]).ndim == 0:
        raise refusal(func, "joined rows would have padding in their middle")
    return _wrapped(func, _run(func, args, kwargs), args, kwargs)


def _product(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Multiply rows from the left: ``rows @ matrix``."""
    operands = args[1:] if getattr(func, "__name__", "") == "addmm" else args
    if not isinstance(operands[0], RowTensor) or any(True for _ in row_tensors(operands[1:])):
        raise refusal(func, "the rows must be its left operand, and no other")
    return _each_row(func, args, kwargs)


def _reshape(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Change axes behind the first."""
    out = _run(func, args, kwargs)
    if out.ndim == 0 or out.shape[0] != plain(args[0]).shape[0]:
        raise refusal(func, "its result does not have one row for each site")
    return _wrapped(func, out, args, kwargs)


def _layer_norm(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Normalise each row by itself."""
    x, shape, *_ = (*args, kwargs.get("normalized_shape"))
    if len(shape) >= plain(x).ndim:
        raise refusal(func, "it normalises over all rows")
    return _each_row(func, args, kwargs)


def _batch_norm(
    func: Function,
    args: Args,
    kwargs: Kwargs,
) -> Any:
    """Normalise channels by fixed statistics, or by the statistics of the real rows."""
    names = "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
    given = {
        "weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5,
        **dict(zip(names, args, strict=False)), **kwargs,
    }  # fmt: skip
    x = given["input"]
    if not given["training"]:
        return _each_row(F.batch_norm, args, kwargs)
    bounds = shared_bounds(func, args, kwargs)
    out = batch_norm(
        plain(x), given["running_mean"], given["running_var"], given["weight"], given["bias"],
        momentum=given["momentum"], eps=given["eps"], count=bounds.count,
    )  # fmt: skip
    return as_rows(out, bounds)


def _train_norm(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Normalise channels by the statistics of the real rows, add a residual, clamp."""
    bounds = shared_bounds(func, args, kwargs)
    return as_rows(_run(func, args, {**kwargs, "count": bounds.count}), bounds)


def _loss(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Average or add up a loss over the real rows."""
    reduction = kwargs.pop("reduction", "mean")
    for old in ("size_average", "reduce"):
        kwargs.pop(old, None)
    bounds = shared_bounds(func, args, kwargs)
    if reduction == "mean" and func in _CLASS_LOSSES and kwargs.get("weight") is not None:
        raise refusal(func, "its average with class weights is not supported on padded rows")
    out = _run(func, args, {**kwargs, "reduction": "none"})
    if reduction == "none":
        return as_rows(out, bounds)
    mask = bounds.mask(out.shape[0])
    counted = torch.ones(out.shape[:1], dtype=torch.bool, device=out.device)
    if func in _CLASS_LOSSES:
        target = plain(kwargs["target"] if "target" in kwargs else args[1])
        counted = target != kwargs.get("ignore_index", -100)
    counted = counted if mask is None else counted & mask
    counted = counted.reshape(*counted.shape, *(1,) * (out.ndim - counted.ndim)).expand_as(out)
    total = torch.where(counted, out, torch.zeros_like(out)).sum()
    return total / counted.sum() if reduction == "mean" else total


def _no_values(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Read a shape, a dtype, an address."""
    return _run(func, args, kwargs)


def _transpose(func: Function, _args: Args, _kwargs: Kwargs) -> Any:
    raise refusal(func, "its result does not have the rows first")


def _data(func: Function, args: Args, kwargs: Kwargs) -> Any:
    return _wrapped(func, _run(func, args, kwargs), args, kwargs)


def _along_map(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Run an operation along a kernel map; its result has the rows of the output sites."""
    kernel_map = next(x for x in (*args, *kwargs.values()) if isinstance(x, KernelMap))
    return kernel_map.out_sites.as_rows(_run(func, args, kwargs))


def _at_sites(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Run an operation whose result does not have the rows."""
    assert any(isinstance(x, ActiveSites) for x in (*args, *kwargs.values()))
    return _run(func, args, kwargs)


def _to_samples(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Reduce the rows of each sample; padding has batch index -1, so that its rows take no part."""
    return _run(func, args, {**kwargs, "is_sorted": False})


def _of_samples(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Give each row the values of its sample."""
    batch_index = kwargs["batch_index"] if "batch_index" in kwargs else args[1]
    bounds = bounds_of(batch_index)
    out = _run(func, args, {**kwargs, "is_sorted": False})
    return out if bounds is None else as_rows(out, bounds)


def reads_no_values(func: Function) -> bool:
    """Return whether a function returns a shape, a dtype, a device or an address, and no value."""
    return RULES.get(func) is _no_values


def _found(names: Iterable[str]) -> set[Function]:
    """Return the functions of these names in torch, its tensors and its functional API."""
    owners = torch, Tensor, F, torch.special
    found = {getattr(owner, name, None) for owner in owners for name in names}
    return {func for func in found if callable(func)}


def _fill_rules() -> None:
    by_name: dict[Any, Iterable[str]] = {
        _no_values: _NO_VALUES,
        _each_row: _EACH_ROW,
        _along_axes: _ALONG_AXES,
        _join_columns: ("cat", "concat", "concatenate"),
        _product: _PRODUCTS,
        _reshape: _SAME_FIRST_AXIS,
        _layer_norm: ("layer_norm",),
        _batch_norm: ("batch_norm",),
        _columns: ("__getitem__", "__setitem__"),
    }
    for rule, names in by_name.items():
        for func in _found(names):
            RULES[func] = rule
    RULES.update(dict.fromkeys(_LOSSES, _loss))
    for name in _PROPERTIES:
        found = getattr(Tensor, name, None)
        if isinstance(found, types.GetSetDescriptorType | property):
            RULES[found.__get__] = _no_values
    RULES[Tensor.data.__get__] = _data  # pyright: ignore[reportAttributeAccessIssue]
    RULES[Tensor.T.__get__] = _transpose  # pyright: ignore[reportAttributeAccessIssue]
    along_maps = sparse_conv, sparse_pool, sparse_channelwise_conv
    RULES.update(dict.fromkeys(along_maps, _along_map))
    RULES[pointwise_conv] = _each_row
    RULES[train_norm] = _train_norm
    RULES[to_dense] = _at_sites
    RULES[global_pool] = _to_samples
    RULES[global_broadcast] = _of_samples


_fill_rules()
