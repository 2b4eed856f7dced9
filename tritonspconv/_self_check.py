"""The self-check compares each kind of operation, in both passes, with brute force in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tritonspconv import ops, reference
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import KernelMap, kernel_map
from tritonspconv.ops.pool import PoolMode
from tritonspconv.testing import assert_matches

_CHANNELS = 12, 20
_ONE, _TWO, _THREE = (1, 1, 1), (2, 2, 2), (3, 3, 3)
_SUBMANIFOLD = ConvGeometry.submanifold(_THREE, _ONE)
_STRIDED = ConvGeometry(_THREE, _TWO, _ONE, _ONE)
_POOLED = ConvGeometry(_TWO, _TWO, (0, 0, 0), _ONE)
_GENERATIVE = ConvGeometry(_THREE, _TWO, _ONE, _ONE, transposed=True)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class _Pairs(NamedTuple):
    """Pairs of a map, by brute force: input rows, output rows and taps, int64 [P] each."""

    rows: Tensor
    out_rows: Tensor
    taps: Tensor


def _submanifold(sites: ActiveSites, dtype: torch.dtype) -> None:
    _check_conv(kernel_map(sites, _SUBMANIFOLD), dtype)


def _strided(sites: ActiveSites, dtype: torch.dtype) -> None:
    _check_conv(kernel_map(sites, _STRIDED), dtype)


def _transposed(sites: ActiveSites, dtype: torch.dtype) -> None:
    """Check a layer that writes given sites: the sites that a strided layer read."""
    geometry = ConvGeometry(_TWO, _TWO, (0, 0, 0), _ONE, transposed=True)
    coarse = kernel_map(sites, _POOLED).out_sites
    _check_conv(kernel_map(coarse, geometry, out_sites=sites), dtype)


def _generative(sites: ActiveSites, dtype: torch.dtype) -> None:
    """Check a layer that makes every site that an input reaches."""
    _check_conv(kernel_map(sites, _GENERATIVE), dtype)


def _inverse(sites: ActiveSites, dtype: torch.dtype) -> None:
    _check_conv(kernel_map(sites, _STRIDED).inverse(), dtype)


def _channelwise(sites: ActiveSites, dtype: torch.dtype) -> None:
    found = kernel_map(sites, _SUBMANIFOLD)
    pairs, channels = _brute_force(found), _CHANNELS[0]

    def formula(feats: Tensor, weight: Tensor) -> Tensor:
        products = feats[pairs.rows] * weight[pairs.taps]
        return products.new_zeros(found.n_out, channels).index_add(0, pairs.out_rows, products)

    feats = torch.randn(found.n_in, channels)
    weight = torch.randn(found.kernel_volume, channels)
    _compare(
        lambda x, w: ops.sparse_channelwise_conv(x, w, found),
        formula, (feats, weight), sites.device, dtype,
    )  # fmt: skip


def _pool(mode: PoolMode) -> Callable[[ActiveSites, torch.dtype], None]:
    def check(sites: ActiveSites, dtype: torch.dtype) -> None:
        found = kernel_map(sites, _STRIDED)
        pairs = _brute_force(found)
        _compare(
            lambda x: ops.sparse_pool(x, found, mode),
            _reduction(pairs.rows, pairs.out_rows, found.n_out, mode),
            (_distinct(found.n_in),), sites.device, dtype,
        )  # fmt: skip

    return check


def _global_pool(mode: PoolMode) -> Callable[[ActiveSites, torch.dtype], None]:
    def check(sites: ActiveSites, dtype: torch.dtype) -> None:
        index, batch_size = sites.coords[:, 0], sites.grid.batch_size
        rows = torch.arange(sites.num_rows)
        _compare(
            lambda x: ops.global_pool(x, index, batch_size, mode),
            _reduction(rows, index.cpu().long(), batch_size, mode),
            (_distinct(sites.num_rows),), sites.device, dtype,
        )  # fmt: skip

    return check


# The name in the report, and the check, which raises an AssertionError with the reason.
CHECKS: dict[str, Callable[[ActiveSites, torch.dtype], None]] = {
    "submanifold": _submanifold,
    "strided": _strided,
    "transposed": _transposed,
    "generative": _generative,
    "inverse": _inverse,
    "channelwise": _channelwise,
    "max pool": _pool("max"),
    "average pool": _pool("avg"),
    "sum pool": _pool("sum"),
    "global max": _global_pool("max"),
    "global average": _global_pool("avg"),
    "global sum": _global_pool("sum"),
}


def _check_conv(found: KernelMap, dtype: torch.dtype) -> None:
    pairs, (c_in, c_out) = _brute_force(found), _CHANNELS

    def formula(feats: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        products = torch.bmm(feats[pairs.rows, None], weight[pairs.taps])[:, 0]
        sums = products.new_zeros(found.n_out, c_out).index_add(0, pairs.out_rows, products)
        return sums + bias

    feats = torch.randn(found.n_in, c_in)
    weight = torch.randn(found.kernel_volume, c_in, c_out)
    _compare(
        lambda x, w, b: ops.sparse_conv(x, w, found, b),
        formula, (feats, weight, torch.randn(c_out)), found.in_sites.device, dtype,
    )  # fmt: skip


def _compare(
    operation: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    values: tuple[Tensor, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Raise an AssertionError if the output or a gradient differs from the formula."""
    inputs = [value.to(device, dtype).requires_grad_() for value in values]
    out = operation(*inputs)
    grad = torch.randn(out.shape).to(device, dtype)
    grads = torch.autograd.grad(out, inputs, grad)
    assert_matches(out, formula, *inputs, name="output")
    for place, found in enumerate(grads):

        def gradient(*tensors: Tensor, place: int = place) -> Tensor:
            *leaves, incoming = tensors
            leaves = [leaf.requires_grad_() for leaf in leaves]
            return torch.autograd.grad(formula(*leaves), leaves, incoming)[place]

        name = f"gradient of the {('features', 'weight', 'bias')[place]}"
        assert_matches(found, gradient, *inputs, grad, name=name)


