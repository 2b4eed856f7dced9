"""Local pooling along a kernel map."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from tritonspconv.arguments import check_tensor
from tritonspconv.graph_capture import refuse_capture
from tritonspconv.kernel_map import KernelMap
from tritonspconv.kernels.pool import pool_bwd, pool_fwd

if TYPE_CHECKING:
    from jaxtyping import Float

PoolMode = Literal["max", "avg", "sum"]
TieRule = Literal["first", "all"]


def sparse_pool(
    feats: Float[Tensor, "n_in C"],
    kernel_map: KernelMap,
    mode: PoolMode = "max",
    *,
    ties: TieRule = "first",
    floor: float | None = None,
) -> Float[Tensor, "n_out C"]:
    """Pool sparse features along a kernel map, channel by channel.

    A window pools the inputs that are present. An average divides by the number of them.

    Args:
        feats: Input rows [n_in, C], floating point.
        kernel_map: The map from input to output rows.
        mode: ``"max"``, ``"avg"`` or ``"sum"``.
        ties: The inputs that get the gradient if several share the maximum: the ``"first"`` in tap
            order, or ``"all"`` of them, each the whole gradient, as in spconv. For ``"max"`` only.
        floor: A lower bound of a maximum; spconv has 0. An input equal to the bound gets the
            gradient. If every input is below the bound, no input gets it. For ``"max"`` only.

    Returns:
        Output rows [n_out, C] in ``feats.dtype``; a row without inputs is ``floor`` if that is
        given, else 0. NaN wins a maximum.

    Raises:
        TypeError: ``feats`` is not floating point.
        ValueError: Rows or devices disagree, or an option is unknown or does not fit the mode.

    Deterministic. Accumulates in float32 (float64 for float64). Differentiable any
    number of times in ``feats``.
    Extra memory while training: int32 [n_out, C] for ``ties="first"``, int32 [n_out] for averages.
    """
    refuse_capture("sparse_pool")
    if has_torch_function_unary(feats):
        return handle_torch_function(
            sparse_pool, (feats,), feats, kernel_map, mode, ties=ties, floor=floor
        )
    _check(feats, kernel_map, mode, ties, floor)
    return _SparsePool.apply(feats, kernel_map, mode, ties, floor)


def _check(feats: Tensor, kernel_map: KernelMap, mode: str, ties: str, floor: float | None) -> None:
    check_tensor("sparse_pool: feats", feats)
    if mode not in get_args(PoolMode):
        raise ValueError(f"sparse_pool: mode must be one of {get_args(PoolMode)}; got {mode!r}.")
    if ties not in get_args(TieRule):
        raise ValueError(f"sparse_pool: ties must be one of {get_args(TieRule)}; got {ties!r}.")
    if floor is not None and mode != "max":
        raise ValueError(f"sparse_pool: floor bounds a maximum; got floor={floor}, mode={mode!r}.")
    if ties != "first" and mode != "max":
        raise ValueError(
            f"sparse_pool: ties share the gradient of a maximum; got ties={ties!r}, mode={mode!r}."
        )
    if not feats.is_floating_point():
        raise TypeError(f"sparse_pool: feats must be floating point; got {feats.dtype}.")
    if feats.ndim != 2 or feats.shape[0] != kernel_map.n_in:
        raise ValueError(
            f"sparse_pool: feats must have shape [{kernel_map.n_in}, C] to match the kernel map's "
            f"inputs; got {list(feats.shape)}."
        )
    if feats.device != kernel_map.in_sites.device:
        raise ValueError(
            f"sparse_pool: feats and kernel map must share a device; got {feats.device} and "
            f"{kernel_map.in_sites.device}."
        )


class _SparsePool(torch.autograd.Function):
    """Reduce over ``out_table``; the gradient is gathered over ``in_table``."""

    @staticmethod
    def forward(
        ctx: Any,
        feats: Tensor,
        kernel_map: KernelMap,
        mode: PoolMode,
        ties: TieRule,
        floor: float | None,
    ) -> Tensor:
        by_value = mode == "max" and ties == "all"
        table = kernel_map.out_table
        # Tap order decides ties; a mirrored table holds the taps from last to first.
        rows = table.rows.flip(0) if table.mirrored and mode == "max" else table.rows
        want_saved = ctx.needs_input_grad[0] and not by_value
        out, saved = pool_fwd(feats, rows, table.order, mode, floor, want_saved, table.real_columns)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*((feats, out) if by_value else (saved,)))
        ctx.kernel_map = kernel_map
        ctx.mode = mode
        ctx.by_value = by_value
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_out,) = grad_outputs
        saved = ctx.saved_tensors
        if ctx.by_value:
            state = {"feats": saved[0].detach(), "out": saved[1].detach()}
        else:
            state = {"max": {"argmax": saved[0]}, "avg": {"present": saved[0]}, "sum": {}}[ctx.mode]
        if torch.is_grad_enabled():
            # The caller passed create_graph=True.
            grad_feats = _PoolGrad.apply(grad_out, ctx.kernel_map, ctx.mode, state)
        else:
            grad_feats = _pool_grad(grad_out, ctx.kernel_map, ctx.mode, state)
        return grad_feats, None, None, None, None


def _pool_grad(
    grad_out: Tensor, kernel_map: KernelMap, mode: PoolMode, state: dict[str, Tensor]
) -> Tensor:
    table = kernel_map.in_table
    return pool_bwd(grad_out, table.rows, table.order, mode, count=table.real_columns, **state)


class _PoolGrad(torch.autograd.Function):
    """The gradient of a pool, which is linear in the incoming gradient."""

    @staticmethod
    def forward(
        ctx: Any, grad_out: Tensor, kernel_map: KernelMap, mode: PoolMode, state: dict[str, Tensor]
    ) -> Tensor:
        ctx.kernel_map, ctx.mode, ctx.state = kernel_map, mode, state
        return _pool_grad(grad_out, kernel_map, mode, state)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        if ctx.mode != "max":
            return sparse_pool(grad, ctx.kernel_map, ctx.mode), None, None, None
        if "argmax" in ctx.state:
            argmax = ctx.state["argmax"]
            taken = grad.gather(0, argmax.clamp(min=0).long())
            return torch.where(argmax >= 0, taken, 0), None, None, None
        return _sum_of_winners(grad, ctx.kernel_map, **ctx.state), None, None, None


def _sum_of_winners(grad: Tensor, kernel_map: KernelMap, feats: Tensor, out: Tensor) -> Tensor:
    """Return for each output the sum of ``grad`` [n_in, C] over the inputs that equal it."""
    table = kernel_map.out_table
    by_column = out if table.order is None else out[table.order.long()]
    total = torch.zeros_like(by_column)
    for row in table.entries(kernel_map.kernel_volume):
        place = row.clamp(min=0).long()
        wins = (row >= 0)[:, None] & (feats[place] == by_column)
        total = total + torch.where(wins, grad[place], 0)
    if table.order is None:
        return total
    return torch.zeros_like(total).index_copy(0, table.order.long(), total)
