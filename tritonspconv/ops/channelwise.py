"""Channelwise (depthwise) convolution along a kernel map, in vectorised torch on every device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from tritonspconv.graph_capture import refuse_capture
from tritonspconv.kernel_map import KernelMap, NeighborTable
from tritonspconv.kernels import acc_dtype

if TYPE_CHECKING:
    from jaxtyping import Float


def sparse_channelwise_conv(
    feats: Float[Tensor, "n_in C"],
    weight: Float[Tensor, "V C"],
    kernel_map: KernelMap,
    bias: Float[Tensor, "C"] | None = None,
) -> Float[Tensor, "n_out C"]:
    """Convolve each channel with taps of its own.

    ``out[o] = bias + sum(feats[i] * weight[v] for (i, o, v) in kernel_map)``.

    Args:
        feats: Input rows [n_in, C], floating point.
        weight: Factor of each tap and channel [V, C].
        kernel_map: The pairs of input and output rows of each tap.
        bias: [C], added to every row.

    Returns:
        [n_out, C] in the promoted dtype of both; a row without pairs is ``bias``.

    Raises:
        ValueError: Rows, channels, taps or devices disagree.

    Deterministic. Sums in float32 (float64 for float64 input). Differentiable any number of
    times in ``feats``, ``weight`` and ``bias``. The host never waits.
    Time and launches grow with V.
    """
    refuse_capture("sparse_channelwise_conv")
    if has_torch_function_unary(feats):
        return handle_torch_function(
            sparse_channelwise_conv, (feats,), feats, weight, kernel_map, bias
        )
    expected = [kernel_map.kernel_volume, feats.shape[-1]]
    if feats.ndim != 2 or feats.shape[0] != kernel_map.n_in or list(weight.shape) != expected:
        raise ValueError(
            f"sparse_channelwise_conv: feats must be [{kernel_map.n_in}, C] and weight {expected} "
            f"to match the kernel map; got {list(feats.shape)} and {list(weight.shape)}."
        )
    if not feats.device == weight.device == kernel_map.in_sites.device:
        raise ValueError(
            "sparse_channelwise_conv: feats, weight and kernel map must share a device; got "
            f"{feats.device}, {weight.device} and {kernel_map.in_sites.device}."
        )
    if bias is not None and (bias.shape != weight.shape[1:] or bias.device != feats.device):
        raise ValueError(
            f"sparse_channelwise_conv: bias must be [{weight.shape[1]}] on {feats.device}, one "
            f"number per channel; got {list(bias.shape)} on {bias.device}."
        )
    out = _ChannelwiseConv.apply(feats, weight, kernel_map)
    return out if bias is None else out + bias


class _ChannelwiseConv(torch.autograd.Function):
    """fwd over ``out_table``; dgrad the same over ``in_table``; wgrad a dot product per tap."""

    @staticmethod
    def forward(ctx: Any, feats: Tensor, weight: Tensor, kernel_map: KernelMap) -> Tensor:
        ctx.save_for_backward(feats, weight)
        ctx.kernel_map = kernel_map
        dtype = torch.promote_types(feats.dtype, weight.dtype)
        return _gather(feats, weight, kernel_map.out_table).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        # Use torch's operations, which can be differentiated again.
        (grad,) = grad_outputs
        feats, weight = ctx.saved_tensors
        grad_feats = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_feats = _gather(grad, weight, ctx.kernel_map.in_table).to(feats.dtype)
        if ctx.needs_input_grad[1]:
            table = ctx.kernel_map.out_table
            by_column = _acc(grad if table.order is None else grad[table.order.long()])
            grad_weight = torch.zeros_like(weight, dtype=by_column.dtype)
            for tap, row in _by_tap(table.entries(weight.shape[0]), table):
                grad_weight[tap] = (_rows(feats, row) * by_column).sum(0)
            grad_weight = grad_weight.to(weight.dtype)
        return grad_feats, grad_weight, None


def _gather(feats: Tensor, weight: Tensor, table: NeighborTable) -> Tensor:
    """Return ``out[order[c]] = sum over taps of feats[rows[v, c]] * weight[v]``."""
    feats, weight = _acc(feats), _acc(weight)
    dtype = torch.promote_types(feats.dtype, weight.dtype)
    entries = table.entries(weight.shape[0])
    out = torch.zeros(entries.shape[1], feats.shape[1], dtype=dtype, device=feats.device)
    for tap, row in _by_tap(entries, table):
        out += _rows(feats, row) * weight[tap]
    if table.order is None:
        return out
    return torch.empty_like(out).index_copy_(0, table.order.long(), out)


def _by_tap(entries: Tensor, table: NeighborTable) -> Iterator[tuple[int, Tensor]]:
    """Yield the weight's tap and its row of the entries of ``table``, int32 [V, n]."""
    for v, row in enumerate(entries):
        yield len(entries) - 1 - v if table.mirrored else v, row


def _rows(feats: Tensor, row: Tensor) -> Tensor:
    """Return ``feats[row]``, zeros where the row is -1."""
    if not feats.shape[0]:
        return feats.new_zeros(row.shape[0], feats.shape[1])
    return torch.where((row >= 0)[:, None], feats[row.clamp(min=0).long()], 0)


def _acc(tensor: Tensor) -> Tensor:
    return tensor.to(acc_dtype(tensor.dtype))
