"""Engine containers that run some of their layers as one.

``compat.spconv`` shares the rule; see tests/compat/spconv/test_fused_layers.py.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

import tritonspconv as ts
from tests._fused import UNLIKE, keeps_bits, record_fused, settle
from tritonspconv import nn as tsnn
from tritonspconv.kernels import batch_norm, gather_gemm, has_numba
from tritonspconv.nn import chain
from tritonspconv.nn._conv import Conv
from tritonspconv.testing import random_sites


@pytest.fixture(autouse=True)
def fused(monkeypatch) -> list[tuple[bool, bool]]:
    return record_fused(monkeypatch, Conv)


def tensor(device, dtype=torch.float32, n=80) -> ts.SparseTensor:
    sites = random_sites(n, extent=(9, 8, 7), device=device)
    return ts.SparseTensor(torch.randn(n, 4).to(device, dtype), sites)


def check(net: nn.Module, x: ts.SparseTensor) -> None:
    tolerance = 1e-12 if x.dtype == torch.float64 else 1e-5
    alone = copy.deepcopy(net)
    alone.fuse_layers = False
    with torch.no_grad():
        expected, y = alone(x), net(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y.feats, expected.feats, rtol=tolerance, atol=tolerance)
    assert torch.equal(y.coords, expected.coords)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(
    ("layer", "window"),
    [
        (tsnn.SubMConv3d, (3,)),
        (tsnn.SubMConv3d, (1,)),
        (tsnn.SparseConv3d, (3, 2, 1)),
        (tsnn.SparseConvTranspose3d, (2, 2)),
    ],
    ids=["submanifold", "pointwise", "strided", "transposed"],
)
def test_every_layer_is_what_its_modules_are(device, fused, layer, window, bias, dtype):
    x = tensor(device, dtype)
    for rest in (
        [settle(nn.BatchNorm1d(6, eps=1e-3)), nn.ReLU(inplace=True)],
        [settle(tsnn.BatchNorm(6, affine=False))],
        [settle(tsnn.SyncBatchNorm(6)), tsnn.ReLU()],
        [tsnn.ReLU(), settle(tsnn.BatchNorm(6))],
    ):
        net = tsnn.Sequential(layer(4, 6, *window, bias=bias), *rest).to(device, dtype)
        check(net, x)
    assert fused == [(True, True), (True, False), (True, True), (False, True)]


def test_folded_layers_and_other_sites_stay(device, fused):
    x = tensor(device)
    net = tsnn.Sequential(tsnn.SubMConv3d(4, 6, 3), nn.ReLU(), nn.BatchNorm1d(6)).to(device).eval()
    check(ts.fuse(net), x)
    assert not fused
    up = tsnn.SparseConvTranspose3d(4, 4, 2, 2).to(device)
    with torch.no_grad():
        assert up(tsnn.SparseConv3d(4, 4, 2, 2).to(device)(x), like=x).sites is x.sites


def test_a_training_step_is_that_of_the_modules(device, fused):
    conv = tsnn.SubMConv3d(4, 6, 3, bias=False)
    net = tsnn.Sequential(conv, tsnn.BatchNorm(6), tsnn.ReLU()).to(device)
    x, results = tensor(device), []
    for fuse_layers in (True, False):
        trained = copy.deepcopy(net)
        trained.fuse_layers = fuse_layers
        out = trained(x).feats
        (out * torch.linspace(-1, 1, out.numel(), device=device).view_as(out)).sum().backward()
        grads = [parameter.grad for parameter in trained.parameters()]
        results.append([out, *grads, *trained.buffers()])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert fused == [(True, True)]


def test_what_is_not_fused(device, fused):
    x = tensor(device)
    net = tsnn.Sequential(tsnn.SubMConv3d(4, 6, 3), tsnn.BatchNorm(6), tsnn.ReLU()).to(device)
    with torch.no_grad():
        net.eval()
        with net[1].register_forward_hook(lambda *args: None):
            net(x)
        net.fuse_layers = False
        net(x)
        assert not fused
        net.fuse_layers = True
        y = net(x).feats
        for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(copied(x).feats, y)
    assert fused == [(True, True)] * 3


@pytest.mark.parametrize("kind", UNLIKE)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_modules_that_run_other_code_run_it(fused, kind, training):
    net, x = UNLIKE[kind][0]().train(training), tensor("cpu")
    results = []
    for fuse_layers in (True, False):
        net.fuse_layers = fuse_layers
        with torch.set_grad_enabled(training):
            results.append(net(x).feats)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_dtypes_that_torch_refuses_are_refused(device):
    """Operands of different dtypes are promoted; the norm has to fit the result."""
    x = tensor(device, torch.float64)
    net = tsnn.Sequential(tsnn.SubMConv3d(4, 6, 3), settle(nn.BatchNorm1d(6))).to(device)
    with torch.no_grad(), pytest.raises(RuntimeError):
        net(x)
    net[1].double()
    check(net, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_kernels_fuse_evaluation_and_a_cpu_keeps_its_bits(
    device, fused, monkeypatch, bias, affine, dtype
):
    """Layers fuse where the package fuses them; the fixture of this file fuses everywhere."""
    monkeypatch.setattr(chain, "fuses_on", gather_gemm.fuses_epilogue)
    monkeypatch.setattr(chain, "trains_on", batch_norm.fuses_training)
    norm = settle(tsnn.BatchNorm(33, affine=affine))
    net = tsnn.Sequential(tsnn.SubMConv3d(4, 33, 3, bias=bias), norm, tsnn.ReLU())
    net, x = net.to(device, dtype), tensor(device, dtype)
    check(net, x)
    assert fused == [(True, True)] * (device.type == "cuda" or has_numba(device))
    if keeps_bits(device):
        with torch.no_grad():
            y = net(x).feats
            net.fuse_layers = False
            assert torch.equal(y, net(x).feats)
    fused.clear()
    net.train().fuse_layers = True
    for has_gradients in (False, True):
        with torch.set_grad_enabled(has_gradients):
            net.float()(tensor(device))
    assert len(fused) == 2 * (device.type == "cuda")
