"""Pools, norms, activations and containers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn as dense_nn

import tritonspconv.nn as nn
from tritonspconv.sparse_tensor import SparseTensor
from tritonspconv.testing import block_sites, random_sites


def tensor(n: int = 60, c: int = 4, ndim: int = 3, dtype=torch.float32, **how) -> SparseTensor:
    extent = {1: 60, 2: 10, 3: 6, 4: 4}[ndim]
    sites = random_sites(n, ndim, extent=extent, **how)
    return SparseTensor(torch.randn(n, c, dtype=dtype), sites)


@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["MaxPool", "AvgPool", "SumPool"])
def test_pools_in_every_dimension(name, ndim):
    x = tensor(ndim=ndim)
    y = getattr(nn, f"{name}{ndim}d")(2)(x)
    assert y.spatial_shape == tuple(n // 2 for n in x.spatial_shape)
    assert y.channels == x.channels
    if name == "SumPool":
        torch.testing.assert_close(y.feats.sum(0), x.feats.sum(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["max", "avg"])
def test_pools_equal_dense(name):
    sites = block_sites((6, 7, 5), 2)
    x = SparseTensor(torch.randn(sites.num_rows, 3), sites)
    layer = {"max": nn.MaxPool3d, "avg": nn.AvgPool3d}[name](3, 2)
    expected = {"max": F.max_pool3d, "avg": F.avg_pool3d}[name](x.dense(), 3, 2)
    torch.testing.assert_close(layer(x).dense(), expected)


def test_pool_settings():
    assert repr(nn.MaxPool2d(3, 2, 1, ties="all", floor=0.0)) == (
        "MaxPool2d(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), ties='all', floor=0.0)"
    )
    assert repr(nn.AvgPool1d(2, dilation=2, sites="cells")) == (
        "AvgPool1d(kernel_size=(2,), stride=(2,), dilation=(2,), sites='cells')"
    )
    x = tensor(lower=-3, bounded=False)
    assert nn.MaxPool3d(2, sites="cells", floor=0.0)(x).feats.min() >= 0
    assert nn.MaxPool3d(2, sites="cells")(x).feats.min() < 0


def test_global_pools():
    x = tensor(batch_size=3)
    rows = [x.feats[x.batch_index == b] for b in range(3)]
    for layer, how in (
        (nn.GlobalMaxPool(), lambda r: r.max(0).values),
        (nn.GlobalAvgPool(), lambda r: r.mean(0)),
        (nn.GlobalSumPool(), lambda r: r.sum(0)),
    ):
        torch.testing.assert_close(layer(x), torch.stack([how(r) for r in rows]))


def test_batch_norm_is_torch_s():
    x = tensor()
    ours, theirs = nn.BatchNorm(4), dense_nn.BatchNorm1d(4)
    for train in (True, True, False):
        ours.train(train)
        theirs.train(train)
        assert torch.equal(ours(x).feats, theirs(x.feats))
    assert ours(x).sites is x.sites
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_without_rows(affine):
    norm = nn.BatchNorm(4, affine=affine)
    before = copy.deepcopy(norm.state_dict())
    for training in (True, False):
        out = norm.train(training)(tensor(0))
        assert out.feats.shape == (0, 4)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    if affine:
        norm.train()(tensor(0)).feats.sum().backward()
        assert not norm.weight.grad.any()


def test_batch_norm_of_one_row():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm(4)(tensor(1))
    assert nn.BatchNorm(4).eval()(tensor(1)).num_rows == 1


def test_conversion_to_synchronised_norms():
    net = nn.Sequential(
        nn.BatchNorm(4), dense_nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm(4, affine=False))
    )
    net[0].running_mean += 1
    weights = net[0].weight
    keys = list(net.state_dict())
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net.eval())
    assert [type(net[0]), type(net[1]), type(net[2][0])] == [
        nn.SyncBatchNorm, dense_nn.SyncBatchNorm, nn.SyncBatchNorm,
    ]  # fmt: skip
    assert net[0].weight is weights
    assert net[0].running_mean.eq(1).all()
    assert not net[0].training
    assert list(net.state_dict()) == keys
    # Evaluation does not communicate with other processes.
    assert net[0](tensor()).num_rows == 60


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_instance_and_group_norm(dtype):
    x = tensor(dtype=torch.float64, c=6, batch_size=3)
    low = x.replace(x.feats.to(dtype))
    # The sample as a dense image in which every cell is active: [1, C, rows].
    for layer, how in (
        (nn.InstanceNorm(6), lambda r: F.instance_norm(r, eps=1e-5)),
        (nn.GroupNorm(3, 6), lambda r: F.group_norm(r, 3, eps=1e-5)),
        (nn.GroupNorm(1, 6), lambda r: F.group_norm(r, 1, eps=1e-5)),
    ):
        torch.nn.init.uniform_(layer.weight)
        torch.nn.init.uniform_(layer.bias)
        out = layer(low)
        assert out.dtype == dtype
        for b in range(3):
            rows = how(x.feats[x.batch_index == b].t()[None])[0].t()
            expected = rows * layer.weight + layer.bias
            tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2}[dtype]
            torch.testing.assert_close(
                out.feats[x.batch_index == b].double(), expected, atol=tolerance, rtol=tolerance
            )


def test_instance_norm_gradient():
    x = tensor(20, 4, dtype=torch.float64)
    layer = nn.GroupNorm(2, 4, dtype=torch.float64)
    feats = x.feats.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: layer(x.replace(f)).feats, feats)


@pytest.mark.parametrize("n", [0, 1])
def test_instance_norm_of_few_rows(n):
    layer = nn.InstanceNorm(4)
    out = layer(tensor(n))
    assert out.feats.shape == (n, 4)
    assert not out.feats.any()
    out.feats.sum().backward()


def test_norm_settings():
    assert repr(nn.InstanceNorm(4, affine=False)) == "InstanceNorm(4, eps=1e-05, affine=False)"
    assert repr(nn.GroupNorm(2, 4)) == "GroupNorm(2, 4, eps=1e-05, affine=True)"
    assert not list(nn.InstanceNorm(4, affine=False).parameters())
    with pytest.raises(ValueError, match="num_groups=3 must divide num_channels=4"):
        nn.GroupNorm(3, 4)
    with pytest.raises(ValueError, match="InstanceNorm: x must have 5 channels"):
        nn.InstanceNorm(5)(tensor())


@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.Linear(4, 5),
        lambda m: m.Identity(),
        lambda m: m.Dropout(0.5),
        lambda m: m.ReLU(),
        lambda m: m.LeakyReLU(0.2),
        lambda m: m.GELU(),
        lambda m: m.SiLU(),
        lambda m: m.Sigmoid(),
        lambda m: m.Tanh(),
        lambda m: m.LayerNorm(4),
    ],
)
def test_pointwise_layers_are_torch_s(make):
    x = tensor()
    ours, theirs = make(nn), make(dense_nn)
    theirs.load_state_dict(ours.state_dict())
    outs = []
    for run in (lambda: ours(x).feats, lambda: ours(x.feats), lambda: theirs(x.feats)):
        torch.manual_seed(0)
        outs.append(run())
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[2])
    assert ours(x).sites is x.sites
    assert repr(ours) == repr(theirs)


def test_sequential_mixes_sparse_and_plain_modules():
    class Block(nn.SparseModule):
        def __init__(self):
            super().__init__()
            self.conv = nn.SubMConv3d(8, 8, 3)

        def forward(self, x):
            return self.conv(x) + x

    net = nn.Sequential(
        nn.SubMConv3d(4, 8, 3),
        dense_nn.BatchNorm1d(8),
        dense_nn.Sequential(dense_nn.Linear(8, 8), dense_nn.ReLU()),
        Block(),
        nn.ToDense(),
        dense_nn.Conv3d(8, 2, 1),
    )
    x = tensor()
    assert net(x).shape == (2, 2, 6, 6, 6)
    assert list(net.state_dict())[:2] == ["0.weight", "0.bias"]
    assert nn.Sequential()(x) is x
    assert nn.Sequential(dense_nn.Linear(4, 2))(x).channels == 2


def test_to_dense():
    x = tensor()
    assert torch.equal(nn.ToDense()(x), x.dense())
    assert torch.equal(nn.ToDense(channels_first=False)(x), x.dense().movedim(1, -1))
    assert repr(nn.ToDense()) == "ToDense(channels_first=True)"
