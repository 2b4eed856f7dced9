"""Operators registered with torch, which ``torch.compile`` puts into its graphs.

Each convolution exists for the ways in which a layer knows its kernel map: as an object, as the
geometry between two sets of sites, or as the map of an earlier layer read backwards. The operator
finds the map when it runs, so a graph serves every input. Only traced code calls the operators,
because their dispatch takes a microsecond. Eager calls do not pay this time.

Each convolution exists a second time, as ``<name>_fused``, which has no gradient: it normalises
channels, adds a residual and clamps, in the launch that eager mode makes for the same layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritonspconv.coords import ActiveSites
from tritonspconv.geometry import ConvGeometry
from tritonspconv.guide import more
from tritonspconv.kernel_map import KernelMap, inverse_maps, kernel_map
from tritonspconv.kernels import acc_dtype
from tritonspconv.kernels.channel_norm import ChannelNorm
from tritonspconv.opaque_types import AVAILABLE, new_size, schema_name
from tritonspconv.ops import dense as _dense
from tritonspconv.ops._conv_parts import forward_only, gradients_only

_SITES, _MAP = schema_name(ActiveSites), schema_name(KernelMap)
_GEOMETRY = schema_name(ConvGeometry)

# A fused convolution normalises its sums if there is a mean. Then it adds the residual if there is
# one, and last it clamps if ``relu`` is true.
_EPILOGUE = (
    "Tensor? mean, Tensor? variance, Tensor? scale, Tensor? shift, float eps, Tensor? residual, "
    "bool relu"
)

LIBRARY = torch.library.Library("tritonspconv", "DEF")


def _map_between(
    in_sites: ActiveSites, out_sites: ActiveSites, geometry: ConvGeometry
) -> KernelMap:
    if geometry.sites == "same" and in_sites is out_sites:
        return kernel_map(in_sites, geometry)
    return kernel_map(in_sites, geometry, out_sites=out_sites)


def _map_back(in_sites: ActiveSites, out_sites: ActiveSites, kernel_size: list[int]) -> KernelMap:
    found = inverse_maps(in_sites, out_sites, tuple(kernel_size))
    if len(found) != 1:
        raise ValueError(
            f"an inverse convolution needs one earlier layer with kernel_size={kernel_size} from "
            f"{out_sites} to {in_sites}; got {len(found)}. Pass as like the very input of the "
            "layer to undo."
        )
    return found[0]


# The operator, the schema of the arguments that describe the map, and the map.
_LOOKUPS: tuple[tuple[str, str, Callable[..., KernelMap]], ...] = (
    ("conv_along_map", f"{_MAP} kernel_map", lambda found: found),
    (
        "conv_between",
        f"{_SITES} in_sites, {_SITES} out_sites, {_GEOMETRY} geometry",
        _map_between,
    ),
    (
        "conv_inverse",
        f"{_SITES} in_sites, {_SITES} out_sites, int[] kernel_size",
        _map_back,
    ),
)


def register_conv(
    name: str,
    map_args: str,
    find_map: Callable[..., KernelMap],
    check: Callable[..., None] | None = None,
) -> None:
    """Register a convolution ``tritonspconv::name``, its gradients, and ``name_fused``.

    Args:
        name: Name of the operator.
        map_args: The schema of the arguments that describe the kernel map. They follow the
            arguments of :func:`tritonspconv.ops.sparse_conv`.
        find_map: Returns the kernel map for these arguments.
        check: Raises if a graph cannot serve these arguments; they are fake tensors then.
    """
    if not AVAILABLE:
        return
    setting = "SymInt n_out, str layout, ScalarType dtype, str precision"
    operands = f"Tensor feats, Tensor weight, Tensor? bias, {map_args}, {setting}"

    def forward(feats: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        *lookup, _, layout, dtype, precision = rest
        return forward_only(feats, weight, bias, find_map(*lookup), layout, dtype, precision)

    def fake_forward(feats: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        *lookup, n_out, layout, dtype, _ = rest
        if check is not None:
            check(*lookup)
        return feats.new_empty(n_out, weight.shape[0 if layout == "OVI" else 2], dtype=dtype)

    def fused(feats: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        *call, mean, variance, scale, shift, eps, residual, relu = rest
        *lookup, _, layout, dtype, precision = call
        norm = None if mean is None else ChannelNorm(mean, variance, scale, shift, eps)
        return forward_only(
            feats, weight, bias, find_map(*lookup), layout, dtype, precision, norm, residual, relu
        )

    def fake_fused(feats: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        return fake_forward(feats, weight, bias, *rest[:-7])

    def grads(grad: Tensor, feats: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *lookup, _, layout, dtype, precision, needs_feats, needs_weight = rest
        return gradients_only(
            grad, feats, weight, find_map(*lookup), layout, dtype, precision, needs_feats,
            needs_weight,
        )  # fmt: skip

    def fake_grads(
        grad: Tensor, feats: Tensor, weight: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        *_, needs_feats, needs_weight = rest
        return (
            feats.new_empty(feats.shape if needs_feats else 0),
            weight.new_empty(weight.shape if needs_weight else 0),
        )

    run = register_operator(f"{name}_forward", f"({operands}) -> Tensor", forward, fake_forward)
    register_operator(f"{name}_fused", f"({operands}, {_EPILOGUE}) -> Tensor", fused, fake_fused)
    run_grads = register_operator(
        f"{name}_grads",
        f"(Tensor grad, Tensor feats, Tensor weight, {map_args}, {setting}, bool needs_feats, "
        "bool needs_weight) -> (Tensor, Tensor)",
        grads,
        fake_grads,
    )
    LIBRARY.define(f"{name}({operands}) -> Tensor")
    LIBRARY.impl(
        name, lambda *args: _Convolution.apply(run, run_grads, *args), "CompositeImplicitAutograd"
    )


def register_operator(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    """Register an operator without gradient, for real tensors and for fake ones; return it."""
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tritonspconv::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.tritonspconv, name).default


def register_sizes(
    name: str, operands: str, run: Callable[..., Tensor], check: Callable[..., None]
) -> None:
    """Register an operator ``tritonspconv::name`` whose number of rows only a run can tell.

    Args:
        name: Name of the operator.
        operands: Schema of the arguments: first int32 coordinates [n, axes], last the smallest
            number of rows that the graph is made for.
        run: Returns new coordinates int32 [n_out, axes].
        check: See :func:`register_conv`.
    """
    if not AVAILABLE:
        return

    def fake(coords: Tensor, *rest: Any) -> Tensor:
        check(coords, *rest)
        return coords.new_empty(new_size(rest[-1]), coords.shape[1])

    register_operator(name, f"({operands}) -> Tensor", run, fake)


def refuse_few_sites(count: int, least: int) -> None:
    """Raise if a strided layer makes fewer sites than the graph was made for."""
    if count < least:
        raise RuntimeError(
            f"a compiled strided layer in training needs {least} output sites; got {count}. Call "
            "the network without torch.compile for so small an input." + more("cannot-record")
        )


class _Convolution(torch.autograd.Function):
    """The autograd node of every convolution; ``run`` and ``run_grads`` are its operators."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Any,
        run_grads: Any,
        feats: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *rest: Any,
    ) -> Tensor:
        ctx.save_for_backward(feats, weight)
        ctx.run_grads, ctx.rest = run_grads, rest
        ctx.bias_dtype = None if bias is None else bias.dtype
        return run(feats, weight, bias, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        _, _, needs_feats, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_feats = grad_weight = grad_bias = None
        if needs_feats or needs_weight:
            grad_feats, grad_weight = ctx.run_grads(
                grad, *ctx.saved_tensors, *ctx.rest, needs_feats, needs_weight
            )
        if needs_bias:
            grad_bias = grad.sum(0, dtype=acc_dtype(grad.dtype)).to(ctx.bias_dtype)
        return (
            None,
            None,
            grad_feats if needs_feats else None,
            grad_weight if needs_weight else None,
            grad_bias,
            *(None for _ in ctx.rest),
        )


class _ToDense(torch.autograd.Function):
    """The autograd node of the conversion to a dense tensor."""

    @staticmethod
    def forward(
        ctx: Any, feats: Tensor, sites: ActiveSites, shape: Any, channels_first: bool
    ) -> Tensor:
        ctx.rest = sites, feats.shape[0], channels_first
        return torch.ops.tritonspconv.to_dense_forward(feats, sites, shape, channels_first)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        return torch.ops.tritonspconv.to_dense_grad(grad, *ctx.rest), None, None, None


def refuse_second_order() -> None:
    """Raise if the caller asks for a gradient of the gradient."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "torch.compile makes no gradients of gradients of sparse operations. Call the network "
            "without torch.compile where you pass create_graph=True." + more("cannot-record")
        )


def _register_to_dense() -> None:
    """Register the conversion to a dense tensor and its gradient."""
    operands = f"Tensor feats, {_SITES} sites, SymInt[] shape, bool channels_first"
    register_operator(
        "to_dense_forward",
        f"({operands}) -> Tensor",
        lambda feats, sites, _, first: _dense.to_dense(feats, sites, channels_first=first),
        lambda feats, sites, shape, first: feats.new_empty(shape),
    )
    register_operator(
        "to_dense_grad",
        f"(Tensor grad, {_SITES} sites, SymInt rows, bool channels_first) -> Tensor",
        lambda grad, sites, _, first: _dense.rows_of_dense(grad, sites, first),
        lambda grad, sites, rows, first: grad.new_empty(rows, grad.shape[1 if first else -1]),
    )
    LIBRARY.define(f"to_dense({operands}) -> Tensor")
    LIBRARY.impl("to_dense", lambda *args: _ToDense.apply(*args), "CompositeImplicitAutograd")


for _lookup in _LOOKUPS:
    register_conv(*_lookup)
if AVAILABLE:
    _register_to_dense()
