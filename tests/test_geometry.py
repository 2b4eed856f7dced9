"""The relation's bookkeeping: checks, taps, mirroring, output shapes and ranges."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from tests._oracle import expected_out_coords, fields
from tests._strategies import geometries, site_sets
from tritonspconv import reference
from tritonspconv.geometry import ConvGeometry, to_ntuple

DOWN2 = ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))


@given(geometries())
def test_offsets_follow_the_taps(geometry):
    taps = reference.taps(geometry.kernel_size, geometry.tap_order)
    expected = [
        tuple(d * t - p for t, p, d in zip(tap, geometry.padding, geometry.dilation, strict=True))
        for tap in taps
    ]
    assert list(geometry.offsets) == expected
    assert geometry.kernel_volume == len(expected)
    assert geometry.ndim == len(geometry.kernel_size)


@given(geometries())
def test_mirrored_means_that_tap_pairs_are_opposite(geometry):
    opposite = [tuple(-x for x in offset) for offset in geometry.offsets[::-1]]
    assert geometry.is_mirrored == (geometry.sites == "same" and opposite == list(geometry.offsets))


@pytest.mark.parametrize(
    ("kernel_size", "mirrored"), [((3, 5, 1), True), ((1,), True), ((2,), False), ((3, 4), False)]
)
def test_odd_submanifold_windows_are_mirrored(kernel_size, mirrored):
    dilation = (2,) * len(kernel_size)
    for order in ("last_axis_fastest", "first_axis_fastest"):
        geometry = ConvGeometry.submanifold(kernel_size, dilation, order)
        assert geometry.is_mirrored == mirrored
        assert (0,) * geometry.ndim in geometry.offsets
        assert geometry.tap_order == order


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5])
def test_no_input_feeds_more_outputs_than_the_bound(kernel_size, stride, dilation, transposed):
    geometry = ConvGeometry((kernel_size,), (stride,), (1,), (dilation,), transposed=transposed)
    fed = []
    for x in range(2 * stride):
        coords = torch.tensor([[0, x]], dtype=torch.int32)
        out = reference.output_sites(coords, *fields(geometry), transposed=transposed)
        triples = reference.relation(coords, out, *fields(geometry), transposed=transposed)
        fed.append(len(triples))
    bound = geometry.max_outputs_per_input
    assert max(fed) <= bound <= kernel_size
    if dilation == 1:
        assert max(fed) == bound


def test_bounds_of_the_axes_multiply():
    assert ConvGeometry((3, 2, 5), (2, 2, 3), (0,) * 3, (1,) * 3).max_outputs_per_input == 2 * 1 * 2


@given(st.data())
def test_output_range_is_tight(data):
    """Each end is reached by a full box of inputs, and nothing lies beyond."""
    ndim = data.draw(st.integers(1, 2))
    geometry = data.draw(geometries(ndim))
    lower = data.draw(st.tuples(*[st.integers(-7, 7)] * ndim))
    upper = tuple(lo + data.draw(st.integers(0, 9)) for lo in lower)
    low, high = geometry.output_range(lower, upper)

    box = itertools.product(*(range(lo, hi + 1) for lo, hi in zip(lower, upper, strict=True)))
    coords = torch.tensor([(0, *cell) for cell in box], dtype=torch.int32)
    if geometry.sites == "same":
        assert (low, high) == (lower, upper)
        return
    out = reference.output_sites(
        coords, *fields(geometry), transposed=geometry.transposed, rule=geometry.sites
    )[:, 1:]
    if len(out) == 0:
        return
    assert (out >= torch.tensor(low)).all()
    assert (out <= torch.tensor(high)).all()
    axes = zip(geometry.kernel_size, geometry.stride, geometry.dilation, strict=True)
    gaps = any(k < s or d > 1 for k, s, d in axes)
    if not gaps or geometry.transposed or geometry.sites == "cells":
        assert tuple(out.amin(0).tolist()) == low
        assert tuple(out.amax(0).tolist()) == high


@given(st.data())
def test_generated_sites_lie_in_the_output_range(data):
    geometry = data.draw(geometries(kinds=("reached", "transposed", "cells")))
    sites = data.draw(site_sets(geometry.ndim, bounded=False))
    assume(sites.num_rows)
    low, high = geometry.output_range(sites.grid.lower, sites.grid.upper)
    out = expected_out_coords(sites, geometry)[:, 1:]
    assert (out >= torch.tensor(low)).all()
    assert (out <= torch.tensor(high)).all()


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
def test_output_shape_is_the_dense_one(kernel_size, stride, padding, dilation, transposed):
    extra = int(transposed and max(stride, dilation) > 1)
    geometry = ConvGeometry(
        (kernel_size,), (stride,), (padding,), (dilation,), transposed=transposed,
        output_padding=(extra,) if transposed else (),
    )  # fmt: skip
    weight = torch.zeros(1, 1, kernel_size)
    for n in (14, 15, 16, 17):
        x = torch.zeros(1, 1, n)
        if transposed:
            out = F.conv_transpose1d(x, weight, None, stride, padding, extra, dilation=dilation)
        else:
            out = F.conv1d(x, weight, None, stride, padding, dilation)
        assert geometry.output_shape((n,)) == tuple(out.shape[2:])


def test_output_shape_of_a_submanifold_geometry_is_the_input_shape():
    geometry = ConvGeometry.submanifold((3, 2), (1, 3))
    assert geometry.output_shape((7, 1)) == (7, 1)
    assert geometry.output_range((-1, 2), (5, 3)) == ((-1, 2), (5, 3))


def test_output_shape_may_be_less_than_one():
    geometry = ConvGeometry((5,), (1,), (0,), (1,))
    assert geometry.output_shape((3,)) == (-1,)


def test_geometries_are_values():
    again = ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))
    again.offsets, again.is_mirrored  # noqa: B018 - cached properties are no part of the value
    assert again == DOWN2
    assert hash(again) == hash(DOWN2)
    assert again.output_padding == (0, 0, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        again.stride = (1, 1, 1)


@pytest.mark.parametrize("value", [2, (2, 2, 2), [2, 2, 2], torch.tensor([2, 2, 2])], ids=str)
def test_to_ntuple(value):
    expanded = to_ntuple(value, 3, "stride")
    assert expanded == (2, 2, 2)
    assert all(type(x) is int for x in expanded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": (2, 2)}, r"stride must have 3 entries like kernel_size; got \(2, 2\)"),
        ({"padding": (1,)}, r"padding must have 3 entries like kernel_size; got \(1,\)"),
        ({"output_padding": (1,)}, r"output_padding must have 3 entries"),
        (
            {"kernel_size": (3, 0, 3)},
            r"kernel_size must be at least 1 on every axis; got \(3, 0, 3\)",
        ),
        ({"stride": (0, 1, 1)}, r"stride must be at least 1"),
        ({"dilation": (1, 1, -1)}, r"dilation must be at least 1"),
        ({"output_padding": (0, 0, -1)}, r"output_padding must be at least 0"),
        ({"sites": "same"}, r"sites='same' needs stride 1, not transposed"),
        (
            {"sites": "same", "stride": (1, 1, 1), "transposed": True},
            r"sites='same' needs stride 1",
        ),
        ({"sites": "cells", "transposed": True}, r"sites='cells' is a rule for coarser outputs"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DOWN2, **change)


def test_a_window_of_taps_lists_them_in_order():
    geometry = ConvGeometry.of_taps([(0, 0), (-1, 3), (2, 0)], (1, 1), (2, 1), sites="same")
    assert geometry.offsets == ((0, 0), (-2, 3), (4, 0))
    assert geometry.kernel_volume == geometry.max_outputs_per_input == 3
    assert geometry.kernel_size == (4, 4)
    assert geometry.has_center
    assert not ConvGeometry.of_taps([(1, 0)], (1, 1), (1, 1)).has_center


def test_errors_of_a_window_of_taps():
    with pytest.raises(ValueError, match="a window must have at least one tap"):
        ConvGeometry.of_taps([], (1, 1), (1, 1))
    with pytest.raises(ValueError, match=r"a tap must be an int or have 2 entries; got \[1\]"):
        ConvGeometry.of_taps([(1,)], (1, 1), (1, 1))
    with pytest.raises(ValueError, match=r"needs an unbounded grid or given output sites"):
        ConvGeometry.of_taps([(1, 0)], (1, 1), (1, 1)).output_shape((4, 4))


def test_error_to_ntuple():
    with pytest.raises(ValueError, match=r"stride must be an int or have 3 entries; got \[1, 2\]"):
        to_ntuple((1, 2), 3, "stride")
