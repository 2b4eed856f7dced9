"""Coordinates far out stay apart and never wrap around; large strides list no taps."""

import pytest
import torch

import compat.minkowski as ME
from compat.minkowski.MinkowskiKernelGenerator import Window
from tests.compat.minkowski import _oracle as oracle
from tritonspconv.geometry import ConvGeometry

LAST, FIRST = 2**31 - 1, -(2**31)


def line(*x, device="cpu", tensor_stride=1):
    """Return a tensor of one axis with sites at ``x`` and features 1, 2, ..."""
    coords = torch.tensor([[0, value] for value in x], dtype=torch.int32, device=device)
    feats = torch.arange(1.0, len(x) + 1, device=device)[:, None]
    return ME.SparseTensor(feats, coords, tensor_stride=tensor_stride)


@pytest.mark.parametrize("cls", ["GenerativeConvolutionTranspose", "ConvolutionTranspose"])
@pytest.mark.parametrize("kernel_size", [2, 4], ids=["apart", "overlapping"])
def test_generated_sites_never_wrap(cls, kernel_size, device):
    layer = getattr(ME, f"Minkowski{cls}")(1, 1, kernel_size=kernel_size, stride=2, dimension=1)
    layer = layer.to(device)
    far = line(0, LAST - 1, device=device, tensor_stride=2**30)
    with pytest.raises(ValueError, match="int32"):
        layer(far)


@pytest.mark.parametrize("cls", ["GenerativeConvolutionTranspose", "ConvolutionTranspose"])
def test_generated_sites_reach_the_end_of_int32(cls, device):
    layer = getattr(ME, f"Minkowski{cls}")(1, 1, kernel_size=2, stride=2, dimension=1).to(device)
    y = layer(line(LAST - 1, FIRST, device=device, tensor_stride=2))
    assert y.C[:, 1].tolist() == [LAST - 1, LAST, FIRST, FIRST + 1]
    wide = getattr(ME, f"Minkowski{cls}")(1, 1, kernel_size=3, stride=2, dimension=1).to(device)
    with pytest.raises(RuntimeError, match="which int32 cannot hold"):
        wide(line(FIRST, device=device, tensor_stride=2))


def test_sites_of_windows_that_lie_apart_never_wrap(device):
    layer = ME.MinkowskiGenerativeConvolutionTranspose(1, 1, kernel_size=3, stride=3, dimension=1)
    layer = layer.to(device)
    assert layer(line(FIRST + 11, device=device, tensor_stride=9)).C[:, 1].tolist() == [
        FIRST + 8, FIRST + 11, FIRST + 14,
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="which int32 cannot hold"):
        layer(line(FIRST + 2, device=device, tensor_stride=9))


def test_expanded_sites_never_wrap(device):
    layer = ME.MinkowskiConvolution(1, 1, kernel_size=3, expand_coordinates=True, dimension=1)
    with pytest.raises(RuntimeError, match="which int32 cannot hold"):
        layer.to(device)(line(LAST, device=device))


def test_strided_sites_never_wrap(device):
    x = line(FIRST, device=device)
    assert ME.MinkowskiSumPooling(2, 2, dimension=1)(x).C.tolist() == [[0, FIRST]]
    for make in (
        lambda: ME.MinkowskiSumPooling(3, 3, dimension=1)(x),
        lambda: ME.MinkowskiConvolution(1, 1, kernel_size=2, stride=3, dimension=1).to(device)(x),
        lambda: ME.TensorField(x.F, x.C.double()).sparse(3),
    ):
        with pytest.raises(RuntimeError, match="int32"):
            make()
    # The cell of the first coordinate would wrap around to that of the last.
    manager = x.coordinate_manager
    key, _ = manager.insert_and_map(torch.tensor([[0, LAST]], device=device), 3)
    rows, cells = manager.stride_map(x.coordinate_map_key, key)
    assert len(rows) == len(cells) == 0


def test_windows_do_not_reach_around(device):
    """The neighbour of the last coordinate is not the first."""
    x = line(FIRST, LAST, device=device)
    layer = ME.MinkowskiConvolution(1, 1, kernel_size=3, dimension=1).to(device)
    torch.testing.assert_close(layer(x).F, x.F * layer.kernel[1])
    points = torch.tensor([[0, LAST + 0.5], [0, FIRST - 0.5]], dtype=torch.float64, device=device)
    x = x.double()
    assert x.features_at_coordinates(points).flatten().tolist() == [1.0, 0.5]


def test_interpolation_far_outside_finds_nothing(device):
    x = line(0, 1, device=device, tensor_stride=2).double()
    far = torch.tensor([[0, v] for v in (2.0**63, -(2.0**63), 1e300, float("inf"))])
    found = x.features_at_coordinates(far.double().to(device))
    assert not found[:3].any()


