"""Batch norm of training against torch's in float64, and against the eager twin."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from tests.conftest import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")

from tritonspconv.kernels.channel_norm import TrainingNorm
from tritonspconv.kernels.eager import batch_norm as eager
from tritonspconv.kernels.triton import batch_norm as triton

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Rows below, at and beyond a tile, and several tiles.
SHAPES = [(2, 1), (3, 5), (127, 33), (256, 16), (257, 3), (700, 64), (1100, 70)]
HOW = [
    pytest.param(dtype, relu, added, id=f"{dtype}{'-relu' * relu}{'-residual' * added}")
    for dtype, relu, added in itertools.product(TOLERANCE, (False, True), (False, True))
]


def assert_near(got, expected, tolerance, size=0.0):
    """Compare norms; ``size`` is the size of the terms whose sum is ``expected``."""
    error = (got.double() - expected).norm() / expected.norm().clamp_min(max(size, 1e-30))
    assert error <= tolerance


def given(n, c, dtype, device, affine=True):
    feats = (torch.randn(n, c) * (torch.rand(c) + 0.5) + torch.randn(c)).to(dtype).to(device)
    vectors = [torch.randn(c, device=device) for _ in range(2)] if affine else [None, None]
    running = [torch.randn(c, device=device), torch.rand(c, device=device) + 0.5]
    return feats, vectors, running


def exact(feats, vectors, running, grad, relu, residual=None, momentum=0.3, eps=1e-3):
    """Return torch's float64 output and gradients; a ReLU passes where the rounded output does."""
    x, weight, bias = (
        None if t is None else t.cpu().double().requires_grad_() for t in (feats, *vectors)
    )
    mean, var = (t.cpu().double() for t in running)
    out = F.batch_norm(x, mean, var, weight, bias, True, momentum, eps)
    out = out if residual is None else out + residual.cpu().double()
    grad = grad.cpu().double()
    if relu:
        passed = out.detach().to(feats.dtype) > 0
        out, grad = out * passed, grad * passed
    out.backward(grad)
    grads = [None if t is None else t.grad for t in (x, weight, bias)]
    return out.detach(), mean, var, [*grads, grad]


@pytest.mark.parametrize(("dtype", "relu", "added"), HOW)
@pytest.mark.parametrize(("n", "c"), SHAPES)
def test_it_is_torch_in_float64(triton_device, n, c, dtype, relu, added):
    check_against_torch(triton_device, n, c, dtype, relu, added)


# The interpreter needs ten seconds for each.
@pytest.mark.parametrize(("dtype", "relu", "added"), HOW[3:5] if INTERPRETED else HOW)
def test_strips_of_several_tiles(triton_device, dtype, relu, added):
    check_against_torch(triton_device, 70_001, 1, dtype, relu, added)


def check_against_torch(triton_device, n, c, dtype, relu, added):
    feats, vectors, running = given(n, c, dtype, triton_device)
    grad = torch.randn(n, c).to(dtype).to(triton_device)
    residual = torch.randn(n, c).to(dtype).to(triton_device) if added else None
    expected, mean, var, grads = exact(feats, vectors, running, grad, relu, residual)
    count = torch.tensor(6, device=triton_device)
    norm = TrainingNorm(*running, *vectors, count, 0.3, 1e-3)
    out, stats = triton.batch_norm(feats, norm, relu, residual)
    assert (out.dtype, out.shape, int(count)) == (dtype, feats.shape, 7)
    tolerance = TOLERANCE[dtype]
    assert_near(out.cpu(), expected, tolerance, n**0.5 * max(float(v.norm()) for v in vectors))
    for got, wanted in zip(running, (mean, var), strict=True):
        assert_near(got.cpu(), wanted, 2e-6, float(feats.abs().max()))
    clamped = out if relu and added else None
    *got, grad_residual = triton.batch_norm_grad(grad, feats, stats, *vectors, relu, clamped)
    assert got[0].dtype == dtype
    if added:
        # Rounding decides whether tiny sums pass the ReLU, so entries near zero may differ.
        near = expected.abs() < 1e-5 * expected.abs().max()
        assert torch.equal(grad_residual.cpu().double()[~near], grads.pop()[~near])
    else:
        grads.pop()
    # Two rows always become one and minus one, so their gradient is rounding alone.
    if n > 2:
        assert_near(got[0].cpu(), grads[0], 2 * tolerance)
    for one, wanted in zip(got[1:], grads[1:], strict=True):
        scale = grad.double().norm().cpu() * n**0.5 / max(c, 1) ** 0.5
        assert (one.cpu().double() - wanted).norm() <= 2e-6 * max(scale, wanted.norm())


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
def test_without_factors_and_count(triton_device, relu):
    feats, vectors, running = given(300, 7, torch.float32, triton_device, affine=False)
    grad = torch.randn(300, 7).to(triton_device)
    expected, _, _, grads = exact(feats, vectors, running, grad, relu)
    out, stats = triton.batch_norm(feats, TrainingNorm(*running, momentum=0.3, eps=1e-3), relu)
    assert_near(out.cpu(), expected, 2e-6)
    assert_near(
        triton.batch_norm_grad(grad, feats, stats, None, None, relu)[0].cpu(), grads[0], 4e-6
    )


@pytest.mark.parametrize("added", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_twins_agree(triton_device, dtype, added):
    feats, vectors, running = given(900, 20, dtype, triton_device)
    grad = torch.randn(900, 20).to(dtype).to(triton_device)
    residual = torch.randn(900, 20).to(dtype).to(triton_device) if added else None
    results = []
    for twin in (triton, eager):
        state = [t.clone() for t in running]
        count = torch.tensor(0, device=triton_device)
        out, stats = twin.batch_norm(feats, TrainingNorm(*state, *vectors, count), True, residual)
        grads = twin.batch_norm_grad(
            grad, feats, stats, *vectors, True, out if added else None
        )  # fmt: skip
        results.append((out, stats, *grads[: 4 if added else 3], *state, count))
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        assert_near(got, expected.double(), TOLERANCE[dtype])


def test_a_large_mean_costs_no_digits(triton_device):
    """A formula with the sum of squares would lose the variance to rounding."""
    feats = (torch.randn(5000, 4) * 0.01 + 300).to(triton_device)
    running = [torch.zeros(4, device=triton_device), torch.ones(4, device=triton_device)]
    _, stats = triton.batch_norm(feats, TrainingNorm(*running, momentum=1.0, eps=0.0), False)
    x = feats.cpu().double()
    assert_near(stats[0].cpu(), x.mean(0), 3e-7)
    assert_near(1 / stats[1].cpu().square(), x.var(0, correction=0), 1e-3)


def test_equal_rows_and_nan(triton_device):
    feats = torch.full((600, 3), 2.5, device=triton_device)
    feats[7, 1] = torch.nan
    bias = torch.tensor([1.0, 1.0, -1.0], device=triton_device)
    running = [torch.zeros(3, device=triton_device), torch.ones(3, device=triton_device)]
    out, _ = triton.batch_norm(feats, TrainingNorm(*running, bias=bias), True)
    assert (out[:, 0] == 1).all()
    assert out[:, 1].isnan().all()
    assert (out[:, 2] == 0).all()


def test_the_same_bits_twice(triton_device):
    feats, vectors, running = given(1000, 40, torch.float16, triton_device)
    grad = torch.randn(1000, 40).half().to(triton_device)
    first, second = (
        (out, stats, *triton.batch_norm_grad(grad, feats, stats, *vectors, True))
        for out, stats in (
            triton.batch_norm(feats, TrainingNorm(*(t.clone() for t in running), *vectors), True)
            for _ in range(2)
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
