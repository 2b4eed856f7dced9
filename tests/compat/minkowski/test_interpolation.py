"""Features between sites."""

import itertools

import pytest
import torch

import compat.minkowski as ME
from tests.compat.minkowski import _oracle as oracle


def interpolated(x, point):
    """Linear interpolation at one point; absent corners count as 0."""
    batch, *position = point
    rows = oracle.rows_of(x.C)
    total = torch.zeros_like(x.F[0])
    steps = x.tensor_stride
    base = [int(p // s) for p, s in zip(position, steps, strict=True)]
    for bits in itertools.product((0, 1), repeat=len(position)):
        weight = 1.0
        for bit, p, s, b in zip(bits, position, steps, base, strict=True):
            weight *= p / s - b if bit else 1 - (p / s - b)
        site = (round(batch), *((b + bit) * s for b, bit, s in zip(base, bits, steps, strict=True)))
        if site in rows:
            total = total + weight * x.F[rows[site]]
    return total


def samples(x, n=30):
    points = torch.rand(n, x.D, dtype=x.dtype) * 10 - 5
    points[:4] = x.C[:4, 1:].cpu().to(x.dtype)
    return torch.cat([torch.arange(n)[:, None] % 2, points], 1).to(x.dtype).to(x.device)


@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_b5_41_corners_are_weighted_linearly_and_absent_ones_are_zero(ndim, stride, make):
    n = 8 if ndim == 1 else 40
    x = make(n, ndim=ndim, reach=4 if ndim < 3 else 2, channels=2, dtype=torch.float64)
    x = ME.MinkowskiSumPooling(stride, stride, dimension=ndim)(x)
    points = samples(x)
    y = x.features_at_coordinates(points)
    expected = torch.stack([interpolated(x, point) for point in points.tolist()])
    assert expected.any()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ME.MinkowskiInterpolation()(x, points), y)


def test_b5_41_batch_indices_are_rounded(make):
    x = make(40, dtype=torch.float64)
    points = samples(x)
    shifted = points + points.new_tensor([0.4, 0, 0, 0])
    assert torch.equal(x.features_at_coordinates(points), x.features_at_coordinates(shifted))


def test_what_interpolation_returns(make):
    x = make(40, dtype=torch.float64)
    points = samples(x)
    layer = ME.MinkowskiInterpolation(return_kernel_map=True, return_weights=True)
    feats, (rows, at), weights = layer(x, points)
    again = torch.zeros_like(feats).index_add(0, at.long(), x.F[rows.long()] * weights[:, None])
    torch.testing.assert_close(feats, again)
    found = x.coordinate_manager.interpolation_map_weight(x.coordinate_map_key, points)
    for ours, managers in zip((rows, at, weights), found, strict=True):
        assert torch.equal(ours, managers)
    assert len(ME.MinkowskiInterpolation(return_weights=True)(x, points)) == 2
    assert repr(layer) == "MinkowskiInterpolation()"


def test_gradcheck(make):
    x = make(20, channels=2, ndim=2, dtype=torch.float64)
    points = samples(x, 6)

    def run(feats):
        return ME.SparseTensor(
            feats, coordinate_map_key=x.coordinate_map_key, coordinate_manager=x.coordinate_manager
        ).features_at_coordinates(points)

    assert torch.autograd.gradcheck(run, (x.F,))


def test_errors(make):
    x = make(10)
    with pytest.raises(AssertionError, match=r"query_coordinates must be torch\.float32"):
        x.features_at_coordinates(samples(x).double())
    with pytest.raises(AssertionError, match=r"samples must have shape \[M, 4\]"):
        x.features_at_coordinates(samples(x)[:, :3])
    with pytest.raises(AssertionError, match="takes a SparseTensor and points on its device"):
        ME.MinkowskiInterpolation()(x.F, samples(x))