def test_splat_at_the_end_of_int32_is_refused(device):
    points = torch.tensor([[0, LAST - 0.5]], dtype=torch.float64, device=device)
    field = ME.TensorField(torch.ones(1, 1, dtype=torch.float64, device=device), points)
    assert field.splat().C.tolist() == [[0, LAST - 1], [0, LAST]]
    field = ME.TensorField(torch.ones(1, 1, dtype=torch.float64, device=device), points + 1)
    with pytest.raises(ValueError, match="fit int32"):
        field.splat()


NEAR = [2**24, 2**24 + 1, -(2**24) - 1, 2**30 + 1, 2**30]


def test_integer_coordinates_beyond_2_to_the_24_stay_apart(device):
    """Float32 does not tell 2**24 and 2**24 + 1 apart."""
    x = line(*NEAR, device=device)
    assert x.C[:, 1].tolist() == NEAR
    coords = x.C.long()
    with pytest.warns(UserWarning, match="rounded down from torch.int64"):
        assert ME.SparseTensor(x.F, coords).C.tolist() == coords.tolist()
    assert ME.TensorField(x.F, x.C).sparse().C.tolist() == coords.tolist()
    assert ME.utils.sparse_quantize(x.C.cpu()).tolist() == coords.tolist()
    assert ME.utils.batched_coordinates([x.C[:, 1:]]).tolist() == coords.tolist()
    pooled = ME.MinkowskiSumPooling(2, 2, dimension=1)(x)
    assert pooled.C[:, 1].tolist() == sorted({v // 2 * 2 for v in NEAR})
    layer = ME.MinkowskiConvolution(1, 1, kernel_size=3, dimension=1).to(device)
    expected = oracle.conv(x.C, x.F, layer.kernel, x.C, oracle.taps((3,)), (1,))
    torch.testing.assert_close(layer(x).F, expected)


@pytest.fixture
def few_taps(monkeypatch):
    """Fail a test that lists the taps of a large window."""
    listed = ConvGeometry.offsets.func

    def offsets(geometry):
        assert geometry.kernel_volume <= 1000, f"a list of {geometry.kernel_volume} offsets"
        return listed(geometry)

    def cells(window):
        raise AssertionError(f"a list of the taps of {window}")

    monkeypatch.setattr(ConvGeometry, "offsets", property(offsets))
    monkeypatch.setattr(Window, "cells", cells)


@pytest.mark.parametrize("stride", [64, 1000, 10**6, [7, 10**6, 1]], ids=str)
def test_large_strides_list_no_taps(stride, device, few_taps):
    strides = [stride] * 3 if isinstance(stride, int) else stride
    coords = torch.randint(-3000, 3000, (50, 4), generator=torch.Generator().manual_seed(0))
    coords[:, 0] = torch.arange(50) % 2
    x = ME.SparseTensor(torch.randn(50, 2).to(device), coords.int().to(device))
    cell_of = [oracle.cell(tuple(c), strides) for c in x.C.tolist()]
    cells = sorted(set(cell_of))
    rows = [[r for r, c in enumerate(cell_of) if c == cell] for cell in cells]
    pooled = ME.MinkowskiSumPooling(stride, stride, dimension=3)(x)
    assert [tuple(c) for c in pooled.C.tolist()] == cells
    torch.testing.assert_close(pooled.F, torch.stack([x.F[own].sum(0) for own in rows]))
    for kernel_size in (1, 2, 3):
        conv = ME.MinkowskiConvolution(
            2, 2, kernel_size=kernel_size, stride=stride, dimension=3
        ).to(device)
        y = conv(x)
        taps = oracle.taps((kernel_size,) * 3)
        expected = oracle.conv(x.C, x.F, conv.kernel, y.C, taps, (1, 1, 1))
        torch.testing.assert_close(y.F, expected)
    up = ME.MinkowskiPoolingTranspose(stride, stride, dimension=3)(pooled)
    assert up.coordinate_map_key == x.coordinate_map_key
    torch.testing.assert_close(up.F, pooled.F[[cells.index(c) for c in cell_of]])
    manager = x.coordinate_manager
    pairs = manager.kernel_map(
        x.coordinate_map_key, pooled.coordinate_map_key, stride=stride, kernel_size=stride,
        is_pool=True,
    )[0]  # fmt: skip
    assert pairs.tolist() == [list(range(50)), [cells.index(c) for c in cell_of]]


def test_strides_by_name_and_then_without(device):
    x = line(0, 1, 2, 5, device=device)
    manager, key = x.coordinate_manager, x.coordinate_map_key
    named = manager.stride(key, 2, "own")
    assert named.get_key() == ([2], "own")
    plain = manager.stride(key, 2)
    assert plain.get_key() == ([2], "")
    assert manager.stride(key, 2, "own") == named
    assert manager.stride(named, 2).get_key() == ([4], "own")
    for each in (named, plain):
        assert manager.get_coordinates(each)[:, 1].tolist() == [0, 2, 4]
    pooled = ME.MinkowskiSumPooling(2, 2, dimension=1)(x)
    assert pooled.coordinate_map_key == plain
