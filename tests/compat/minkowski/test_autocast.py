"""Autocast: layers of one tap multiply in half precision and sum weight gradients in float32."""

import pytest
import torch

import compat.minkowski as ME

HALF = [torch.float16, torch.bfloat16]


def line(feats: torch.Tensor) -> ME.SparseTensor:
    """Return a tensor of one axis with a site for each row of ``feats``."""
    x = torch.arange(len(feats), dtype=torch.int32, device=feats.device)
    return ME.SparseTensor(feats, torch.stack([torch.zeros_like(x), x], 1))


def pointwise(device: torch.device, c_in: int, c_out: int) -> ME.MinkowskiConvolution:
    """Return a layer of one tap, with a bias."""
    return ME.MinkowskiConvolution(c_in, c_out, kernel_size=1, bias=True, dimension=1).to(device)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_weight_gradient_beyond_float16_is_finite(dtype, device):
    layer, n = pointwise(device, 2, 2), 19_607
    with torch.autocast(device.type, dtype):
        out = layer(line(torch.full((n, 2), 2.0, device=device))).F
    assert out.dtype == dtype
    out.backward(torch.full_like(out, 2))
    # 4 n = 78,428 is more than float16 holds.
    assert layer.kernel.grad.tolist() == [[4.0 * n] * 2] * 2
    assert layer.bias.grad.tolist() == [[2.0 * n] * 2]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cls", ["MinkowskiConvolution", "MinkowskiConvolutionTranspose"])
def test_weight_gradients_have_the_accuracy_of_float32(cls, dtype, device):
    layer = getattr(ME, cls)(16, 24, kernel_size=1, dimension=1).to(device)
    feats = torch.randn(5000, 16, device=device).to(dtype)
    with torch.autocast(device.type, dtype):
        out = layer(line(feats.float())).F
    grad = torch.randn_like(out)
    out.backward(grad)
    expected = feats.double().T @ grad.double()
    error = (layer.kernel.grad - expected).abs().max() / expected.abs().max()
    assert layer.kernel.grad.dtype == torch.float32
    assert error < 1e-6
    product = (feats.double() @ layer.kernel.detach().to(dtype).double()).to(dtype)
    torch.testing.assert_close(out, product)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_output_of_a_global_pool_is_multiplied(dtype, device):
    pooled = ME.MinkowskiGlobalSumPooling()(line(torch.ones(6, 2, device=device)))
    layer = pointwise(device, 2, 3)
    with torch.autocast(device.type, dtype):
        out = layer(pooled)
    assert out.coordinate_map_key == pooled.coordinate_map_key
    expected = torch.addmm(layer.bias.double(), pooled.F.double(), layer.kernel.to(dtype).double())
    # The weight, the bias and the sum are rounded; an error may be as large as for the largest
    # entry.
    most = 4 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(out.F, expected.to(dtype), rtol=0, atol=most)


def test_float64_stays_float64(device):
    layer = pointwise(device, 2, 3).double()
    with torch.autocast(device.type, torch.bfloat16):
        assert layer(line(torch.ones(4, 2, dtype=torch.float64, device=device))).F.dtype == (
            torch.float64
        )
