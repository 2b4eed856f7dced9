"""Sparse operations in torch operations of fixed shapes: the rules of a recorded run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tritonspconv.coords.row_tensor import as_rows, bounds_of, plain
from tritonspconv.coords.site_plan import MapBuilder
from tritonspconv.kernel_map import KernelMap, NeighborTable
from tritonspconv.kernels import acc_dtype
from tritonspconv.kernels.channel_norm import ChannelNorm
from tritonspconv.ops.conv import compute_dtype, sparse_conv
from tritonspconv.ops.dense import to_dense
from tritonspconv.ops.global_pool import global_broadcast, global_pool
from tritonspconv.ops.pool import sparse_pool

# Most bytes of rows that a convolution gathers at a time; at least one tap.
_GATHERED_BYTES = 2**24


def _as_rule(function: Callable[..., Any], recorded: Callable[..., Any]) -> Callable[..., Any]:
    """Return the rule that replaces ``function`` by ``recorded``, with all its arguments."""
    signature = inspect.signature(function)

    @functools.wraps(recorded)
    def rule(_func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        with torch._C.DisableTorchFunctionSubclass():
            return recorded(**given.arguments)

    return rule


def _convolution(
    feats: Tensor,
    weight: Tensor,
    kernel_map: KernelMap,
    bias: Tensor | None,
    weight_layout: str,
    precision: str,
    norm: Any,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """Gather the rows of some taps side by side, multiply, add up."""
    del precision  # torch's own setting chooses the precision of float32 products.
    dtype = compute_dtype(feats, weight)
    acc = acc_dtype(dtype)
    if weight_layout == "OVI":
        weight = weight.flatten(1, -2).permute(1, 2, 0)
    # Round to the dtype of the products first, then multiply in the dtype of the sums.
    matrices = weight.to(dtype).to(acc)
    x = plain(feats).to(dtype).to(acc)
    volume, c_in, c_out = matrices.shape
    table = kernel_map.out_table
    if table.mirrored:
        matrices = matrices.flip(0)
    n_out = table.rows.shape[1]
    # Row 0 is zero; taps without an entry read this row.
    x = torch.cat([x.new_zeros(1, c_in), x])
    rows = table.rows.t() + 1
    at_once = max(_GATHERED_BYTES // max(n_out * c_in * acc.itemsize, 1), 1)
    out = None
    with torch.autocast(x.device.type, enabled=False):
        for first in range(0, volume, at_once):
            last = min(first + at_once, volume)
            gathered = x.index_select(0, rows[:, first:last].reshape(-1))
            operand = gathered.reshape(n_out, (last - first) * c_in)
            matrix = matrices[first:last].reshape(-1, c_out)
            out = operand.mm(matrix) if out is None else torch.addmm(out, operand, matrix)
    assert out is not None, "a window has at least one tap"
    if bias is not None:
        out = out + bias
    if norm is not None:
        out = _normalised(out, norm)
    if residual is not None:
        out = out + plain(residual)
    out = out.relu() if relu else out
    return kernel_map.out_sites.as_rows(out.to(dtype))


def _normalised(out: Tensor, norm: Any) -> Tensor:
    if not isinstance(norm, ChannelNorm):
        raise NotImplementedError("a batch norm in training; call model.eval() first")
    out = (out - norm.mean.to(out.dtype)) * norm.scale(out.dtype)
    return out if norm.bias is None else out + norm.bias.to(out.dtype)


def _pool(
    feats: Tensor, kernel_map: KernelMap, mode: str, ties: str, floor: float | None
) -> Tensor:
    """Pool tap by tap."""
    del ties  # for gradients alone
    x, table = plain(feats), kernel_map.out_table
    acc = acc_dtype(x.dtype)
    absent = float("-inf") if mode == "max" else 0.0
    join = torch.maximum if mode == "max" else torch.add
    out = x.new_full((table.rows.shape[1], x.shape[1]), absent, dtype=acc)
    for row in _taps(table):
        taken = x.index_select(0, row.clamp(min=0)).to(acc)
        out = join(out, torch.where((row >= 0)[:, None], taken, absent))
    present = (table.rows >= 0).sum(0)[:, None]
    if mode == "avg":
        out = out / present.clamp(min=1)
    if mode == "max":
        out = torch.where(present > 0, out, 0.0 if floor is None else floor)
        # ``maximum`` keeps NaN, which wins a maximum; ``clamp`` is not used here.
        out = out if floor is None else torch.maximum(out, out.new_full((), floor))
    return kernel_map.out_sites.as_rows(out.to(x.dtype))


def _taps(table: NeighborTable) -> Iterator[Tensor]:
    """Yield the input row of each output, int64 [n_out], tap by tap; -1: none."""
    yield from table.rows.flip(0) if table.mirrored else table.rows


def _dense(feats: Tensor, sites: Any, channels_first: bool) -> Tensor:
    """Write rows into a dense tensor; report rows outside the grid."""
    builder: MapBuilder = sites.bounds.plan.builder
    builder.inspect(sites)
    return to_dense(plain(feats), sites, channels_first=channels_first)


def _pool_samples(
    feats: Tensor, batch_index: Tensor, batch_size: int, mode: str, is_sorted: bool
) -> Tensor:
    """Reduce the rows of each sample; padding has batch index -1."""
    del is_sorted
    x, sample = plain(feats), plain(batch_index)
    acc = acc_dtype(x.dtype)
    samples = torch.arange(batch_size, dtype=sample.dtype, device=sample.device)
    is_of = samples[:, None] == sample  # [batch_size, N]
    size = is_of.sum(1)[:, None]
    if mode == "max":
        found = [torch.where(each[:, None], x, float("-inf")).amax(0) for each in is_of]
        return torch.where(size > 0, torch.stack(found), 0.0).to(x.dtype)
    # A product with 0 would turn an infinite value of another sample into NaN, so ``where`` selects
    # the values.
    found = [torch.where(each[:, None], x.to(acc), 0.0).sum(0) for each in is_of]
    out = torch.stack(found)
    return (out / size.clamp(min=1) if mode == "avg" else out).to(x.dtype)


def _give_to_rows(values: Tensor, batch_index: Tensor, is_sorted: bool) -> Tensor:
    """Give each row the values of its sample."""
    del is_sorted
    bounds, sample, x = bounds_of(batch_index), plain(batch_index), plain(values)
    is_known = (sample >= 0) & (sample < x.shape[0])
    taken = x.index_select(0, torch.where(is_known, sample, 0).long())
    out = torch.where(is_known[:, None], taken, 0.0)
    return out if bounds is None else as_rows(out, bounds)


RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    function: _as_rule(function, recorded)
    for function, recorded in (
        (sparse_conv, _convolution),
        (sparse_pool, _pool),
        (to_dense, _dense),
        (global_pool, _pool_samples),
        (global_broadcast, _give_to_rows),
    )
}
"""The rule of each sparse operation; every other function keeps its ordinary rule."""
