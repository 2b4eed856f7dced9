"""Batch norm of training as one node: torch's batch norm, addition and ReLU."""

import pytest
import torch
from torch.nn import functional as F

from tritonspconv.ops import TrainingNorm
from tritonspconv.ops.batch_norm import takes_training_norm, train_norm
from tritonspconv.ops.bounded_norm import batch_norm
from tritonspconv.testing import assert_close

CHANNELS = 5


def leaves(device, dtype, rows=40, seed=0):
    """Return feats, weight, bias and residual; each asks for its gradient."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(*shape, generator=generator)
        for shape in ((rows, CHANNELS), (CHANNELS,), (CHANNELS,), (rows, CHANNELS))
    ]
    kinds = (dtype, torch.float32, torch.float32, dtype)
    return [
        value.to(device, kind).requires_grad_() for value, kind in zip(made, kinds, strict=True)
    ]


def running(device):
    return torch.zeros(CHANNELS, device=device), torch.ones(CHANNELS, device=device)


def apart(feats, weight, bias, residual, relu):
    """Return torch's result."""
    out = F.batch_norm(feats, None, None, weight, bias, True)
    out = out if residual is None else out + residual
    return out.relu() if relu else out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("added", [False, True], ids=["", "residual"])
def test_it_is_torch(device, dtype, relu, added):
    feats, weight, bias, residual = given = leaves(device, dtype)
    exact = [value.detach().cpu().double().requires_grad_() for value in given]
    if not added:
        given, exact, residual = given[:3], exact[:3], None
    out = train_norm(
        feats, TrainingNorm(*running(device), weight, bias), residual=residual, relu=relu
    )
    eager = apart(*given[:3], residual, relu)
    reference = apart(*exact[:3], exact[3] if added else None, relu)
    assert_close(out, reference, eager=eager)
    seed = torch.linspace(-1, 1, out.numel()).view_as(out)
    got = torch.autograd.grad(out, given, seed.to(out))
    lower = torch.autograd.grad(eager, given, seed.to(out))
    # A ReLU passes where the rounded output does.
    wanted = torch.autograd.grad(reference, exact, seed.to(dtype).double())
    for one, other, value in zip(got, lower, wanted, strict=True):
        assert one.dtype == other.dtype
        assert_close(one, value, eager=other)


def test_running_statistics_move_as_torch_s(device):
    feats, weight, bias, _ = leaves(device, torch.float32)
    ours, theirs, count = running(device), running(device), torch.tensor(3, device=device)
    train_norm(feats, TrainingNorm(*ours, weight, bias, count, 0.3))
    F.batch_norm(feats, *theirs, weight, bias, True, 0.3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert int(count) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_real_rows_leave_the_running_statistics(device, dtype, count):
    mean, variance = running(device)
    feats, real = torch.randn(4, CHANNELS).to(device, dtype), torch.tensor(count, device=device)
    out = batch_norm(feats, mean, variance, None, None, momentum=0.3, eps=1e-3, count=real)
    assert not out.any()
    for kept, before in zip((mean, variance), running(device), strict=True):
        assert torch.equal(kept, before)


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("added", [False, True], ids=["", "residual"])
def test_gradients_of_gradients(device, relu, added):
    given = leaves(device, torch.float32)
    feats, weight, bias, residual = given
    if not added:
        given, residual = given[:3], None
    found = []
    for run in (
        lambda: train_norm(
            feats, TrainingNorm(*running(device), weight, bias), residual=residual, relu=relu
        ),
        lambda: apart(feats, weight, bias, residual, relu),
    ):
        (slope,) = torch.autograd.grad(run().pow(2).sum(), feats, create_graph=True)
        loss = slope.pow(2).sum() + run().pow(3).sum()
        found.append(torch.autograd.grad(loss, given))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_rows_with_gaps(device):
    wide = leaves(device, torch.float32)[0].detach().repeat_interleave(2, dim=1)
    given, weight = wide[:, ::2].requires_grad_(), torch.rand(CHANNELS, device=device)
    grads = []
    for feats in (given, given.contiguous()):
        out = train_norm(feats, TrainingNorm(*running(device), weight))
        grads.append(torch.autograd.grad(out.pow(3).sum(), given)[0])
    assert torch.equal(*grads)


def test_what_torch_has_to_do():
    feats = torch.zeros(3, 4)
    assert takes_training_norm(feats, None)
    assert takes_training_norm(feats, torch.zeros(3, 4))
    assert not takes_training_norm(feats, torch.zeros(3, 1))
    assert not takes_training_norm(feats, torch.zeros(3, 4).half())
    assert not takes_training_norm(feats.double(), None)
    assert not takes_training_norm(feats[:1], None)
