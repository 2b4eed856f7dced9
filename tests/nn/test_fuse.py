"""Folding of batch norm and ReLU into convolutions."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tests._fused import UNLIKE, double_result, three
from tritonspconv import nn as tsnn
from tritonspconv.testing import random_sites


def settle(model: nn.Module) -> nn.Module:
    """Give batch norms random statistics and factors."""
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


def minkowski_input(device, dtype=torch.float32) -> ME.SparseTensor:
    x = engine_input(device, dtype)
    return ME.SparseTensor(x.feats, x.sites.coords)


def features(y) -> torch.Tensor:
    for name in ("feats", "features"):
        if hasattr(y, name):
            return getattr(y, name)
    return y


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


def minkowski_net() -> nn.Module:
    def conv(*channels, **how):
        return ME.MinkowskiConvolution(*channels, dimension=3, **how)

    return nn.Sequential(
        nn.Sequential(conv(4, 8, kernel_size=3), ME.MinkowskiBatchNorm(8), ME.MinkowskiReLU()),
        nn.Sequential(
            conv(8, 6, kernel_size=1, bias=True), ME.MinkowskiSyncBatchNorm(6), ME.MinkowskiReLU()
        ),
        conv(6, 5, kernel_size=2, stride=2, bias=True),
        ME.MinkowskiReLU(),
        ME.MinkowskiConvolutionTranspose(5, 3, kernel_size=2, stride=2, dimension=3),
        ME.MinkowskiBatchNorm(3),
        ME.MinkowskiPReLU(),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("net", "x", "left"),
    [
        (engine_net, engine_input, ["SubMConv3d", "SparseConv3d"]),
        (spconv_net, spconv_input, ["SubMConv3d", "SubMConv3d"]),
        (minkowski_net, minkowski_input, ["MinkowskiConvolution", "MinkowskiConvolution"]),
    ],
    ids=["engine", "spconv", "minkowski"],
)
def test_a_fused_network_is_the_same_function(device, net, x, left, dtype):
    net, x = settle(net()).to(device, dtype), x(device, dtype)
    fused = ts.fuse(net)
    with torch.no_grad():
        expected, out = features(net(x)), features(fused(x))
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


def test_a_folded_minkowski_network_says_so():
    fused = ts.fuse(settle(minkowski_net()))
    assert repr(fused[2]).endswith("dilation=[1, 1, 1], relu=True)")
    assert [type(child).__name__ for child in fused[3:]] == [
        "MinkowskiConvolutionTranspose", "MinkowskiPReLU",
    ]  # fmt: skip


@pytest.mark.parametrize("kernel_size", [3, 1])
@torch.no_grad()
def test_a_minkowski_layer_with_a_function_of_its_own_is_left_alone(kernel_size):
    """A layer of one tap is a matrix product, and does not call its function."""
    norm = ME.MinkowskiBatchNorm(6)
    net = settle(nn.Sequential(ME.MinkowskiConvolution(4, 6, kernel_size, dimension=3), norm))
    own = net[0].conv
    net[0].conv = SimpleNamespace(apply=lambda *args: own.apply(*args).clamp(min=0))
    norm.bn.weight.fill_(-1)
    x = minkowski_input("cpu")
    expected = net(x).F
    fused = ts.fuse(net, inplace=True)
    assert len(fused) == (2 if kernel_size == 3 else 1)
    torch.testing.assert_close(fused(x).F, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", UNLIKE)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_modules_that_run_other_code_are_left_alone(kind):
    make, left = UNLIKE[kind]
    net = make()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    # A ``forward`` on the instance refers to that instance, so a copy would run the original's
    # modules.
    x, net = engine_input("cpu"), net.eval()
    with torch.no_grad():
        expected = net(x).feats
        fused = ts.fuse(net, inplace=True)
        torch.testing.assert_close(fused(x).feats, expected, rtol=1e-5, atol=1e-5)
    assert len(fused) == left


def test_a_norm_in_training_mode_is_left_alone():
    net = three().eval()
    net[1].train()
    assert len(ts.fuse(net)) == 3


def test_a_norm_of_other_channels_still_raises():
    net = ts.fuse(three(norm=nn.BatchNorm1d(5)).eval())
    with pytest.raises(RuntimeError, match="should contain 6 elements not 5"):
        net(engine_input("cpu"))


def test_containers_that_do_not_run_in_order_are_left_alone():
    class Residual(tsnn.Sequential):
        def forward(self, x):
            return super().forward(x).replace(x.feats)

    class SpconvResidual(spconv.SparseSequential):
        def forward(self, x):
            return super().forward(x)

    patched = three()
    double_result(patched)
    for net in (
        Residual(*three()),
        SpconvResidual(spconv.SubMConv3d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU()),
        patched,
    ):
        assert len(ts.fuse(net.eval())) == 3


def test_classes_that_only_build_are_folded():
    class Conv(tsnn.SubMConv3d):
        def __init__(self):
            super().__init__(4, 6, 3)

    assert len(ts.fuse(three(conv=Conv()).eval())) == 1


def test_tied_weights_stay_those_of_the_other_layer():
    net = tsnn.Sequential(three(), tsnn.SubMConv3d(4, 6, 3))
    net[1].weight = net[0][0].weight
    x = engine_input("cpu")
    settle(net)
    with torch.no_grad():
        expected = net[1](x).feats
        assert torch.equal(ts.fuse(net)[1](x).feats, expected)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        ts.fuse(engine_net())
