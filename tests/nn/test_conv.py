"""Convolution layers: dense equality, settings and the pairing of inverse layers."""

import math

import pytest
import torch
from torch import nn as dense_nn

from tritonspconv import nn
from tritonspconv.sparse_tensor import SparseTensor
from tritonspconv.testing import block_sites, random_sites

CONVS = {
    "SubMConv": {},
    "SparseConv": {"stride": 2, "padding": 1},
    "SparseConvTranspose": {"stride": 2, "padding": 1},
    "SparseInverseConv": {},
}


def tensor(n: int = 60, c: int = 4, ndim: int = 3, **how) -> SparseTensor:
    """Random sites and features; four axes get a smaller box, one axis a longer one."""
    extent = {1: 60, 2: 10, 3: 6, 4: 4}[ndim]
    sites = random_sites(n, ndim, extent=extent, **how)
    return SparseTensor(torch.randn(n, c).to(sites.device), sites)


def block(shape: tuple[int, ...], c: int) -> SparseTensor:
    sites = block_sites(shape, 2)
    return SparseTensor(torch.randn(sites.num_rows, c, dtype=torch.float64), sites)


@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CONVS)
def test_every_dimension(name, ndim):
    layer = getattr(nn, f"{name}{ndim}d")(4, 5, 3, **CONVS[name])
    x = tensor(ndim=ndim)
    if name == "SparseInverseConv":
        y = layer(getattr(nn, f"SparseConv{ndim}d")(4, 4, 3, 2, 1)(x), x)
    else:
        y = layer(x)
    assert layer.weight.shape == (3**ndim, 4, 5)
    assert y.ndim == ndim
    assert y.channels == 5
    if name in ("SubMConv", "SparseInverseConv"):
        assert y.sites is x.sites
    y.feats.square().sum().backward()
    assert all(p.grad.any() for p in layer.parameters())


def as_dense(weight: torch.Tensor, k: tuple[int, ...], transposed: bool) -> torch.Tensor:
    """Turn [V, c_in, c_out] into the layout of torch's dense layers."""
    split = weight.detach().unflatten(0, k).movedim((-1, -2), (0, 1))
    return split.transpose(0, 1) if transposed else split


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("SubMConv", {}),
        ("SubMConv", {"dilation": 2}),
        ("SparseConv", {"stride": 2, "padding": 1}),
        ("SparseConv", {"dilation": 2, "padding": 2, "bias": False}),
        ("SparseConvTranspose", {"stride": 2, "padding": 1, "output_padding": 1}),
    ],
    ids=str,
)
def test_equals_dense(name, how, ndim):
    """If every cell is active, the result is that of torch."""
    k = (3,) * ndim
    layer = getattr(nn, f"{name}{ndim}d")(3, 4, 3, dtype=torch.float64, **how)
    transposed = name == "SparseConvTranspose"
    kind = f"ConvTranspose{ndim}d" if transposed else f"Conv{ndim}d"
    if name == "SubMConv":
        how = how | {"padding": how.get("dilation", 1)}
    dense = getattr(dense_nn, kind)(3, 4, 3, dtype=torch.float64, **how)
    dense.weight.data = as_dense(layer.weight, k, transposed)
    if layer.bias is not None:
        dense.bias.data = layer.bias.detach()
    x = block((5, 6, 4)[:ndim], 3)
    torch.testing.assert_close(layer(x).dense(), dense(x.dense()))


def test_initial_weights():
    layer = nn.SparseConv3d(8, 16, (3, 3, 1))
    bound = 1 / math.sqrt(8 * 9)
    for parameter in (layer.weight, layer.bias):
        assert parameter.abs().max() <= bound
    assert layer.weight.abs().max() > 0.95 * bound
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)


def test_device_and_dtype():
    layer = nn.SubMConv2d(3, 4, 3, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}
    assert [name for name, _ in nn.SubMConv2d(3, 4, 3, bias=False).named_parameters()] == ["weight"]


