"""Layers whose attributes users change after building them, as exporters and model surgery do."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import compat.cumm.tensorview as tv
import compat.spconv.pytorch as spconv


@pytest.mark.parametrize("kind", [spconv.SparseConv3d, spconv.SparseConvTranspose3d])
def test_attributes_that_change_later_count(make, device, kind):
    """An exporter reverses a network's axes, in weights and in every attribute of every layer."""
    layer = kind(4, 5, (3, 2, 1), (1, 2, 3), (1, 0, 0), bias=True).to(device)
    x = make(n=60, shape=(7, 8, 9))
    expected = layer(x).dense()

    layer.weight.data = layer.weight.data.permute(0, 3, 2, 1, 4).contiguous()
    for name in ("kernel_size", "stride", "padding", "dilation", "output_padding"):
        setattr(layer, name, getattr(layer, name)[::-1])
    turned = spconv.SparseConvTensor(x.features, x.indices[:, [0, 3, 2, 1]], [9, 8, 7], 2)
    torch.testing.assert_close(layer(turned).dense().permute(0, 1, 4, 3, 2), expected)


def test_dilation_and_pool_window_that_change_later_count(make, device):
    x = make(n=60, shape=(7, 8, 9))
    layer = spconv.SubMConv3d(4, 5, 3, dilation=2, bias=False).to(device)
    twin = spconv.SubMConv3d(4, 5, 3, bias=False).to(device)
    twin.weight = layer.weight
    twin.dilation = [2, 2, 2]
    torch.testing.assert_close(twin(x).features, layer(x).features)
    pool = spconv.SparseMaxPool3d(2)
    pool.kernel_size, pool.padding = [3, 3, 3], [1, 1, 1]
    expected = spconv.SparseMaxPool3d(3, 2, 1)(x)
    assert torch.equal(pool(x).dense(), expected.dense())


def test_tuples_may_be_assigned_where_lists_were(make, device):
    layers = spconv.SparseSequential(
        spconv.SubMConv3d(4, 4, 3, indice_key="subm"),
        spconv.SubMConv3d(4, 4, 3, indice_key="subm"),
        spconv.SparseConv3d(4, 4, 3, 2, 1, indice_key="down"),
        spconv.SparseInverseConv3d(4, 4, 3, indice_key="down"),
    ).to(device)
    for layer in layers.children():
        layer.kernel_size, layer.dilation = (3, 3, 3), (1, 1, 1)
    x = make(n=60)
    x.spatial_shape = tuple(x.spatial_shape)
    assert layers(x).spatial_shape == [6, 5, 7]


def test_batch_norm_and_activation_folded_by_hand(make, device):
    torch.manual_seed(0)
    conv, norm = spconv.SubMConv3d(4, 5, 3, bias=False), nn.BatchNorm1d(5)
    net = spconv.SparseSequential(conv, norm, nn.ReLU()).to(device)
    net(make(n=60))
    net.eval()
    x = make(n=60, seed=1)
    expected = net(x).features

    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    conv.weight = nn.Parameter(conv.weight * scale.reshape(-1, 1, 1, 1, 1))
    conv.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
    conv.act_type = tv.gemm.Activation.ReLU
    torch.testing.assert_close(conv(x).features, expected)
    residual = conv(x, add_input=x.replace_feature(expected)).features
    conv.act_type = tv.gemm.Activation.None_
    torch.testing.assert_close(residual, F.relu(conv(x).features + expected))
