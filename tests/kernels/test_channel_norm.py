"""A norm of channels as one factor and one addend."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tritonspconv import reference
from tritonspconv.kernels.channel_norm import ChannelNorm


def random_norm(dtype: torch.dtype = torch.float32) -> ChannelNorm:
    mean, bias = torch.randn(2, 7).to(dtype)
    variance, weight = torch.rand(2, 7).add(0.5).to(dtype)
    return ChannelNorm(mean, variance, weight, bias, 1e-3)


@pytest.mark.parametrize("absent", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_scale_and_shift_are_the_norm(absent):
    norm = random_norm(torch.float64)._replace(**dict.fromkeys(absent))
    rows = torch.randn(20, 7, dtype=torch.float64)
    scale, shift = norm.scale_and_shift()
    torch.testing.assert_close(rows * scale + shift, reference.channel_norm(rows, *norm))
    torch.testing.assert_close(norm.scale(torch.float64), scale)


def test_scale_and_shift_have_the_bits_of_torch():
    """Products with powers of two are exact, so both round once: the sum."""
    norm = random_norm()
    mean, variance, weight, bias, eps = norm
    rows = torch.tensor([[-4.0], [0.0], [0.5], [1.0], [8.0]]).repeat(1, 7)
    expected = F.batch_norm(rows, mean, variance, weight, bias, eps=eps)
    scale, shift = norm.scale_and_shift(torch.float32)
    assert torch.equal(rows * scale + shift, expected)


@pytest.mark.parametrize("wide", range(4), ids=ChannelNorm._fields[:4])
def test_the_widest_vector_decides_the_type(wide):
    vectors = list(random_norm()[:4])
    vectors[wide] = vectors[wide].double()
    assert {x.dtype for x in ChannelNorm(*vectors).scale_and_shift()} == {torch.float64}


def test_vectors_of_halves_become_float32():
    assert {x.dtype for x in random_norm(torch.float16).scale_and_shift()} == {torch.float32}


def test_the_norm_is_computed_in_the_type_asked_for():
    norm = random_norm(torch.float64)
    found = norm.scale_and_shift(torch.float32)
    expected = norm.each(Tensor.float).scale_and_shift()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
