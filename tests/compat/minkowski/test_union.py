"""Sums on the union of coordinates."""

import pytest
import torch

import compat.minkowski as ME
from tests.compat.minkowski import _oracle as oracle


def tensors(make, count=3, **options):
    first = make(20, channels=2, **options)
    manager = first.coordinate_manager
    others = [
        make(20, channels=2, seed=seed, coordinate_manager=manager, **options)
        for seed in range(1, count)
    ]
    return [first, *others]


def test_union_sums_where_tensors_meet(make):
    parts = tensors(make, dtype=torch.float64)
    y = ME.MinkowskiUnion()(*parts)
    rows = [oracle.rows_of(part.C) for part in parts]
    assert {tuple(c) for c in y.C.tolist()} == set().union(*rows)
    for site, feats in zip(map(tuple, y.C.tolist()), y.F, strict=True):
        own = [part.F[r[site]] for part, r in zip(parts, rows, strict=True) if site in r]
        torch.testing.assert_close(feats, sum(own))
    assert y.coordinate_map_key == ME.CoordinateMapKey([1, 1, 1], "merge")
    assert repr(ME.MinkowskiUnion()) == "MinkowskiUnion()"


def test_union_of_two_is_their_sum(make):
    a, b = tensors(make, 2)
    torch.testing.assert_close(ME.MinkowskiUnion()(a, b).F, (a + b).F)


def test_gradcheck(make):
    parts = tensors(make, reach=2, dtype=torch.float64)

    def run(*feats):
        inputs = [
            ME.SparseTensor(
                each, coordinate_map_key=part.coordinate_map_key,
                coordinate_manager=part.coordinate_manager,
            )
            for each, part in zip(feats, parts, strict=True)
        ]  # fmt: skip
        return ME.MinkowskiUnion()(*inputs).F

    assert torch.autograd.gradcheck(run, tuple(part.F for part in parts))


def test_a_union_is_convolved_at_its_stride(make):
    """A union of two strides has the finer stride, also for the layers behind it."""
    x = make(30, channels=2, dtype=torch.float64)
    y = ME.MinkowskiUnion()(ME.MinkowskiSumPooling(2, 2, dimension=3)(x), x)
    conv = ME.MinkowskiConvolution(2, 2, kernel_size=3, dimension=3).double().to(x.device)
    expected = oracle.conv(y.C, y.F, conv.kernel, y.C, oracle.taps((3, 3, 3)), (1, 1, 1))
    torch.testing.assert_close(conv(y).F, expected)


def test_errors(make):
    a, b = tensors(make, 2)
    for arguments in [(a,), ([a, b],), (a, b.F)]:
        with pytest.raises(AssertionError, match="takes two SparseTensors or more"):
            ME.MinkowskiUnion()(*arguments)
    with pytest.raises(AssertionError, match="must share a coordinate manager"):
        ME.MinkowskiUnion()(a, make(channels=2))
    with pytest.raises(AssertionError, match=r"must have the same channels; got \[2, 3\]"):
        ME.MinkowskiUnion()(a, make(channels=3, coordinate_manager=a.coordinate_manager))
