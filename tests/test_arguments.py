"""Public constructors and calls check their arguments first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tritonspconv as ts
from tritonspconv import ops
from tritonspconv.arguments import to_ntuple, whole_number

COORDS = torch.tensor([[0, 1, 1], [0, 2, 1], [1, 0, 0]], dtype=torch.int32)
FEATS = torch.ones(3, 4)
BOX = {"spatial_shape": (4, 4), "batch_size": 2}


def tensor(**arguments: Any) -> ts.SparseTensor:
    return ts.SparseTensor(**{"feats": FEATS, "coords": COORDS, **BOX, **arguments})


@pytest.mark.parametrize("batch_size", [2, np.int64(2), torch.tensor(2)], ids=str)
def test_a_batch_size_may_be_any_integer(batch_size: Any) -> None:
    x = tensor(batch_size=batch_size, spatial_shape=np.array([4, 4]))
    y = ts.nn.SparseConv2d(4, 8, 2, 2)(x)
    assert type(y.batch_size) is int
    assert y.batch_size == 2
    assert y.dense().shape == (2, 8, 2, 2)


def test_a_callers_tensor_is_not_written_to() -> None:
    batch_size = torch.tensor(2)
    shape = torch.tensor([4, 4])
    x = tensor(batch_size=batch_size, spatial_shape=shape)
    assert x.sites.grid.num_cells == 32
    assert ts.Grid((0, 0), (4, 4), batch_size).num_cells == 32
    assert batch_size == 2
    assert shape.tolist() == [4, 4]


MAP = ts.kernel_map(tensor().sites, ts.ConvGeometry.submanifold((3, 3), (1, 1)))
WEIGHT = torch.ones(9, 4, 8)
INDEX = torch.zeros(3, dtype=torch.int32)

# The call, the type of its error, and words of the error: what, expected, got.
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "batch size, str": (lambda: tensor(batch_size="2"), TypeError, "batch_size must be an int"),
    "batch size, float": (lambda: tensor(batch_size=1.5), TypeError, "batch_size must be an int"),
    "batch size, negative": (lambda: tensor(batch_size=-1), ValueError, "at least 0; got -1"),
    "shape, int": (lambda: tensor(spatial_shape=8), TypeError, "sequence of 2 ints.*got 8"),
    "shape, float": (lambda: tensor(spatial_shape=(8.5, 4)), TypeError, r"an int; got 8\.5"),
    "shape, length": (lambda: tensor(spatial_shape=(4,)), ValueError, "must have 2 entries"),
    "coords, numpy": (
        lambda: tensor(coords=COORDS.numpy()),
        TypeError,
        r"coords must be a torch\.Tensor; got ndarray\. Convert it with torch\.as_tensor",
    ),
    "feats, numpy": (lambda: tensor(feats=FEATS.numpy()), TypeError, "feats must be a torch.Te"),
    "feats, list": (lambda: tensor(feats=[1]), TypeError, "feats must be a torch.Tensor; got list"),
    "sites, numpy": (
        lambda: ts.ActiveSites(COORDS.numpy(), ts.Grid((0, 0), (4, 4), 2)),
        TypeError,
        "ActiveSites: coords must be a torch.Tensor",
    ),
    "grid, float": (lambda: ts.Grid((0, 0), (4, 4.5), 2), TypeError, r"Grid: shape.*got 4\.5"),
    "grid, str": (lambda: ts.Grid((0, 0), (4, 4), "2"), TypeError, "Grid: batch_size.*got '2'"),
    "kernel size 0": (lambda: ts.nn.SubMConv2d(4, 4, 0), ValueError, "at least 1; got 0"),
    "kernel size -1": (lambda: ts.nn.MaxPool2d(-1), ValueError, "kernel_size must be at least 1"),
    "kernel size 3.0": (lambda: ts.nn.SubMConv2d(4, 4, 3.0), TypeError, r"an int; got 3\.0"),
    "kernel size, str": (lambda: ts.nn.SubMConv2d(4, 4, "3"), TypeError, "an int; got '3'"),
    "kernel size 2^20": (lambda: ts.nn.AvgPool2d(2**20), ValueError, r"less than 2\*\*31 taps"),
    "stride 0": (lambda: ts.nn.SparseConv2d(4, 4, 3, 0), ValueError, "stride must be at least 1"),
    "dilation 2^31": (
        lambda: ts.nn.SubMConv2d(4, 4, 3, dilation=2**31),
        ValueError,
        r"reach less than 2\*\*31 cells",
    ),
    "padding": (lambda: ts.nn.SparseConv2d(4, 4, 3, padding=-1), ValueError, "at least 0; got -1"),
    "channels": (lambda: ts.nn.SubMConv2d(-4, 4, 3), ValueError, "SubMConv2d: in_channels must be"),
    "channels, float": (lambda: ts.nn.SubMConv2d(4.0, 4, 3), TypeError, "in_channels must be an i"),
    "sites": (
        lambda: ts.nn.SparseConv2d(4, 4, 3, sites="bogus"),
        ValueError,
        r"sites must be one of \('same', 'reached', 'cells'\); got 'bogus'",
    ),
    "tap order": (
        lambda: ts.ConvGeometry((3,), (1,), (0,), (1,), tap_order="bogus"),
        ValueError,
        "tap_order must be one of .*; got 'bogus'",
    ),
    "layer, dense": (
        lambda: ts.nn.SubMConv2d(4, 4, 3)(FEATS),
        TypeError,
        "SubMConv2d takes a SparseTensor; got Tensor. Make one with",
    ),
    "layer, channels": (
        lambda: ts.nn.SparseConv2d(5, 4, 3)(tensor()),
        ValueError,
        "SparseConv2d has in_channels=5; got .*Build the layer with in_channels=4",
    ),
    "layer, like": (
        lambda: ts.nn.SparseInverseConv2d(4, 4, 3)(tensor(), FEATS),
        TypeError,
        "SparseInverseConv2d takes a SparseTensor; got Tensor",
    ),
    "conv, numpy": (
        lambda: ops.sparse_conv(FEATS.numpy(), WEIGHT, MAP),
        TypeError,
        "sparse_conv: feats must be a torch.Tensor; got ndarray",
    ),
    "conv, weight": (
        lambda: ops.sparse_conv(FEATS, WEIGHT.numpy(), MAP),
        TypeError,
        "sparse_conv: weight must be a torch.Tensor; got ndarray",
    ),
    "pool, numpy": (lambda: ops.sparse_pool(FEATS.numpy(), MAP), TypeError, "sparse_pool: feats"),
    "pool, ties": (
        lambda: ops.sparse_pool(FEATS, MAP, "avg", ties="all"),
        ValueError,
        "ties share the gradient of a maximum; got ties='all', mode='avg'",
    ),
    "global pool": (lambda: ops.global_pool(FEATS, INDEX, 1.5), TypeError, r"an int; got 1\.5"),
    "broadcast": (lambda: ops.global_broadcast([1], INDEX), TypeError, "values must be a torch.Te"),
    "scatter": (
        lambda: ops.scatter_weighted(FEATS, INDEX.long()[:, None], FEATS[:, :1], 2.5),
        TypeError,
        r"scatter_weighted: n_out must be an int; got 2\.5",
    ),
    "gather": (
        lambda: ops.gather_weighted(FEATS.numpy(), INDEX[:, None], FEATS[:, :1]),
        TypeError,
        "gather_weighted: feats must be a torch.Tensor",
    ),
    "voxelize": (
        lambda: ops.voxelize(FEATS, (1,), (0, 4), max_points=2.5),
        TypeError,
        r"voxelize: max_points must be an int; got 2\.5",
    ),
    "points, numpy": (
        lambda: ops.voxelize(FEATS.numpy(), (1,), (0, 4)),
        TypeError,
        "voxelize: points must be a torch.Tensor",
    ),
    "from_dense": (lambda: ops.from_dense([1]), TypeError, "from_dense: x must be a torch.Tensor"),
    "to_dense": (
        lambda: ops.to_dense([1], tensor().sites),
        TypeError,
        "to_dense: feats must be a torch.Tensor",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    call, kind, words = BAD[case]
    with pytest.raises(kind, match=words):
        call()


def test_numbers_that_python_takes_for_ints_are_ints() -> None:
    for value in (3, np.int32(3), torch.tensor(3)):
        assert type(whole_number("n", value)) is int
        assert to_ntuple(value, 2, "n") == (3, 3)
    assert to_ntuple(np.array([1, 2]), 2, "n") == (1, 2)
    assert to_ntuple(torch.tensor([1, 2]), 2, "n") == (1, 2)
    with pytest.raises(ValueError, match="n must be at most 2; got 3"):
        whole_number("n", 3, most=2)
