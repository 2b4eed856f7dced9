"""Rows times one matrix: values, gradients, and their sums under autocast."""

import pytest
import torch

from tritonspconv import ops
from tritonspconv.testing import assert_close

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("size", [(70, 5, 3), (1, 1, 1), (0, 4, 2)], ids=str)
def test_is_the_matrix_product(size, has_bias, device):
    n, c_in, c_out = size
    shapes = [(n, c_in), (c_in, c_out), (c_out,)][: 2 + has_bias]
    args = [torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in shapes]
    out = ops.pointwise_conv(*args)
    expected = args[0] @ args[1] + (args[2] if has_bias else 0)
    assert_close(out, expected)
    grad = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(y, args, grad) for y in (out, expected))
    for got, wanted in zip(ours, theirs, strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize("rows", [0, 300])
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_rounds_operands_and_no_gradient_of_a_parameter(dtype, rows, device):
    feats = torch.randn(rows, 5, device=device, requires_grad=True)
    weight, bias = (torch.randn(s, device=device, requires_grad=True) for s in ((5, 3), (3,)))
    with torch.autocast(device.type, dtype=dtype):
        out = ops.pointwise_conv(feats, weight, bias)
    assert out.dtype == dtype
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (feats, weight, bias), grad)
    assert [g.dtype for g in got] == [torch.float32] * 3
    rounded, wide = feats.detach().to(dtype).double(), grad.double()
    assert_close(got[0], (wide @ weight.detach().to(dtype).double().T).to(dtype).float())
    # The tolerance is far below the rounding of half precision: 2 ** -11 in float16, 2 ** -8 in
    # bfloat16.
    torch.testing.assert_close(got[1].double(), rounded.T @ wide, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[2].double(), wide.sum(0), rtol=1e-5, atol=1e-5)


def test_a_sum_beyond_half_precision_is_finite(device):
    feats = torch.full((19_600, 2), 2.0, device=device)
    weight = torch.zeros(2, 2, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=torch.float16):
        out = ops.pointwise_conv(feats, weight)
    out.backward(torch.full_like(out, 2.0))
    assert weight.grad.tolist() == [[78_400.0] * 2] * 2
