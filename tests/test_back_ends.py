"""The same networks by every back end: numba and torch on a CPU, and Triton in the interpreter.

Code that only a GPU dispatches to runs here, from a layer of either adapter down to the launch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is not installed")

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tests._back_end import send_cpu_to_torch, send_cpu_to_triton
from tritonspconv.coords import ActiveSites
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import kernel_map
from tritonspconv.kernels.triton import conv_grads, gather_gemm, half_parts, neighbor_table
from tritonspconv.ops import sparse_conv
from tritonspconv.testing import random_sites

pytestmark = pytest.mark.interpreter
SUBM = ConvGeometry.submanifold((3, 3), (1, 1))


@pytest.fixture
def triton_on_cpu(monkeypatch) -> Callable:
    """Return a context in which tensors on a CPU go to Triton, or to the given back end."""
    if torch.cuda.is_available():
        pytest.skip("no need: a GPU takes this way in every test")

    @contextmanager
    def redirected(send: Callable = send_cpu_to_triton) -> Iterator[None]:
        with monkeypatch.context() as patch:
            send(patch)
            yield

    return redirected


def assert_alike(run: Callable[[], list[Tensor]], triton_on_cpu) -> None:
    """Check that ``run`` gives the same on every back end, up to the rounding of float32."""
    expected = run()
    for send in (send_cpu_to_triton, send_cpu_to_torch):
        with triton_on_cpu(send):
            found = run()
        assert len(found) == len(expected) > 0
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def trained(net: nn.Module, forward: Callable[[Tensor], Tensor], n: int, c: int) -> list[Tensor]:
    """Return output, gradients of input and parameters, and buffers, from equal numbers."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
        parameter.grad = None
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
    feats = torch.randn(n, c, requires_grad=True)
    out = forward(feats)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), feats.grad, *(p.grad for p in net.parameters()), *net.buffers()]


def test_engine_network(triton_on_cpu):
    down = ts.nn.SparseConv2d(5, 6, 2, 2)
    net = ts.nn.Sequential(
        ts.nn.SubMConv2d(3, 5, 3, bias=False), ts.nn.BatchNorm(5), ts.nn.ReLU(), down,
        ts.nn.ReLU(), ts.nn.SparseConvTranspose2d(6, 4, 3, 2), ts.nn.SubMConv2d(4, 3, 2),
    )  # fmt: skip
    coords = random_sites(30, 2, extent=6).coords

    def run() -> list[Tensor]:
        def forward(feats: Tensor) -> Tensor:
            return net(ts.SparseTensor(feats, coords, spatial_shape=(6, 6), batch_size=2)).feats

        return trained(net, forward, 30, 3)

    assert_alike(run, triton_on_cpu)


def test_evaluation_fuses_and_agrees(triton_on_cpu, monkeypatch):
    """Norm and ReLU are part of the launch on a GPU only."""
    net = ts.nn.Sequential(ts.nn.SubMConv2d(3, 5, 3), ts.nn.BatchNorm(5), ts.nn.ReLU()).eval()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    feats, sites = torch.randn(30, 3), random_sites(30, 2, extent=6)
    launched = []
    bind = gather_gemm._bind
    monkeypatch.setattr(
        gather_gemm, "_bind", lambda *problem: launched.append(problem) or bind(*problem)
    )
    with torch.no_grad():
        # Sites keep the maps of one back end.
        assert_alike(
            lambda: [net(ts.SparseTensor(feats, ActiveSites(sites.coords, sites.grid))).feats],
            triton_on_cpu,
        )
    (problem,) = launched
    names = dict(zip(bind.__wrapped__.__code__.co_varnames, problem, strict=False))
    assert names["relu"]
    assert names["norm"] is not None


def test_spconv_network(triton_on_cpu):
    net = spconv.SparseSequential(
        spconv.SubMConv2d(3, 4, 3, indice_key="a"), nn.BatchNorm1d(4), nn.ReLU(),
        spconv.SparseConv2d(4, 5, 3, 2, 1, indice_key="b"), nn.ReLU(),
        spconv.SparseInverseConv2d(5, 4, 3, indice_key="b"),
        spconv.SubMConv2d(4, 4, 3, indice_key="a"), spconv.SparseMaxPool2d(2, 2),
        spconv.SparseConvTranspose2d(4, 3, 2, 2), spconv.ToDense(),
    )  # fmt: skip
    coords = random_sites(30, 2, extent=6).coords

    def run() -> list[Tensor]:
        def forward(feats: Tensor) -> Tensor:
            return net(spconv.SparseConvTensor(feats, coords, [6, 6], 2))

        return trained(net, forward, 30, 3)

    assert_alike(run, triton_on_cpu)