def _distinct(rows: int) -> Tensor:
    """Return numbers [rows, C], distinct in each channel and not 0, so that a maximum is unique."""
    # bfloat16 holds the numbers of fewer than 256 rows exactly. scatter_reduce halves the gradient
    # of a maximum that equals the initial value of its output, even without include_self.
    return torch.stack([torch.randperm(rows) - rows // 2 + 0.5 for _ in range(_CHANNELS[0])], 1)


def _reduction(
    rows: Tensor, groups: Tensor, count: int, mode: PoolMode
) -> Callable[[Tensor], Tensor]:
    """Return the formula that reduces ``feats[rows]`` by group."""
    operation = {"max": "amax", "avg": "mean", "sum": "sum"}[mode]

    def formula(feats: Tensor) -> Tensor:
        index = groups[:, None].expand(-1, feats.shape[1])
        out = feats.new_zeros(count, feats.shape[1])
        return out.scatter_reduce(0, index, feats[rows], operation, include_self=False)

    return formula


def _brute_force(found: KernelMap) -> _Pairs:
    """List the pairs of a map from its geometry, without the engine."""
    sides = found.in_sites, found.out_sites
    fine_first = sides[::-1] if found.is_inverse else sides
    geometry = found.geometry
    boxes = [_box(side.grid) for side in fine_first]
    triples = reference.relation(
        fine_first[0].coords.cpu(), fine_first[1].coords.cpu(), geometry.kernel_size,
        geometry.stride, geometry.padding, geometry.dilation, transposed=geometry.transposed,
        submanifold=geometry.sites == "same", in_box=boxes[0], out_box=boxes[1],
    )  # fmt: skip
    rows, out_rows, taps = torch.tensor(triples).unbind(1)
    return _Pairs(out_rows, rows, taps) if found.is_inverse else _Pairs(rows, out_rows, taps)


def _box(grid: Grid) -> reference.Box:
    return reference.Box(grid.lower, grid.shape, grid.batch_size)
