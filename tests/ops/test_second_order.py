"""Gradients of gradients: a gradient penalty trains every weight that it depends on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tests._back_end import every_back_end
from tritonspconv import ops
from tritonspconv.ops import TrainingNorm

EXTENT = 4


def sites(rows: int = 14, device: torch.device | str = "cpu") -> ts.ActiveSites:
    cells = torch.randperm(2 * EXTENT**2)[:rows].sort().values
    axes = [cells // EXTENT**2, cells // EXTENT % EXTENT, cells % EXTENT]
    coords = torch.stack(axes, 1).int().to(device)
    return ts.ActiveSites(coords, ts.Grid((0, 0), (EXTENT, EXTENT), 2))


GEOMETRIES = {
    "submanifold": ts.ConvGeometry.submanifold((3, 3), (1, 1)),
    "even window": ts.ConvGeometry((2, 2), (1, 1), (0, 0), (1, 1), sites="same"),
    "strided": ts.ConvGeometry((3, 3), (2, 2), (1, 1), (1, 1)),
    "disjoint": ts.ConvGeometry((2, 2), (2, 2), (0, 0), (1, 1)),
    "transposed": ts.ConvGeometry((2, 2), (2, 2), (0, 0), (1, 1), transposed=True),
}
MAPS = [*GEOMETRIES, "inverse"]


def map_of(kind: str, device: torch.device | str = "cpu") -> ts.KernelMap:
    if kind == "inverse":
        return ts.kernel_map(sites(device=device), GEOMETRIES["strided"]).inverse()
    return ts.kernel_map(sites(device=device), GEOMETRIES[kind])


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("layout", ["VIO", "OVI"])
@pytest.mark.parametrize("kind", MAPS)
def test_convolution(kind: str, layout: ops.conv.WeightLayout) -> None:
    found = map_of(kind)
    volume = found.kernel_volume
    weight = double(volume, 2, 3) if layout == "VIO" else double(3, volume, 2)

    def run(feats: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.sparse_conv(feats, weight, found, bias, weight_layout=layout)

    inputs = (double(found.n_in, 2), weight, double(3))
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


def test_third_derivatives_of_a_convolution() -> None:
    found = map_of("submanifold")
    feats, weight = double(found.n_in, 2), double(9, 2, 2)

    def slope(feats: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        out = ops.sparse_conv(feats, weight, found).pow(3).sum()
        return torch.autograd.grad(out, (feats, weight), create_graph=True)

    assert gradgradcheck(slope, (feats, weight))


POOLS = [("max", "first"), ("max", "all"), ("avg", "first"), ("sum", "first")]


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize(("mode", "ties"), POOLS)
def test_pool(mode: ops.pool.PoolMode, ties: ops.pool.TieRule, kind: str) -> None:
    found = map_of(kind)
    assert gradgradcheck(
        lambda feats: ops.sparse_pool(feats, found, mode, ties=ties).pow(2), double(found.n_in, 2)
    )


def test_tied_maxima_share_the_gradient_of_the_gradient() -> None:
    found = map_of("strided")
    feats = torch.ones(found.n_in, 1, dtype=torch.float64, requires_grad=True)
    seed = double(found.n_out, 1)
    out = ops.sparse_pool(feats, found, ties="all")
    (grad,) = torch.autograd.grad(out, feats, seed, create_graph=True)
    weight = torch.randn_like(grad)
    (found_grad,) = torch.autograd.grad(grad, seed, weight)
    # The map is linear: every pair takes part.
    expected = torch.zeros_like(seed).index_add(0, *_pairs(found, weight))
    torch.testing.assert_close(found_grad, expected)


def _pairs(found: ts.KernelMap, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, others, _ = found.pairs()
    return others.long(), weight[rows.long()]


@pytest.mark.parametrize("mode", ["max", "avg", "sum"])
def test_global_pool(mode: ops.pool.PoolMode) -> None:
    index = torch.tensor([0, 0, 1, 1, 1, 3])
    assert gradgradcheck(lambda f: ops.global_pool(f, index, 4, mode).pow(2), double(6, 2))


def test_other_operations() -> None:
    found = map_of("strided")
    index = torch.tensor([0, 0, 1, 1, 1, 3])
    rows, weights = torch.randint(-1, 6, (5, 2)), torch.rand(5, 2, dtype=torch.float64)
    where = sites(6)
    points = torch.rand(6, 2, dtype=torch.float64)
    for run, inputs in (
        (
            lambda f, w: ops.sparse_channelwise_conv(f, w, found),
            (double(found.n_in, 2), double(9, 2)),
        ),
        (lambda v: ops.global_broadcast(v, index).pow(2), (double(4, 2),)),
        (lambda f: ops.gather_weighted(f, rows, weights).pow(2), (double(6, 2),)),
        (lambda f: ops.scatter_weighted(f, rows, weights, 7).pow(2), (double(5, 2),)),
        (lambda f: ops.to_dense(f, where).pow(2), (double(6, 2),)),
        (
            lambda f: ops.voxelize(torch.cat([points, f], 1), (0.5, 0.5), (0, 0, 1, 1)).feats ** 2,
            (double(6, 2),),
        ),
    ):
        assert gradgradcheck(run, inputs)


@every_back_end
@pytest.mark.parametrize("kind", ["submanifold", "inverse"])
def test_penalties_by_every_back_end(kind: str, device: torch.device) -> None:
    """Compare with products that torch differentiates, in float64 on a CPU."""
    found = map_of(kind, device)
    rows, others, tap_ptr = (part.cpu().long() for part in found.pairs())
    taps = torch.arange(found.kernel_volume).repeat_interleave(tap_ptr.diff())
    feats = torch.randn(found.n_in, 16, requires_grad=True)
    weight = torch.randn(found.kernel_volume, 16, 8, requires_grad=True)

    def layer() -> Tensor:
        return ops.sparse_conv(feats.to(device), weight.to(device), found).cpu()

    def products() -> Tensor:
        made = torch.bmm(feats.double()[rows, None], weight.double()[taps])[:, 0]
        return made.new_zeros(found.n_out, 8).index_add(0, others, made)

    grads = [_penalty_grads(run, [feats, weight]) for run in (layer, products)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@every_back_end
@pytest.mark.parametrize(("mode", "ties"), POOLS)
def test_pools_by_every_back_end(
    mode: ops.pool.PoolMode, ties: ops.pool.TieRule, device: torch.device
) -> None:
    """The gradient is a linear map of the gradient that comes in, so it has a transpose."""
    found = map_of("strided", device)
    feats = torch.randn(found.n_in, 3).round(decimals=1).to(device).requires_grad_()
    seed = torch.randn(found.n_out, 3).to(device).requires_grad_()
    weight = torch.randn(found.n_in, 3).to(device)
    out = ops.sparse_pool(feats, found, mode, ties=ties)
    (grad,) = torch.autograd.grad(out, feats, seed, create_graph=True)
    (transposed,) = torch.autograd.grad(grad, seed, weight)
    torch.testing.assert_close((transposed * seed).sum(), (grad * weight).sum())
    assert transposed.abs().sum() > 0


@every_back_end
@pytest.mark.parametrize(("has_residual", "relu"), [(False, True), (True, False), (True, True)])
def test_batch_norm_in_the_node(has_residual: bool, relu: bool, device: torch.device) -> None:
    found = map_of("submanifold", device)
    inputs = {
        "feats": torch.randn(found.n_in, 2),
        "weight": torch.randn(9, 2, 3),
        "scale": torch.rand(3) + 0.5,
        "shift": torch.randn(3),
        "residual": torch.randn(found.n_out, 3),
    }
    inputs = {name: value.to(device).requires_grad_() for name, value in inputs.items()}
    feats, weight, scale, shift, residual = inputs.values()
    added = residual if has_residual else None

    def node() -> Tensor:
        statistics = torch.zeros(3, device=device), torch.ones(3, device=device)
        norm = TrainingNorm(*statistics, scale, shift)
        return ops.sparse_conv(feats, weight, found, norm=norm, residual=added, relu=relu)

    def apart() -> Tensor:
        out = ops.sparse_conv(feats, weight, found)
        out = F.batch_norm(out, None, None, scale, shift, True)
        out = out if added is None else out + added
        return out.relu() if relu else out

    leaves = [value for name, value in inputs.items() if has_residual or name != "residual"]
    grads = _penalty_grads(node, leaves), _penalty_grads(apart, leaves)
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def _penalty_grads(run: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Return the gradients of a loss that holds the norm of the gradient of the first leaf."""
    (slope,) = torch.autograd.grad(run().pow(2).sum(), leaves[0], create_graph=True)
    loss = slope.pow(2).sum() + run().pow(3).sum()
    return list(torch.autograd.grad(loss, leaves))


