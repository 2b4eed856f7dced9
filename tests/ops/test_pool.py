"""Sparse pooling against brute force and dense layers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests._back_end import every_back_end
from tests._oracle import map_triples
from tests._strategies import Share, a_few, problems
from tritonspconv import reference
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import kernel_map
from tritonspconv.ops.pool import sparse_pool
from tritonspconv.testing import assert_close, block_sites, random_sites

MODES = {
    "max": {"mode": "max"},
    "max-all": {"mode": "max", "ties": "all"},
    "max-floor": {"mode": "max", "ties": "all", "floor": 0.0},
    "avg": {"mode": "avg"},
    "sum": {"mode": "sum"},
}
every_mode = pytest.mark.parametrize("how", MODES.values(), ids=MODES)

DOWN = ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))
CELLS = ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1), sites="cells")
SUBM = ConvGeometry.submanifold((3, 3, 3), (1, 1, 1))
UP = ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1), transposed=True)
KINDS = {"strided": DOWN, "cells": CELLS, "same": SUBM, "transposed": UP}


def check(kmap, c: int, how: dict, dtype=torch.float64, device="cpu") -> None:
    """Check output and gradient against the reference."""
    # Values are whole numbers, so ties are common and sums are exact.
    feats = torch.randint(-3, 3, (kmap.n_in, c)).double().requires_grad_()
    grad = torch.randint(-3, 4, (kmap.n_out, c)).double()
    expected = reference.pool(feats, map_triples(kmap), kmap.n_out, **how).reshape(kmap.n_out, c)
    (expected_grad,) = torch.autograd.grad(expected + 0 * feats.sum(), feats, grad)
    ours = feats.detach().to(device, dtype).requires_grad_()
    out = sparse_pool(ours, kmap, **how)
    (grad_ours,) = torch.autograd.grad(out, ours, grad.to(device, dtype))
    assert out.dtype == grad_ours.dtype == dtype
    assert_close(out, expected, name="out")
    assert_close(grad_ours, expected_grad, eager=expected_grad.to(dtype) * (1 + 1e-3), name="grad")


@every_mode
@pytest.mark.parametrize("geometry", KINDS.values(), ids=KINDS)
def test_matches_reference(geometry, how, device):
    sites = random_sites(90, extent=6, device=device, outside=3)
    check(kernel_map(sites, geometry), 5, how, device=device)


@every_mode
@pytest.mark.parametrize("geometry", [DOWN, SUBM], ids=["strided", "same"])
def test_inverse_map(geometry, how, device):
    sites = random_sites(90, extent=6, device=device)
    check(kernel_map(sites, geometry).inverse(), 3, how, device=device)


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(how, dtype, device):
    check(kernel_map(random_sites(90, extent=6, device=device), DOWN), 17, how, dtype, device)


@every_back_end
@pytest.mark.parametrize("kind", ["reached", "transposed", "cells", "reached, taps"])
def test_any_geometry(kind, device):
    share = Share()

    @a_few(20)
    @given(problem=problems((kind,), device), how=st.sampled_from(list(MODES.values())))
    def is_brute_force(problem, how):
        kmap = kernel_map(*problem)
        check(kmap, 2, how, device=device)
        share.note(map_triples(kmap))

    is_brute_force()
    share.check()


@every_mode
@pytest.mark.parametrize("geometry", [DOWN, SUBM], ids=["strided", "same"])
def test_layouts_of_features_and_gradients(geometry, how, device):
    """Features are stored by columns, with gaps, or as one row for all, so that all inputs tie."""
    kmap = kernel_map(random_sites(60, extent=6, device=device), geometry)
    feats = torch.randint(-2, 3, (60, 4)).double().to(device)
    grad = torch.randint(-3, 4, (kmap.n_out, 4)).double().to(device)
    gaps = torch.full((121, 9), torch.nan, dtype=torch.float64, device=device)[1::2, 1::2]
    views = {"columns": feats.T.contiguous().T, "gaps": gaps.copy_(feats)}
    views |= {"ties": feats[:1].expand(60, 4)}
    for name, view in views.items():
        expected = None
        for x in (view.contiguous(), view):
            leaf = x.detach().requires_grad_()
            out = sparse_pool(leaf, kmap, **how)
            for g in (grad, grad.T.contiguous().T):
                (found,) = torch.autograd.grad(out, leaf, g, retain_graph=True)
                expected = (out, found) if expected is None else expected
                assert torch.equal(out, expected[0]), name
                assert torch.equal(found, expected[1]), name
        exact = reference.pool(
            leaf.detach().cpu().requires_grad_(), map_triples(kmap), kmap.n_out, **how
        )
        torch.testing.assert_close(out.cpu(), exact)


@every_back_end
@every_mode
@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("c", [0, 1])
def test_few_rows_and_channels(n, c, how, device):
    check(kernel_map(random_sites(n, extent=6, device=device), DOWN), c, how, device=device)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize(("k", "s"), [(2, 2), (3, 2), (3, 1), (1, 2)])
def test_equals_dense(mode, ndim, k, s, device):
    """If every cell is active, the result is that of torch."""
    shape = (5, 6, 4)[:ndim]
    sites = block_sites(shape, 2)
    kmap = kernel_map(sites, ConvGeometry((k,) * ndim, (s,) * ndim, (0,) * ndim, (1,) * ndim))
    dense = torch.randn(2, 3, *shape, requires_grad=True)
    feats = dense.detach().movedim(1, -1).flatten(0, -2).requires_grad_()
    expected = getattr(F, f"{mode}_pool{ndim}d")(dense, k, s)
    out = sparse_pool(feats, kmap, mode)
    torch.testing.assert_close(out, expected.movedim(1, -1).flatten(0, -2))
    grad = torch.randn_like(expected)
    expected.backward(grad)
    out.backward(grad.movedim(1, -1).flatten(0, -2))
    torch.testing.assert_close(feats.grad, dense.grad.movedim(1, -1).flatten(0, -2))


@every_mode
def test_gradcheck(how):
    kmap = kernel_map(random_sites(30, extent=4), DOWN)
    # All values differ, and none is near the floor, because finite differences need one maximum.
    feats = (torch.randperm(60) - 30.5).double().reshape(30, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sparse_pool(x, kmap, **how), feats)


def test_runs_repeat_bit_by_bit(device):
    kmap = kernel_map(random_sites(500, extent=12, device=device), DOWN)
    feats = torch.randn(500, 7).to(device).requires_grad_()
    for how in MODES.values():
        outs = [sparse_pool(feats, kmap, **how) for _ in range(2)]
        grads = [torch.autograd.grad(out.square().sum(), feats)[0] for out in outs]
        assert torch.equal(*outs)
        assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "mean"}, ValueError, r"mode must be one of .*'max', 'avg', 'sum'.*got 'mean'"),
        ({"ties": "none"}, ValueError, "ties must be one of .*got 'none'"),
        ({"mode": "avg", "floor": 0.0}, ValueError, "floor bounds a maximum; got floor=0.0"),
        ({"feats": torch.ones(9, 2, dtype=torch.int32)}, TypeError, "floating point; got torch.in"),
        ({"feats": torch.ones(8, 2)}, ValueError, r"shape \[9, C\] .*got \[8, 2\]"),
        ({"feats": torch.ones(9)}, ValueError, r"shape \[9, C\] .*got \[9\]"),
        ({"feats": torch.ones(9, 2, device="meta")}, ValueError, "share a device; got meta"),
    ],
)
def test_refuses(change, error, message):
    kmap = kernel_map(random_sites(9), DOWN)
    with pytest.raises(error, match=message):
        sparse_pool(**({"feats": torch.ones(9, 2), "kernel_map": kmap} | change))
