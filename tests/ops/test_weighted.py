"""Weighted gathers and scatters of rows against the reference."""

import pytest
import torch

from tritonspconv import ops, reference


def made(n=6, m=9, k=4, channels=3):
    feats = torch.randn(n, channels, dtype=torch.float64, requires_grad=True)
    rows = torch.randint(-1, n, (m, k))
    return feats, rows, torch.rand(m, k, dtype=torch.float64)


def test_gather_is_the_reference(device):
    feats, rows, weights = made()
    out = ops.gather_weighted(feats.to(device), rows.to(device), weights.to(device))
    torch.testing.assert_close(out.cpu(), reference.gather_weighted(feats, rows, weights))


def test_scatter_is_the_transpose_of_the_reference(device):
    feats, rows, weights = made()
    spread = torch.randn(9, 3, dtype=torch.float64)
    gathered = reference.gather_weighted(feats, rows, weights)
    (expected,) = torch.autograd.grad(gathered, feats, spread)
    out = ops.scatter_weighted(spread.to(device), rows.to(device), weights.to(device), 6)
    torch.testing.assert_close(out.cpu(), expected)


def test_gradcheck_twice():
    feats, rows, weights = made(3, 4, 2, 2)
    spread = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda f: ops.gather_weighted(f, rows, weights), (feats,))
        assert check(lambda f: ops.scatter_weighted(f, rows, weights, 3), (spread,))


def test_half_precision_accumulates_in_float32(device):
    feats, rows, weights = made()
    feats, rows, weights = feats.detach().half().to(device), rows.to(device), weights.to(device)
    out = ops.gather_weighted(feats, rows, weights.half())
    exact = ops.gather_weighted(feats.double(), rows, weights.half().double())
    torch.testing.assert_close(out, exact.half())


def test_no_rows(device):
    nothing = torch.zeros(0, 3, device=device)
    rows = torch.full((2, 4), -1, device=device)
    weights = torch.ones(2, 4, device=device)
    assert ops.gather_weighted(nothing, rows, weights).tolist() == [[0.0] * 3] * 2
    assert ops.scatter_weighted(nothing, rows[:0], weights[:0], 2).tolist() == [[0.0] * 3] * 2


def test_errors():
    feats, rows, weights = made()
    with pytest.raises(ValueError, match=r"rows and weights \[M, K\]; got \[6, 3\], \[9, 4\] and"):
        ops.gather_weighted(feats, rows, weights[:, 1:])
    with pytest.raises(ValueError, match="feats and rows must have one row each per item"):
        ops.scatter_weighted(feats, rows, weights, 6)
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        ops.gather_weighted(feats, rows.to("meta"), weights)
