"""Folding of batch norm and ReLU into convolutions."""

import copy

import pytest
import torch
from torch import nn

import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tritonspconv import nn as tsnn
from tritonspconv.testing import random_sites


def settle(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and factors that are not their initial ones."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for value in (norm.running_mean, norm.bias.data):
                value.normal_()
            for value in (norm.running_var, norm.weight.data):
                value.uniform_(0.5, 2.0)
    return model.eval()


def engine_input(device, dtype=torch.float32) -> ts.SparseTensor:
    sites = random_sites(80, extent=(9, 8, 7), device=device)
    return ts.SparseTensor(torch.randn(80, 4).to(device, dtype), sites)


def spconv_input(device, dtype=torch.float32) -> spconv.SparseConvTensor:
    x = engine_input(device, dtype)
    return spconv.SparseConvTensor(x.feats, x.sites.coords, [9, 8, 7], 2)


def engine_net() -> nn.Module:
    return tsnn.Sequential(
        tsnn.Sequential(tsnn.SubMConv3d(4, 8, 3, bias=False), tsnn.BatchNorm(8), tsnn.ReLU()),
        tsnn.Sequential(tsnn.SparseConv3d(8, 6, 3, 2, 1), nn.BatchNorm1d(6)),
        tsnn.SubMConv3d(6, 5, 3),
        nn.ReLU(),
        nn.BatchNorm1d(5),
    )


def spconv_net() -> nn.Module:
    return spconv.SparseSequential(
        spconv.SparseSequential(
            spconv.SubMConv3d(4, 8, 3, bias=False, indice_key="a"), nn.BatchNorm1d(8), nn.ReLU()
        ),
        spconv.SparseSequential(
            spconv.SubMConv3d(8, 6, 1, indice_key="b"), nn.BatchNorm1d(6), nn.ReLU()
        ),
        spconv.SparseConv3d(6, 5, 3, 2, 1, indice_key="c"),
        spconv.SparseBatchNorm(5),
        spconv.SparseInverseConv3d(5, 3, 3, indice_key="c"),
        nn.LeakyReLU(),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("net", "x", "left"),
    [
        (engine_net, engine_input, ["SubMConv3d", "SparseConv3d"]),
        (spconv_net, spconv_input, ["SubMConv3d", "SubMConv3d"]),
    ],
    ids=["engine", "spconv"],
)
def test_a_fused_network_is_the_same_function(device, net, x, left, dtype):
    net, x = settle(net()).to(device, dtype), x(device, dtype)
    fused = ts.fuse(net)
    with torch.no_grad():
        expected, out = (
            y.feats if isinstance(y, ts.SparseTensor) else y.features for y in (net(x), fused(x))
        )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    assert [type(child).__name__ for chain in list(fused)[:2] for child in chain] == left


def test_what_follows_an_activation_stays():
    fused = ts.fuse(settle(engine_net()))
    assert [type(child).__name__ for child in fused][2:] == ["SubMConv3d", "BatchNorm1d"]
    assert "relu=True" in repr(fused[2])


def test_the_model_itself_stays_unless_told():
    net = settle(engine_net())
    before = copy.deepcopy(net.state_dict())
    ts.fuse(net)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert ts.fuse(net, inplace=True) is net
    assert len(net[0]) == 1


def test_gradients_flow_through_a_fused_network(device):
    x = engine_input(device)
    fused = ts.fuse(settle(engine_net()).to(device))
    fused(x).feats.sum().backward()
    assert fused[0][0].weight.grad.any()


def test_a_layer_used_twice_is_left_alone():
    conv = tsnn.SubMConv3d(4, 4, 3)
    net = tsnn.Sequential(
        tsnn.Sequential(conv, tsnn.BatchNorm(4)), tsnn.Sequential(conv, tsnn.ReLU())
    )
    fused = ts.fuse(net.eval())
    assert [len(chain) for chain in fused] == [2, 2]


def test_a_layer_used_twice_in_one_chain_is_left_alone():
    conv = tsnn.SubMConv3d(4, 4, 3)
    net = tsnn.Sequential(conv, tsnn.BatchNorm(4), conv, tsnn.ReLU())
    assert len(ts.fuse(net.eval())) == 4


@pytest.mark.parametrize(("watched", "left"), [(0, 3), (1, 3), (2, 2)])
def test_a_layer_with_a_hook_is_left_alone(watched, left):
    net = engine_net().eval()
    net[0][watched].register_forward_hook(lambda *args: None)
    assert len(ts.fuse(net)[0]) == left


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        ts.fuse(engine_net())
