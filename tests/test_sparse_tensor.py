"""SparseTensor: construction, metadata and conversions."""

import copy
import pickle

import pytest
import torch

from tritonspconv import ConvGeometry, kernel_map, ops
from tritonspconv.coords import ActiveSites
from tritonspconv.sparse_tensor import SparseTensor, cat
from tritonspconv.testing import random_sites

COORDS = torch.tensor([[0, 1, 2], [1, 0, 4], [0, 3, 3]], dtype=torch.int32)


def make(**how) -> SparseTensor:
    return SparseTensor(torch.arange(6.0).reshape(3, 2), COORDS, **how)


def test_metadata():
    x = make(spatial_shape=(4, 5))
    assert torch.equal(x.coords, COORDS)
    assert x.batch_index.tolist() == [0, 1, 0]
    assert (x.spatial_shape, x.batch_size, x.ndim, x.num_rows, x.channels) == ((4, 5), 2, 2, 3, 2)
    assert (x.device, x.dtype) == (torch.device("cpu"), torch.float32)
    assert x.sites.grid.bounded
    assert repr(x) == (
        "SparseTensor(feats=[3, 2] torch.float32 on cpu, batch_size=2, spatial_shape=(s0=4, s1=5))"
    )


@pytest.mark.parametrize("shape", [None, (4, 5)], ids=str)
def test_coordinates_are_a_copy(shape):
    """If the caller writes to the tensor that it passed, the sparse tensor does not change."""
    coords = COORDS.clone()
    x = SparseTensor(torch.ones(3, 2), coords, spatial_shape=shape)
    weight = torch.randn(9, 2, 2)

    def convolve(dilation):
        found = kernel_map(x.sites, ConvGeometry.submanifold((3, 3), (dilation,) * 2))
        return ops.sparse_conv(x.feats, weight, found)

    expected = convolve(1)
    coords[:, 1:] = 0
    coords.numpy()[:] = 0
    assert torch.equal(x.coords, COORDS)
    assert torch.equal(convolve(1), expected)
    # In a map that is made afterwards, no site has a neighbour.
    assert torch.equal(convolve(5), x.feats @ weight[4])


def test_batch_size_may_exceed_what_is_seen():
    assert make(spatial_shape=[4, 5], batch_size=7).batch_size == 7
    assert make(batch_size=7).batch_size == 7


def test_unbounded():
    x = SparseTensor(torch.ones(3, 1), COORDS - torch.tensor([0, 9, 9], dtype=torch.int32))
    assert (x.spatial_shape, x.batch_size) == ((4, 3), 2)
    assert not x.sites.grid.bounded
    assert x.sites.grid.lower == (-9, -7)
    assert "spatial_shape=(s0=4, s1=3), lower=(-9, -7)" in repr(x)
    assert x.dense().shape == (2, 1, 4, 3)


@pytest.mark.parametrize("how", [{}, {"spatial_shape": (4, 4)}, {"batch_size": 3}], ids=str)
def test_no_rows(how):
    x = SparseTensor(torch.ones(0, 2), COORDS[:0], **how)
    assert x.num_rows == 0
    assert x.batch_size == how.get("batch_size", 0)
    assert x.dense().shape == (x.batch_size, 2, *x.spatial_shape)


def test_replace_keeps_the_sites():
    x = make(spatial_shape=(4, 5))
    y = x.replace(torch.ones(3, 7))
    assert y.sites is x.sites
    assert y.channels == 7
    with pytest.raises(ValueError, match=r"feats must have shape \[3, C\].*got \[2, 7\]"):
        x.replace(torch.ones(2, 7))
    with pytest.raises(AttributeError):
        x.feats = y.feats


def test_add():
    x = make(spatial_shape=(4, 5))
    assert torch.equal((x + x).feats, 2 * x.feats)
    assert (x + x).sites is x.sites
    with pytest.raises(ValueError, match=r"\+ needs both operands at the same sites"):
        x + make(spatial_shape=(4, 5))
    with pytest.raises(TypeError):
        x + 1


@pytest.mark.parametrize("channels_first", [True, False])
def test_dense_round_trip(channels_first):
    x = make(spatial_shape=(4, 5))
    dense = x.dense(channels_first=channels_first)
    assert dense.shape == ((2, 2, 4, 5) if channels_first else (2, 4, 5, 2))
    y = SparseTensor.from_dense(dense, channels_first=channels_first)
    assert (y.spatial_shape, y.batch_size, y.num_rows) == ((4, 5), 2, 3)
    assert torch.equal(y.dense(channels_first=channels_first), dense)