def test_repr():
    assert repr(nn.SubMConv3d(3, 4, 3)) == "SubMConv3d(3, 4, kernel_size=(3, 3, 3))"
    assert repr(nn.SparseConv2d(3, 4, 2, 2, bias=False, sites="cells", precision="tf32")) == (
        "SparseConv2d(3, 4, kernel_size=(2, 2), stride=(2, 2), sites='cells', bias=False, "
        "precision='tf32')"
    )
    assert repr(nn.SparseConvTranspose1d(3, 4, 3, 2, 1, 1, 2)) == (
        "SparseConvTranspose1d(3, 4, kernel_size=(3,), stride=(2,), padding=(1,), dilation=(2,), "
        "output_padding=(1,))"
    )
    assert (
        repr(nn.SparseInverseConv3d(3, 4, 2)) == "SparseInverseConv3d(3, 4, kernel_size=(2, 2, 2))"
    )


def test_two_branches_meet_at_the_same_sites():
    x = tensor()
    y = nn.SparseConv3d(4, 5, 3, 2, 1)(x) + nn.SparseConv3d(4, 5, 3, 2, 1)(x)
    assert y.channels == 5


@pytest.mark.parametrize(
    "layer", [nn.SparseConv3d(5, 2, 3, 1, 1), nn.SparseConvTranspose3d(5, 2, 2, 2)]
)
def test_outputs_at_given_sites(layer):
    x = tensor()
    coarse = nn.SparseConv3d(4, 5, 2, 2)(x)
    source = x.replace(torch.randn(60, 5)) if layer.geometry.stride[0] == 1 else coarse
    y = layer(source, like=x)
    assert y.sites is x.sites
    assert y.channels == 2


@pytest.mark.parametrize("down", [nn.SparseConv3d(4, 5, 3, 2, 1), nn.MaxPool3d(3, 2, 1)], ids=repr)
def test_inverse_is_the_transpose_of_the_layer_it_undoes(down):
    x = tensor()
    x = x.replace(x.feats.double())
    coarse = down.double()(x)
    forward = nn.SparseConv3d(2, 3, 3, 2, 1, bias=False, dtype=torch.float64)
    inverse = nn.SparseInverseConv3d(3, 2, 3, bias=False, dtype=torch.float64)
    inverse.weight.data = forward.weight.detach().transpose(1, 2).contiguous()
    a = x.replace(torch.randn(60, 2, dtype=torch.float64))
    b = coarse.replace(torch.randn(coarse.num_rows, 3, dtype=torch.float64))
    torch.testing.assert_close(
        (forward(a).feats * b.feats).sum(), (a.feats * inverse(b, x).feats).sum()
    )


def test_inverse_finds_its_layer_or_says_so():
    x = tensor()
    down = nn.SparseConv3d(4, 4, 3, 2, 1)
    coarse = down(x)
    assert down(x).sites is coarse.sites
    inverse = nn.SparseInverseConv3d(4, 4, 3)
    assert inverse(coarse, x).sites is x.sites
    with pytest.raises(ValueError, match=r"no layer with kernel_size=\(3, 3, 3\) led from like="):
        inverse(coarse, tensor())
    with pytest.raises(ValueError, match=r"no layer with kernel_size=\(2, 2, 2\)"):
        nn.SparseInverseConv3d(4, 4, 2)(coarse, x)
    nn.SparseConv3d(4, 4, 3, 2, 1, dilation=2)(x, like=coarse)
    with pytest.raises(ValueError, match="2 layers of different geometry"):
        inverse(coarse, x)


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(n):
    x = tensor(n)
    net = nn.Sequential(nn.SubMConv3d(4, 5, 3), nn.SparseConv3d(5, 6, 3, 2, 1))
    y = net(x)
    y.feats.sum().backward()
    assert y.num_rows >= n
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_network(dtype, device):
    net = nn.Sequential(
        nn.SubMConv3d(4, 16, 3), nn.BatchNorm(16), nn.ReLU(), nn.SparseConv3d(16, 32, 3, 2, 1),
        nn.MaxPool3d(2), nn.GlobalAvgPool(), dense_nn.Linear(32, 3),
    ).to(device)  # fmt: skip
    with torch.autocast(device, dtype):
        out = net(tensor(device=device))
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in net.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.SubMConv3d(0, 4, 3), "SubMConv3d: in_channels must be at least 1; got 0"),
        (lambda: nn.SparseConv3d(4, 0, 3), "SparseConv3d: out_channels must be at least 1; got 0"),
        (lambda: nn.SparseConv3d(4, 4, (3, 3)), "kernel_size must be an int or have 3 entries"),
        (lambda: nn.SparseConv3d(4, 4, 3, stride=0), "stride must be at least 1"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
