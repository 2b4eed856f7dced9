"""Conversion of rows at sites to dense tensors and back."""

import pytest
import torch

from tritonspconv import reference
from tritonspconv.ops.dense import from_dense, to_dense
from tritonspconv.reference import Box
from tritonspconv.testing import random_sites


@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "how",
    [{}, {"repeats": 8, "outside": 5}, {"bounded": False, "lower": -7}],
    ids=["distinct", "repeats-outside", "unbounded"],
)
def test_to_dense(how, ndim, channels_first, device):
    sites = random_sites(30, ndim, extent=40 if ndim == 1 else 6, **how)
    grid = sites.grid
    feats = torch.randn(30, 3, requires_grad=True)
    expected = reference.to_dense(feats, sites.coords, Box(grid.lower, grid.shape, grid.batch_size))
    if not channels_first:
        expected = expected.movedim(1, -1)
    grad = torch.randn(expected.shape)
    (expected_grad,) = torch.autograd.grad(expected, feats, grad)

    ours = feats.detach().to(device).requires_grad_()
    at = type(sites)(sites.coords.to(device), grid)
    dense = to_dense(ours, at, channels_first=channels_first)
    assert dense.is_contiguous()
    assert torch.equal(dense.cpu(), expected)
    (grad_ours,) = torch.autograd.grad(dense, ours, grad.to(device))
    assert torch.equal(grad_ours.cpu(), expected_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.bool], ids=str)
def test_any_dtype(dtype):
    sites = random_sites(10, 2, extent=5)
    dense = to_dense(torch.ones(10, 2, dtype=dtype), sites)
    assert dense.dtype == dtype
    assert dense.sum() == 20


@pytest.mark.parametrize("channels_first", [True, False])
def test_round_trip(channels_first, device):
    x = torch.randn(2, 3, 4, 5, 6, device=device) * (torch.rand(2, 1, 4, 5, 6, device=device) < 0.3)
    x = x if channels_first else x.movedim(1, -1).contiguous()
    x.requires_grad_()
    feats, coords = from_dense(x, channels_first=channels_first)
    assert coords.dtype == torch.int32
    assert coords.tolist() == sorted(coords.tolist())
    assert (feats != 0).any(1).all()
    sites = random_sites(0, 3)
    grid = type(sites.grid)((0, 0, 0), (4, 5, 6), 2)
    back = to_dense(feats, type(sites)(coords, grid), channels_first=channels_first)
    assert torch.equal(back, x)
    back.sum().backward()
    active = (x != 0).any(1 if channels_first else -1, keepdim=True)
    assert torch.equal(x.grad, active.expand_as(x).float())


def test_nothing_active():
    feats, coords = from_dense(torch.zeros(2, 3, 4, 4))
    assert feats.shape == (0, 3)
    assert coords.shape == (0, 3)
    assert to_dense(torch.ones(0, 3), random_sites(0, 2, extent=4)).shape == (2, 3, 4, 4)
    assert to_dense(torch.ones(0, 3), random_sites(0, 2, bounded=False)).shape == (0, 3, 0, 0)


def test_one_channel_is_enough():
    x = torch.zeros(1, 2, 3)
    x[0, 1, 2] = float("nan")
    feats, coords = from_dense(x)
    assert coords.tolist() == [[0, 2]]
    assert feats[0, 0] == 0


def test_gradcheck():
    sites = random_sites(10, 2, extent=4, repeats=3)
    feats = torch.randn(10, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: to_dense(x, sites), feats)


def test_refuses():
    sites = random_sites(5, 2)
    with pytest.raises(ValueError, match=r"feats must have shape \[5, C\] .*got \[4, 2\]"):
        to_dense(torch.ones(4, 2), sites)
    with pytest.raises(ValueError, match="share a device; got meta and cpu"):
        to_dense(torch.ones(5, 2, device="meta"), sites)
    with pytest.raises(ValueError, match=r"at least one spatial axis; got shape \[2, 3\]"):
        from_dense(torch.ones(2, 3))
