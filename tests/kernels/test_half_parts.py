"""Products from float16 parts are as accurate as float32, over the whole range of float32."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.test_gather_gemm import FIXED, operands, random_table
from tests.kernels.test_weight_grad import FIXED as FIXED_PAIRS
from tests.kernels.test_weight_grad import random_pairs
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import kernel_map
from tritonspconv.kernels.eager import gather_gemm as eager_gemm
from tritonspconv.kernels.eager import weight_grad as eager_grad
from tritonspconv.kernels.triton import conv_grads, gather_gemm, half_parts, weight_grad
from tritonspconv.kernels.triton.half_parts import HalfParts, split_half
from tritonspconv.testing import random_sites


def value(parts: HalfParts) -> Tensor:
    """Return the tensor that the parts stand for, in float64."""
    exponent = min(15 - int(torch.frexp(parts.largest.cpu())[1]), 126)
    low = 0 if parts.low is None else parts.low.double()
    return (parts.high.double() + low * 2.0**-11) * 2.0**-exponent


def relative_error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def assert_grade_of_float32(out: Tensor, compute) -> None:
    """Return twice the error of plain float32 plus that of the parts: 22 bits a product."""
    exact, plain = compute(torch.float64), compute(torch.float32)
    sizes = compute(torch.float64, absolute=True)
    error, allowed = (out.double() - exact).norm(), 2 * (plain.double() - exact).norm()
    assert error <= allowed + 2.0**-22 * sizes.norm()


def convolve(feats, weight, bias, table, module=gather_gemm, **how) -> Tensor:
    return module.gather_gemm(
        feats, weight, bias, table.rows, table.mask, table.order, mirrored=False, **how
    )


@pytest.mark.parametrize("scale", [1e-34, 1e-10, 1.0, 3.0, 1e20, 3e38])
def test_two_parts_keep_22_bits(triton_device, scale):
    x = (torch.rand(50, 33) * 2 - 1).to(triton_device) * scale
    x[::2] *= 1e-3
    error = (value(split_half(x, with_low=True)) - x.double()).abs()
    assert (error <= 2.0**-22 * x.double().abs()).all()


def test_one_part_keeps_11_bits(triton_device):
    x = torch.randn(50, 33).to(triton_device)
    parts = split_half(x, with_low=False)
    assert parts.low is None
    assert ((value(parts) - x.double()).abs() <= 2.0**-11 * x.double().abs()).all()


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 5)])
def test_zeros_and_no_entries(triton_device, shape):
    parts = split_half(torch.zeros(shape, device=triton_device), with_low=True)
    assert parts.high.shape == shape
    assert not value(parts).any()


def test_strides_are_kept_where_memory_is_dense(triton_device):
    x = torch.randn(4, 5, 6).to(triton_device).permute(1, 2, 0)
    assert split_half(x, with_low=True).high.stride() == x.stride()
    gaps = torch.randn(4, 10).to(triton_device)[:, ::2]
    parts = split_half(gaps, with_low=True)
    assert parts.high.is_contiguous()
    assert torch.allclose(value(parts), gaps.double(), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_stays_so_and_stays_there(triton_device):
    x = torch.ones(4, 16, device=triton_device)
    x[1, 3], x[2, 0] = float("inf"), float("nan")
    table = random_table(1, 4, 4, triton_device)
    table = table._replace(
        kept_rows=torch.arange(4, dtype=torch.int32, device=triton_device)[None],
        mask=torch.ones(1, 4, dtype=torch.int32, device=triton_device),
    )
    weight = torch.rand(1, 16, 8).to(triton_device) + 0.5
    operands_ = [split_half(tensor, with_low=True) for tensor in (x, weight)]
    out = convolve(*operands_, None, table, config=FIXED)
    assert out.isfinite().all(dim=1).tolist() == [True, False, False, True]
    # All factors are positive, so an infinite entry makes the sum infinite, not NaN.
    assert (out[1] == torch.inf).all()
    assert out[2].isnan().all()


@pytest.mark.parametrize(("c_in", "c_out"), [(1, 1), (17, 33), (40, 3)])
@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
def test_convolution_has_the_accuracy_of_float32(triton_device, c_in, c_out, scale):
    table = random_table(9, 70, 50, triton_device, ordered=True)
    feats, weight, bias = operands(9, 50, c_in, c_out, torch.float32, triton_device)
    feats, bias = feats * scale, bias * scale

    def compute(dtype, absolute=False):
        cast = [x.to(dtype) for x in (feats, weight, bias)]
        cast = [x.abs() for x in cast] if absolute else cast
        return convolve(*cast, table, eager_gemm)

    parts = [split_half(x, with_low=True) for x in (feats, weight)]
    out = convolve(*parts, bias, table, config=FIXED)
    assert out.dtype == torch.float32
    assert_grade_of_float32(out, compute)
    parts = [split_half(x, with_low=False) for x in (feats, weight)]
    coarse = convolve(*parts, bias, table, config=FIXED)
    assert relative_error(coarse, compute(torch.float64)) < 1e-3


@pytest.mark.parametrize(("c_in", "c_out"), [(1, 1), (17, 33), (40, 3)])
@pytest.mark.parametrize("mirrored", [False, True], ids=["forwards", "mirrored"])
def test_weight_gradient_has_the_accuracy_of_float32(
    triton_device, monkeypatch, c_in, c_out, mirrored
):
    if triton_device.type == "cpu":
        monkeypatch.setattr(weight_grad, "_WAVE", 12)
        monkeypatch.setattr(weight_grad, "_MIN_SLICES", 5)
    listed = random_pairs([30, 0, 90], 40, 40, triton_device, spare=7)
    volume = 5 if mirrored else 3
    feats, grad = (torch.randn(40, c).to(triton_device) for c in (c_in, c_out))

    def launch(module, feats, grad, dtype=torch.float32, **how):
        out = torch.empty(volume, c_in, c_out, dtype=dtype, device=triton_device)
        return module.weight_grad(feats, grad, *listed, out, mirrored=mirrored, **how)

    def compute(dtype, absolute=False):
        cast = [x.to(dtype) for x in (feats, grad)]
        cast = [x.abs() for x in cast] if absolute else cast
        return launch(eager_grad, *cast, dtype)

    parts = [split_half(x, with_low=True) for x in (feats, grad)]
    assert_grade_of_float32(launch(weight_grad, *parts, config=FIXED_PAIRS), compute)


@pytest.mark.parametrize("inverse", [False, True], ids=["map", "inverse"])
@pytest.mark.parametrize("more", [0, 1], ids=["enough work", "too little work"])
def test_all_operands_of_a_backward_pass_are_split_or_none(inverse, more, monkeypatch):
    """The work is that of the forward pass: rows of the larger side, times both channels."""
    geometry = ConvGeometry((3, 3), (2, 2), (1, 1), (1, 1))
    kmap = kernel_map(random_sites(30, 2, extent=9), geometry)
    kmap = kmap.inverse() if inverse else kmap
    feats, grad = torch.randn(kmap.n_in, 3), torch.randn(kmap.n_out, 2)
    weight = torch.randn(9, 3, 2)
    monkeypatch.setattr(half_parts, "_MIN_WORK", max(kmap.n_in, kmap.n_out) * 3 * 2 + more)
    monkeypatch.setattr(half_parts, "split_half", lambda x, **how: HalfParts(x, None, x))
    seen = []
    for name in ("weight_grad", "gather_gemm"):
        monkeypatch.setattr(conv_grads, name, lambda *operands, **how: seen.extend(operands[:2]))
    conv_grads.conv_grads(feats, grad, weight, kmap, True, torch.empty_like(weight), "ieee")
    assert [isinstance(operand, HalfParts) for operand in seen] == [not more] * 4
