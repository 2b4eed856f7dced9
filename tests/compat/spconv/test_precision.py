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


@pytest.mark.parametrize("kind", ["1x1", "shared voxels", "strided", "inverse"])
def test_weight_gradients_beyond_half_precision_are_finite(device, kind):
    """The sum of 19,600 products of 2 and 2 is 78,400; float16 ends at 65,504."""
    rows = 19_600
    cells = torch.arange(rows, device=device)
    if kind == "shared voxels":
        cells[1] = 0
    indices = torch.stack((cells * 0, cells * 2, cells * 0, cells * 0), 1).int()
    x = spconv.SparseConvTensor(
        torch.full((rows, 2), 2.0, device=device), indices, [2 * rows, 1, 1], 1
    )
    layers = {
        "1x1": lambda: spconv.SubMConv3d(2, 2, 1),
        "shared voxels": lambda: spconv.SubMConv3d(2, 2, 3),
        "strided": lambda: spconv.SparseConv3d(2, 2, 1, 2, indice_key="k"),
        "inverse": lambda: spconv.SparseInverseConv3d(2, 2, 1, indice_key="k"),
    }
    layer = layers[kind]().to(device)
    with torch.autocast(device.type, dtype=torch.float16):
        if kind == "inverse":
            x = layers["strided"]().to(device)(x)
            x = x.replace_feature(torch.full((rows, 2), 2.0, device=device))
        y = layer(x).features
    assert y.dtype == torch.float16
    y.backward(torch.full_like(y, 2.0))
    centre = layer.weight.grad[(slice(None), *(n // 2 for n in layer.kernel_size))]
    assert layer.weight.grad.dtype == torch.float32
    assert centre.tolist() == [[78_400.0] * 2] * 2
    assert layer.bias.grad.tolist() == [39_200.0] * 2


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float16, 4e-4), (torch.bfloat16, 3e-3)], ids=["float16", "bfloat16"]
)
@pytest.mark.parametrize("shared", [False, True])
def test_errors_of_weight_gradients_under_autocast(make, device, shared, dtype, limit):
    """Operands fit the dtype; the sums of rows that share a voxel are rounded once."""
    indices = make(n=1000, shape=(12, 12, 12)).indices
    if shared:
        indices = torch.cat([indices, indices])
    torch.manual_seed(0)
    feats, grad = (torch.randn(len(indices), 8).to(device, dtype) for _ in range(2))
    found = []
    for exact in (False, True):
        layer = spconv.SubMConv3d(8, 8, 3).to(device)
        layer.load_state_dict(
            {name: torch.full_like(p, 0.5) for name, p in layer.state_dict().items()}
        )
        wide = torch.float64 if exact else torch.float32
        x = spconv.SparseConvTensor(feats.to(wide), indices, [12, 12, 12], 2)
        with torch.autocast(device.type, dtype=dtype, enabled=not exact):
            y = layer.to(wide)(x).features
        y.backward(grad.to(y.dtype))
        found.append(layer.weight.grad.double())
    error = float((found[0] - found[1]).norm() / found[1].norm())
    assert error < (limit if shared else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["subm", "strided", "inverse"])
def test_weight_gradients_over_shared_voxels_are_not_rounded(make, device, kind, dtype):
    """Operands are whole numbers below 256, which bfloat16 holds; only sums can be rounded."""
    n = 1500
    x = make(n=n, shape=(12, 12, 12))
    indices = torch.cat([x.indices, x.indices[: n // 3]])
    layers = {
        "subm": [spconv.SubMConv3d(4, 4, 3)],
        "strided": [spconv.SparseConv3d(4, 4, 3, 2, 1)],
        "inverse": [
            spconv.SparseConv3d(4, 4, 2, 2, indice_key="k"),
            spconv.SparseInverseConv3d(4, 4, 2, indice_key="k"),
        ],
    }[kind]

    def whole(rows, like):
        return torch.randint(0, 10, (rows, 4), device=device).to(like)

    found = []
    for exact in (False, True):
        torch.manual_seed(0)
        wide = torch.float64 if exact else torch.float32
        y = spconv.SparseConvTensor(whole(len(indices), wide), indices, [12, 12, 12], 2)
        for layer in layers:
            y = y.replace_feature(whole(len(y.features), wide))
            with torch.autocast(device.type, dtype=dtype, enabled=not exact):
                y = layer.to(device, wide)(y)
        parameters = [layers[-1].weight, layers[-1].bias]
        found.append(
            torch.autograd.grad(y.features, parameters, whole(len(y.features), y.features))
        )
    assert found[1][0].abs().max() > 2048, "more than either type holds exactly"
    for got, expected in zip(*found, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got.double(), expected)