def test_a_gradient_penalty_equals_that_of_a_dense_network() -> None:
    """A loss is the norm of ``autograd.grad(net(x).sum(), x)``, as in gradient penalties."""
    sparse = ts.nn.SubMConv2d(2, 3, 3, dtype=torch.float64)
    coords = torch.cartesian_prod(torch.arange(1), torch.arange(5), torch.arange(5)).int()
    x = ts.SparseTensor(double(25, 2), coords, spatial_shape=(5, 5), batch_size=1)

    def dense(feats: Tensor, weight: Tensor) -> Tensor:
        image = feats.T.reshape(1, 2, 5, 5)
        return F.conv2d(image, weight.permute(2, 1, 0).reshape(3, 2, 3, 3), padding=1)

    grads = []
    for out in (sparse(x).feats, dense(x.feats, sparse.weight)):
        # The incoming gradient requires no gradient; in this case the weight's share was once lost.
        (slope,) = torch.autograd.grad(out.sum(), x.feats, create_graph=True)
        grads.append(torch.autograd.grad(slope.pow(2).sum(), sparse.weight)[0])
    assert grads[0].abs().sum() > 1
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("library", ["tritonspconv", "compat.spconv", "compat.minkowski"])
def test_a_penalty_trains_every_layer_of_a_network(library: str) -> None:
    where = sites()
    feats = double(where.num_rows, 2)
    if library == "tritonspconv":
        net = nn.Sequential(
            ts.nn.SubMConv2d(2, 4, 3), ts.nn.SiLU(), ts.nn.MaxPool2d(2, ties="all"),
            ts.nn.SparseConv2d(4, 4, 3, 1, 1), ts.nn.SiLU(), ts.nn.GlobalAvgPool(),
        )  # fmt: skip
        x = ts.SparseTensor(feats, where)
    elif library == "compat.spconv":
        net = spconv.SparseSequential(
            spconv.SubMConv2d(2, 4, 3), nn.SiLU(), spconv.SparseMaxPool2d(2),
            spconv.SparseConv2d(4, 4, 3, 1, 1), nn.SiLU(), spconv.SubMConv2d(4, 4, 1),
            nn.SiLU(), spconv.ToDense(),
        )  # fmt: skip
        x = spconv.SparseConvTensor(feats, where.coords, [EXTENT] * 2, 2)
    else:
        net = nn.Sequential(
            ME.MinkowskiConvolution(2, 4, 3, dimension=2), ME.MinkowskiSiLU(),
            ME.MinkowskiMaxPooling(2, 2, dimension=2), ME.MinkowskiChannelwiseConvolution(
                4, 3, dimension=2
            ), ME.MinkowskiConvolution(4, 4, 1, dimension=2), ME.MinkowskiSiLU(),
            ME.MinkowskiGlobalPooling(), ME.MinkowskiToFeature(),
        )  # fmt: skip
        x = ME.SparseTensor(feats, where.coords)
        feats = x.F
    net = net.double()
    (slope,) = torch.autograd.grad(net(x).pow(2).sum(), feats, create_graph=True)
    slope.pow(2).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("library", ["compat.spconv", "compat.minkowski"])
