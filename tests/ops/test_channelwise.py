"""Channelwise convolution against the reference."""

import pytest
import torch

from tests._oracle import map_triples
from tritonspconv import ops, reference
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import kernel_map
from tritonspconv.testing import random_sites, surface_sites

SUBM3 = ConvGeometry.submanifold((3, 3), (1, 1))
DOWN2 = ConvGeometry((3, 2), (2, 2), (1, 0), (1, 1))
GEOMETRIES = pytest.mark.parametrize("geometry", [SUBM3, DOWN2], ids=["subm", "strided"])


@GEOMETRIES
@pytest.mark.parametrize("inverse", [False, True], ids=["map", "inverse"])
def test_channelwise_conv_is_the_reference_in_both_directions(device, geometry, inverse):
    kmap = kernel_map(random_sites(25, 2, extent=6, device=device), geometry)
    kmap = kmap.inverse() if inverse else kmap
    feats = torch.randn(kmap.n_in, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(kmap.kernel_volume, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    expected = reference.channelwise_conv(feats, weight, map_triples(kmap), kmap.n_out) + bias
    cotangent = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * cotangent).sum(), (feats, weight, bias))
    inputs = [t.detach().to(device).requires_grad_() for t in (feats, weight, bias)]
    out = ops.sparse_channelwise_conv(inputs[0], inputs[1], kmap, inputs[2])
    grads = torch.autograd.grad((out * cotangent.to(device)).sum(), inputs)
    torch.testing.assert_close(out.cpu(), expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.cpu(), expected_grad)


def test_channelwise_conv_with_ordered_columns(device):
    """A convolution with diagonal matrices gives the same, also where a GPU orders the columns."""
    sites = surface_sites(36, device=device)
    kmap = kernel_map(sites, ConvGeometry.submanifold((3, 3, 3), (1, 1, 1)))
    feats = torch.randn(sites.num_rows, 2, dtype=torch.float64, device=device)
    weight = torch.randn(27, 2, dtype=torch.float64, device=device)
    out = ops.sparse_channelwise_conv(feats, weight, kmap)
    torch.testing.assert_close(out, ops.sparse_conv(feats, torch.diag_embed(weight), kmap))


def test_gradcheck():
    kmap = kernel_map(random_sites(9, 2, extent=3), DOWN2)
    feats = torch.randn(kmap.n_in, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(kmap.kernel_volume, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda f, w: ops.sparse_channelwise_conv(f, w, kmap), (feats, weight)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(device, dtype):
    kmap = kernel_map(random_sites(20, 2, extent=5, device=device), SUBM3)
    feats = torch.randn(kmap.n_in, 3, dtype=dtype, device=device)
    weight = torch.randn(9, 3, dtype=dtype, device=device)
    out = ops.sparse_channelwise_conv(feats, weight, kmap)
    exact = ops.sparse_channelwise_conv(feats.double(), weight.double(), kmap)
    assert out.dtype == dtype
    torch.testing.assert_close(out, exact.to(dtype))


def test_no_rows():
    kmap = kernel_map(random_sites(0, 2), DOWN2)
    feats = torch.zeros(0, 3, requires_grad=True)
    weight = torch.randn(6, 3, requires_grad=True)
    out = ops.sparse_channelwise_conv(feats, weight, kmap)
    out.sum().backward()
    assert out.shape == (0, 3)
    assert not weight.grad.any()


def test_errors():
    kmap = kernel_map(random_sites(9, 2), SUBM3)
    with pytest.raises(ValueError, match=r"feats must be \[9, C\] and weight \[9, 3\]"):
        ops.sparse_channelwise_conv(torch.zeros(9, 3), torch.zeros(9, 2), kmap)
    with pytest.raises(ValueError, match="must share a device"):
        ops.sparse_channelwise_conv(
            torch.zeros(9, 3, device="meta"), torch.zeros(9, 3, device="meta"), kmap
        )


@pytest.mark.parametrize("bias", [torch.zeros(1), torch.zeros(9, 3), torch.zeros(2)], ids=len)
def test_bias_has_one_number_per_channel(bias):
    kmap = kernel_map(random_sites(9, 2), SUBM3)
    with pytest.raises(ValueError, match=r"bias must be \[3\] on cpu, one number per channel; got"):
        ops.sparse_channelwise_conv(torch.zeros(9, 3), torch.zeros(9, 3), kmap, bias)