@pytest.mark.parametrize("kind", ["SubMConv2d", "SparseConv2d"])
def test_spconv_rows_that_share_a_site(kind, triton_on_cpu):
    layer = getattr(spconv, kind)(3, 4, 3, padding=1)
    coords = random_sites(24, 2, extent=5, repeats=6).coords

    def run() -> list[Tensor]:
        def forward(feats: Tensor) -> Tensor:
            return layer(spconv.SparseConvTensor(feats, coords, [5, 5], 2)).features

        return trained(layer, forward, 24, 3)

    assert_alike(run, triton_on_cpu)


def test_minkowski_network(triton_on_cpu):
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = ME.MinkowskiConvolution(3, 4, kernel_size=3, dimension=2)
            self.norm = ME.MinkowskiBatchNorm(4)
            self.down = ME.MinkowskiConvolution(4, 5, kernel_size=2, stride=2, dimension=2)
            self.up = ME.MinkowskiConvolutionTranspose(5, 4, kernel_size=2, stride=2, dimension=2)
            self.grow = ME.MinkowskiGenerativeConvolutionTranspose(
                5, 4, kernel_size=3, stride=2, dimension=2
            )
            self.pool = ME.MinkowskiMaxPooling(kernel_size=2, stride=2, dimension=2)
            self.prune = ME.MinkowskiPruning()
            self.whole = ME.MinkowskiGlobalAvgPooling()

        def forward(self, x):
            x = ME.MinkowskiFunctional.relu(self.norm(self.stem(x)))
            low = self.down(x)
            grown = self.grow(low)
            kept = self.prune(grown, torch.arange(len(grown)) % 3 > 0)
            joined = ME.MinkowskiUnion()(self.up(low) + x, kept)
            return self.pool(joined).F, self.whole(joined).F

    net = Network()
    coords = random_sites(30, 2, extent=6, lower=-3, bounded=False).coords

    def run() -> list[Tensor]:
        def forward(feats: Tensor) -> Tensor:
            return torch.cat(net(ME.SparseTensor(feats, coordinates=coords)))

        return trained(net, forward, 30, 3)

    assert_alike(run, triton_on_cpu)


@pytest.mark.parametrize("repeats", [0, 4])
def test_lookups_are_told_that_rows_are_distinct_where_they_are(
    repeats, triton_on_cpu, monkeypatch
):
    told = []
    lookup = neighbor_table.lookup_table

    def recorded(*call, distinct, **how):
        told.append(distinct)
        return lookup(*call, distinct=distinct, **how)

    monkeypatch.setattr(neighbor_table, "lookup_table", recorded)
    sites = random_sites(30, 2, extent=6, repeats=repeats)
    with triton_on_cpu():
        kernel_map(sites, SUBM)
        asked = ActiveSites(sites.coords, sites.grid)
        assert asked.has_repeats() == (repeats > 0)
        kernel_map(asked, SUBM)
    # No one had searched for repeats before the first map.
    assert told == [False, repeats == 0]


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_float16_parts_serve_all_three_products(inverse, triton_on_cpu, monkeypatch):
    """Large float32 products split their operands, also for the weight's gradient."""
    kmap = ConvGeometry((3, 3), (2, 2), (1, 1), (1, 1))
    sites = random_sites(30, 2, extent=6)
    split, of_pairs = [], []
    monkeypatch.setattr(half_parts, "_MIN_WORK", 0)
    original, product = half_parts.split_half, conv_grads.weight_grad
    monkeypatch.setattr(
        half_parts, "split_half", lambda x, **how: split.append(x) or original(x, **how)
    )
    monkeypatch.setattr(
        conv_grads,
        "weight_grad",
        lambda *call, **how: of_pairs.append(call) or product(*call, **how),
    )

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        fresh = ActiveSites(sites.coords, sites.grid)
        made = kernel_map(fresh, kmap)
        made = made.inverse() if inverse else made
        feats = torch.randn(made.n_in, 5, requires_grad=True)
        weight = torch.randn(9, 5, 7, requires_grad=True)
        out = sparse_conv(feats, weight, made)
        return [out, *torch.autograd.grad(out.square().sum(), (feats, weight))]

    assert_alike(run, triton_on_cpu)
    # Two splits forward (features, weight) and three backward (gradient, features, matrices).
    assert len(split) == 5
    assert all(isinstance(operand, half_parts.HalfParts) for operand in of_pairs[0][:2])