def test_a_penalty_under_autocast(library: str, window: int) -> None:
    """Layers multiply in bfloat16 while weights stay float32; a 1x1 layer has its own operation."""
    where = sites()
    feats = torch.randn(where.num_rows, 2, requires_grad=True)
    if library == "compat.spconv":
        layer = spconv.SubMConv2d(2, 4, window)
        x = spconv.SparseConvTensor(feats.bfloat16(), where.coords, [EXTENT] * 2, 2)
        refused = spconv.SparseConvTensor(feats, where.coords, [EXTENT] * 2, 2)
    else:
        layer = ME.MinkowskiConvolution(2, 4, window, dimension=2)
        x = ME.SparseTensor(feats.bfloat16(), where.coords)
        refused = ME.SparseTensor(feats, where.coords)
    weight = next(layer.parameters())

    def penalty(x: object, autocast: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(x)
        out = out.features if library == "compat.spconv" else out.F
        (slope,) = torch.autograd.grad(out.float().sum(), feats, create_graph=True)
        return torch.autograd.grad(slope.pow(2).sum(), weight)[0]

    found, expected = penalty(x, True), penalty(refused, False)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    with pytest.raises(RuntimeError, match="Convert them before the layer"):
        penalty(refused, True)


def test_features_that_the_layer_converts_are_refused() -> None:
    found = map_of("submanifold")
    feats = torch.randn(found.n_in, 2, requires_grad=True)
    out = ops.sparse_conv(feats, double(9, 2, 3), found)
    with pytest.raises(RuntimeError, match=r"needs contiguous features of torch\.float64.*x\.rep"):
        torch.autograd.grad(out.sum(), feats, create_graph=True)
    out = ops.sparse_conv(feats.double(), double(9, 2, 3), found)
    (slope,) = torch.autograd.grad(out.sum(), feats, create_graph=True)
    assert slope.requires_grad
