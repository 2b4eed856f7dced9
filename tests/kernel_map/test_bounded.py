"""Rows padded to a capacity give the same results as the real rows alone, on every back end.

Padding features are NaN, so a result shows if one is read.
"""

import importlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritonspconv import ops
from tritonspconv.coords import ActiveSites
from tritonspconv.coords.row_tensor import RowBounds
from tritonspconv.coords.site_plan import Report, SitePlan
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import KernelMap, kernel_map
from tritonspconv.ops import TrainingNorm
from tritonspconv.testing import random_sites

GEOMETRIES = {
    "subm": ConvGeometry.submanifold((3, 3, 3), (1, 1, 1)),
    "subm-even": ConvGeometry.submanifold((2, 4, 3), (1, 1, 1)),
    "subm-5x5x5": ConvGeometry.submanifold((5, 5, 5), (1, 1, 1)),
    "subm-2d": ConvGeometry.submanifold((3, 3), (1, 2)),
    "down-3": ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "down-2": ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1)),
    "up-3": ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), transposed=True),
    "cells": ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), sites="cells"),
}


@pytest.fixture
def triton_back_end(triton_device, monkeypatch) -> torch.device:
    """Have every face choose Triton, also in the interpreter; tables are put in order early."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if triton_device.type == "cpu":
        importlib.import_module("tests._back_end").send_cpu_to_triton(monkeypatch)
    column_order = importlib.import_module("tritonspconv.kernels.triton._column_order")
    monkeypatch.setattr(column_order, "MIN_ROWS_TO_ORDER", 40)
    order_columns = importlib.import_module("tritonspconv.kernels.order_columns")
    monkeypatch.setattr(order_columns, "_MIN_WORK", 2000)
    return triton_device


def padded(rows: Tensor, capacity: int, value: float) -> Tensor:
    missing = torch.full((capacity - len(rows), *rows.shape[1:]), value, dtype=rows.dtype)
    return torch.cat([rows, missing.to(rows.device)])


def bounded_copy(sites: ActiveSites, capacity: int, levels: list[int]) -> ActiveSites:
    """The same sites with padding behind them, in a run whose levels have these capacities."""
    coords = padded(sites.coords, capacity, 0)
    coords[len(sites.coords) :, 0] = -1
    plan = SitePlan(levels, sites.device)
    count = torch.tensor(len(sites.coords), device=sites.device)
    return ActiveSites(coords, sites.grid, bounds=RowBounds(count, plan))


def check_equal(got: Tensor, expected: Tensor, *, exact: bool = True) -> None:
    """The real rows are equal, and padding is zero."""
    n = len(expected)
    if exact:
        assert torch.equal(got[:n], expected)
    else:
        torch.testing.assert_close(got[:n], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(got[n:], torch.zeros_like(got[n:]))


def check_conv(
    plain: KernelMap, bounded: KernelMap, *, exact: bool, norms: tuple[bool, ...]
) -> None:
    """Forward and every gradient, with and without batch norm in training."""
    device, taps = plain.out_sites.device, plain.kernel_volume
    generator = torch.Generator().manual_seed(plain.n_in)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, w, b = draw(plain.n_in, 3), draw(taps, 3, 5), draw(5)
    g = draw(plain.n_out, 5)
    for with_norm in norms:
        if with_norm and plain.n_out < 2:
            continue
        results = []
        for kmap, values, grad in (
            (plain, x, g),
            (bounded, padded(x, bounded.n_in, float("nan")), padded(g, bounded.n_out, 1e3)),
        ):
            leaves = [t.clone().requires_grad_() for t in (values, w, b)]
            norm = None
            if with_norm:
                mean, var = torch.zeros(5, device=device), torch.ones(5, device=device)
                leaves += [torch.ones(5, device=device).requires_grad_()]
                norm = TrainingNorm(mean, var, leaves[3])
            out = ops.sparse_conv(*leaves[:2], kmap, leaves[2], norm=norm, relu=with_norm)
            out.backward(grad)
            stats = () if norm is None else (norm.running_mean, norm.running_var)
            results.append((out.detach(), *(leaf.grad for leaf in leaves), *stats))
        (out, dx, *parameters), (out_b, dx_b, *parameters_b) = results
        check_equal(out_b, out, exact=exact and not with_norm)
        check_equal(dx_b, dx, exact=exact and not with_norm)
        for ours, expected in zip(parameters_b, parameters, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def check_pool(plain: KernelMap, bounded: KernelMap) -> None:
    x = torch.randn(plain.n_in, 3).to(plain.out_sites.device)
    for mode, options in (
        ("max", {}), ("max", {"floor": 0.5}), ("max", {"ties": "all"}), ("avg", {}), ("sum", {}),
    ):  # fmt: skip
        ours = padded(x, bounded.n_in, float("nan")).requires_grad_()
        theirs = x.clone().requires_grad_()
        got = ops.sparse_pool(ours, bounded, mode, **options)
        expected = ops.sparse_pool(theirs, plain, mode, **options)
        check_equal(got, expected)
        weights = torch.arange(3, device=x.device) + 1.0
        (got * weights).sum().backward()
        (expected * weights).sum().backward()
        check_equal(ours.grad, theirs.grad)


def check_all(
    geometry: ConvGeometry,
    sites: ActiveSites,
    spare: int,
    *,
    exact: bool,
    norms: tuple[bool, ...] = (False, True),
) -> None:
    """Compare maps of padded sites with those of the sites themselves, and layers over them."""
    plain = kernel_map(sites, geometry)
    bounded_sites = bounded_copy(sites, sites.num_rows + spare, [plain.n_out + spare])
    bounded = kernel_map(bounded_sites, geometry)
    out = bounded.out_sites
    assert torch.equal(out.coords[: plain.n_out], plain.out_sites.coords)
    assert (out.coords[plain.n_out :, 0] == -1).all()
    assert int(out.count) == plain.n_out
    assert bounded_sites.bounds.plan.flags.sum() == 0
    check_conv(plain, bounded, exact=exact, norms=norms)
    check_conv(plain.inverse(), bounded.inverse(), exact=exact, norms=norms)
    check_pool(plain, bounded)
    ours, theirs = bounded.pairs(), plain.pairs()
    assert torch.equal(ours[2], theirs[2])
    dense_in = padded(torch.ones(sites.num_rows, 1, device=sites.device), bounded.n_in, 9.0)
    assert torch.equal(
        ops.to_dense(dense_in, bounded_sites), ops.to_dense(dense_in[: sites.num_rows], sites)
    )


@pytest.mark.parametrize("spare", [0, 1, 70])
@pytest.mark.parametrize("n", [0, 1, 90])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_torch(geometry: ConvGeometry, n: int, spare: int) -> None:
    extent = 6 if geometry.ndim > 2 else 15
    sites = random_sites(n, geometry.ndim, extent=extent, repeats=n // 10, outside=n // 12)
    check_all(geometry, sites, spare, exact=geometry.sites != "same")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "n", "spare"),
    [
        *((name, 30, 35) for name in ("subm", "subm-even", "down-3", "down-2")),
        # Both tables are put in order: the interpreter's products differ in bits by order.
        ("up-3", 12, 10),
        ("subm-2d", 0, 3),
        ("down-2", 1, 0),
    ],
)
def test_triton(triton_back_end, name: str, n: int, spare: int) -> None:
    geometry = GEOMETRIES[name]
    extent = 3 if geometry.transposed else 5 if geometry.ndim > 2 else 9
    sites = random_sites(
        n, geometry.ndim, extent=extent, repeats=n // 10, outside=n // 12, device=triton_back_end
    )
    check_all(geometry, sites, spare, exact=True, norms=(name == "subm",))


@pytest.mark.interpreter
def test_many_pairs_are_listed_by_blocks(triton_back_end, monkeypatch) -> None:
    pairs = importlib.import_module("tritonspconv.kernels.triton.pairs")
    monkeypatch.setattr(pairs, "_MAX_COUNTED", 10)
    sites = random_sites(30, 3, extent=5, device=triton_back_end)
    check_all(GEOMETRIES["down-3"], sites, 40, exact=True, norms=())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 60),
    spare=st.integers(0, 40),
    extent=st.integers(3, 6),
    seed=st.integers(0, 1000),
    geometry=st.sampled_from(sorted(GEOMETRIES)),
)
def test_any_number_of_rows_and_of_padding(n, spare, extent, seed, geometry) -> None:
    torch.manual_seed(seed)
    found = GEOMETRIES[geometry]
    n = min(n, extent**found.ndim)
    sites = random_sites(n, found.ndim, extent=extent)
    check_all(found, sites, spare, exact=found.sites != "same")


class TestOverflow:
    def check(self, device: torch.device) -> None:
        geometry = GEOMETRIES["down-3"]
        sites = random_sites(120, 3, extent=9, device=device)
        plain = kernel_map(sites, geometry)
        capacity = plain.n_out // 2
        bounded_sites = bounded_copy(sites, 130, [capacity])
        bounded = kernel_map(bounded_sites, geometry)
        flags = bounded_sites.bounds.plan.flags
        assert flags.tolist() == [0] * len(Report) + [1]
        assert int(bounded.out_sites.count) == capacity
        # The rows that fit are a map of their own; nothing is read or written out of bounds.
        x = padded(torch.ones(120, 2, device=device), 130, float("nan")).requires_grad_()
        out = ops.sparse_conv(x, torch.ones(27, 2, 2, device=device), bounded)
        assert out.shape == (capacity, 2)
        assert out.isfinite().all()
        out.sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()

    def test_torch(self) -> None:
        self.check(torch.device("cpu"))

    @pytest.mark.interpreter
    def test_triton(self, triton_back_end) -> None:
        self.check(triton_back_end)


def test_more_levels_than_the_plan_has() -> None:
    sites = bounded_copy(random_sites(20, 3, extent=6), 30, [])
    with pytest.raises(RuntimeError, match="more than 0 sets of output sites"):
        kernel_map(sites, GEOMETRIES["down-2"])
