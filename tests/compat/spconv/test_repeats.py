"""Rows that share a site, such as image points, centres of Gaussians and raw points."""

import pytest
import torch
from torch.nn import functional as F

import compat.spconv.pytorch as spconv
from compat.spconv.core import Activation
from compat.spconv.pytorch import SparseConvTensor
from tritonspconv.coords import ActiveSites


def sharing(device, channels=1):
    """Return two cells in 2-d: rows 0 and 1 share one, row 2 is in its right neighbour."""
    indices = torch.tensor([[0, 1, 1], [0, 1, 1], [0, 1, 2]], dtype=torch.int32, device=device)
    features = torch.tensor([[1.0], [100.0], [10000.0]], device=device).expand(3, channels)
    return SparseConvTensor(features.clone().requires_grad_(), indices, [4, 4], 1)


def test_submanifold_rows_that_share_a_site(device):
    """Later taps read first rows; earlier taps send all rows to first rows."""
    layer = spconv.SubMConv2d(1, 1, 3, bias=False).to(device)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1, 10).view(1, 3, 3, 1))
    x = sharing(device)
    y = layer(x).features
    # Tap 5 is the centre, 6 its right neighbour, 4 its left one.
    assert y.flatten().tolist() == [5 + 60000, 500 + 60000, 50000 + 4 + 400]
    y.sum().backward()
    assert x.features.grad.flatten().tolist() == [5 + 4, 5 + 4, 5 + 6 + 6]


@pytest.mark.parametrize("kind", [spconv.SparseConv2d, spconv.SparseConvTranspose2d])
def test_rows_that_share_a_site_add_up_and_all_get_it_back(device, kind):
    torch.manual_seed(0)
    layer = kind(2, 3, 2, 2, indice_key="k").to(device)
    back = spconv.SparseInverseConv2d(3, 2, 2, indice_key="k").to(device)
    x = sharing(device, 2)
    merged = torch.stack([x.features[:2].sum(0), x.features[2]])
    alone = SparseConvTensor(merged, x.indices[[0, 2]], [4, 4], 1)
    every, expected = layer(x), layer(alone)
    assert torch.equal(every.indices, expected.indices)
    torch.testing.assert_close(every.features, expected.features)
    torch.testing.assert_close(back(every).features, back(expected).features[[0, 0, 1]])


def test_residual_bias_and_activation_of_rows_that_share_a_site(device):
    torch.manual_seed(0)
    layer = spconv.SubMConv2d(2, 3, 3).to(device)
    layer.act_type = Activation.ReLU
    x = sharing(device, 2)
    other = x.replace_feature(torch.randn(3, 3, device=device))
    found = layer(x, add_input=other).features
    layer.act_type = Activation.None_
    torch.testing.assert_close(found, F.relu(layer(x).features + other.features))
    layer.bias = None
    assert not torch.equal(found, F.relu(layer(x).features + other.features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_that_share_a_site_under_autocast(device, dtype):
    layer = spconv.SubMConv2d(2, 3, 3).to(device)
    x = sharing(device, 2)
    # All values have about one size, so every row of the cell and its neighbour changes the result.
    x = x.replace_feature(torch.tensor([[1.0, -2.0], [3.0, 1.5], [-1.0, 2.5]], device=device))
    expected = layer(x).features
    with torch.no_grad():
        for row in range(3):
            others = x.features.detach().clone()
            others[row] = 0
            assert (layer(x.replace_feature(others)).features - expected).abs().max() > 0.1
    with torch.autocast(device.type, dtype=dtype):
        found = layer(x).features
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", [spconv.SparseMaxPool2d, spconv.SparseAvgPool2d])
def test_pools_read_the_first_row_of_a_shared_site(device, kind):
    x = sharing(device)
    every = kind(2)(x)
    first = kind(2)(SparseConvTensor(x.features[[0, 2]], x.indices[[0, 2]], [4, 4], 1))
    assert torch.equal(every.indices, first.indices)
    assert torch.equal(every.features, first.features)


def test_pairs_of_rows_that_share_a_site(device):
    y = spconv.SubMConv2d(1, 1, 3, indice_key="s").to(device)(sharing(device))
    counts = y.indice_dict["s"].indice_pair_num
    assert counts.tolist() == [0, 0, 0, 1, 3, 1, 0, 0, 0]
    z = spconv.SparseConv2d(1, 1, 2, 2, indice_key="d").to(device)(sharing(device))
    assert z.indice_dict["d"].indice_pair_num.tolist() == [0, 0, 1, 1]


def test_whether_rows_share_sites_is_asked_once(make, monkeypatch):
    asked = []
    monkeypatch.setattr(ActiveSites, "has_repeats", lambda sites: bool(asked.append(sites)))
    x = make()
    layers = (
        spconv.SubMConv3d(4, 4, 3), spconv.SubMConv3d(4, 4, 3, indice_key="k"),
        spconv.SparseConv3d(4, 4, 3, 2, 1), spconv.SubMConv3d(4, 4, 3),
        spconv.SubMConv3d(4, 4, 3, indice_key="l"), spconv.SparseConv3d(4, 4, 3, 2, 1),
    )  # fmt: skip
    spconv.SparseSequential(*layers).to(x.features.device)(x)
    assert len(asked) == 1


@pytest.mark.parametrize("kind", ["SubMConv3d", "SparseConv3d", "SparseInverseConv3d"])
def test_rows_that_share_a_site_give_the_same_bits_on_several_threads(kind):
    torch.set_num_threads(2)
    indices = torch.randint(0, 6, (40_000, 4)).int()
    indices[:, 0] = 0
    x = SparseConvTensor(torch.randn(len(indices), 16), indices, [6, 6, 6], 1)
    down = spconv.SparseConv3d(16, 16, 3, 2, 1, indice_key="k")
    layers = {
        "SubMConv3d": spconv.SubMConv3d(16, 16, 3),
        "SparseConv3d": down,
        "SparseInverseConv3d": spconv.SparseSequential(
            down, spconv.SparseInverseConv3d(16, 16, 3, indice_key="k")
        ),
    }

    def run():
        feats = x.features.detach().requires_grad_()
        out = layers[kind](x.replace_feature(feats)).features
        return out.detach(), *torch.autograd.grad(out.square().sum(), feats)

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