def test_to():
    x = make(spatial_shape=(4, 5))
    assert x.to("cpu") is x
    half = x.to(torch.float16)
    assert half.dtype == torch.float16
    assert half.sites is x.sites
    moved = x.to("meta")
    assert moved.device == moved.coords.device == torch.device("meta")
    assert moved.sites.grid == x.sites.grid


def test_gradients_pass():
    feats = torch.ones(3, 2, requires_grad=True)
    x = SparseTensor(feats, COORDS)
    (x + x).to(torch.float64).dense().sum().backward()
    assert (feats.grad == 2).all()


def test_copies_and_pickles():
    x = make(spatial_shape=(4, 5))
    for y in (copy.copy(x), copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert torch.equal(y.feats, x.feats)
        assert torch.equal(y.coords, x.coords)
        assert y.sites.grid == x.sites.grid


def test_takes_active_sites():
    sites = random_sites(8)
    assert SparseTensor(torch.ones(8, 1), sites).sites is sites
    with pytest.raises(ValueError, match="bring their own grid"):
        SparseTensor(torch.ones(8, 1), sites, batch_size=2)


def test_full_check():
    SparseTensor(torch.ones(3, 1), COORDS, spatial_shape=(4, 5), check="full")
    with pytest.raises(ValueError, match="outside the grid"):
        SparseTensor(torch.ones(3, 1), COORDS, spatial_shape=(3, 5), check="full")
    twice = ActiveSites(COORDS[[0, 0, 1]], make(spatial_shape=(4, 5)).sites.grid)
    with pytest.raises(ValueError, match="repeat an earlier row"):
        SparseTensor(torch.ones(3, 1), twice, check="full")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"coords": COORDS.long()}, TypeError, "coords must be int32; got torch.int64"),
        ({"coords": COORDS[:, :1]}, ValueError, r"shape \[N, 1 \+ D\].*got \[3, 1\]"),
        ({"coords": COORDS[0]}, ValueError, r"shape \[N, 1 \+ D\].*got \[3\]"),
        ({"feats": torch.ones(4, 2)}, ValueError, r"shape \[3, C\].*got \[4, 2\]"),
        ({"feats": torch.ones(3)}, ValueError, r"shape \[3, C\].*got \[3\]"),
        (
            {"feats": torch.ones(3, 2, device="meta")},
            ValueError,
            "share a device; got meta and cpu",
        ),
        ({"spatial_shape": (4, 5, 6)}, ValueError, r"must have 2 entries.*got \(4, 5, 6\)"),
        ({"batch_size": 1}, ValueError, "batch_size must be at least 2; got 1"),
        ({"coords": -COORDS}, ValueError, "batch indices must not be negative"),
        ({"check": "some"}, ValueError, "check must be one of .*got 'some'"),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        SparseTensor(**({"feats": torch.ones(3, 2), "coords": COORDS} | change))


def test_what_people_type_first():
    x = make_tensor_of_channels(4)
    assert len(x) == x.num_rows
    assert x.shape == x.feats.shape
    for dtype, name in [
        (torch.float16, "half"),
        (torch.bfloat16, "bfloat16"),
        (torch.float64, "double"),
    ]:
        converted = getattr(x, name)()
        assert converted.dtype == dtype
        assert converted.sites is x.sites
        assert converted.float().dtype == torch.float32
    assert x.cpu() is x
    y = x.replace(x.feats.clone().requires_grad_())
    assert not y.detach().feats.requires_grad
    assert y.detach().feats.data_ptr() == y.feats.data_ptr()
    both = cat([x, x + x])
    assert torch.equal(both.feats, torch.cat([x.feats, 2 * x.feats], dim=1))
    assert both.sites is x.sites
    with pytest.raises(ValueError, match=r"cat: all tensors must be at the same sites.* number 1"):
        cat([x, make_tensor_of_channels(4)])
    with pytest.raises(ValueError, match=r"cat: tensors must hold at least one SparseTensor"):
        cat([])


def make_tensor_of_channels(channels: int) -> SparseTensor:
    sites = random_sites(20, extent=9)
    return SparseTensor(torch.randn(20, channels), sites)
