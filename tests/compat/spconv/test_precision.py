"""dtypes: autocast in both modes, half weights, mixtures, float32 grade."""

import pytest
import torch

import compat.spconv.pytorch as spconv
from compat.spconv import constants
from tritonspconv.nn import chain

LAYERS = [
    lambda: spconv.SubMConv3d(4, 6, 3),
    lambda: spconv.SubMConv3d(4, 6, 1),
    lambda: spconv.SparseConv3d(4, 6, 3, 2, 1),
]


@pytest.mark.parametrize("layer", LAYERS, ids=["subm", "1x1", "conv"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("features", [torch.float32, torch.float16])
def test_autocast_casts_in_train_and_eval(make, device, layer, training, dtype, features):
    x = make(dtype=features)
    layer = layer().to(device).train(training)
    with torch.autocast(device.type, dtype=dtype):
        y = layer(x)
    assert y.features.dtype == dtype
    y.features.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert x.features.grad.dtype == features
    exact = layer(x).features
    torch.testing.assert_close(y.features.to(exact.dtype), exact, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("layer", LAYERS, ids=["subm", "1x1", "conv"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_module_and_features_of_one_dtype(make, device, layer, dtype):
    layer = layer().to(device, dtype)
    y = layer(make(dtype=dtype))
    assert y.features.dtype == dtype
    y.features.sum().backward()
    assert layer.weight.grad.dtype == dtype


@pytest.mark.parametrize("layer", LAYERS, ids=["subm", "1x1", "conv"])
@pytest.mark.parametrize("training", [True, False])
def test_features_of_another_dtype_follow_the_weight(make, device, layer, training):
    layer = layer().to(device).train(training)
    x = make(dtype=torch.float16)
    assert layer(x).features.dtype == torch.float32
    assert layer.half()(make()).features.dtype == torch.float16


def test_max_pool_keeps_half_precision(make):
    assert spconv.SparseMaxPool3d(2)(make(dtype=torch.bfloat16)).features.dtype == torch.bfloat16


@pytest.mark.parametrize(("allowed", "precision"), [(False, "ieee"), (True, "tf32")])
def test_tf32_is_asked_for_by_the_constant_alone(make, device, monkeypatch, allowed, precision):
    asked = []

    def listing(*args, precision, **kwargs):
        asked.append(precision)
        return original(*args, precision=precision, **kwargs)

    original = chain.sparse_conv
    monkeypatch.setattr(chain, "sparse_conv", listing)
    monkeypatch.setattr(constants, "SPCONV_ALLOW_TF32", allowed)
    spconv.SubMConv3d(4, 4, 3).to(device)(make())
    assert asked == [precision]


def test_gradcheck_in_double(make, device):
    x = make(n=12, dtype=torch.float64, shape=(3, 3, 3))
    layer = spconv.SubMConv3d(4, 2, 3).to(device, torch.float64)

    def run(features, weight):
        values = {"weight": weight, "bias": layer.bias}
        tensor = x.replace_feature(features)
        return torch.func.functional_call(layer, values, (tensor,)).features

    assert torch.autograd.gradcheck(run, (x.features, layer.weight))
