"""Rows kept by a mask."""

import pytest
import torch

import compat.minkowski as ME


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_b5_38_and_d36_rows_of_the_mask_stay_in_order(dtype, make):
    x = make(30, tensor_stride=2)
    mask = torch.rand(30, device=x.device) < 0.5
    y = ME.MinkowskiPruning()(x, mask.to(dtype))
    assert y.C.tolist() == x.C[mask].tolist()
    assert y.F.tolist() == x.F[mask].tolist()
    assert y.coordinate_map_key == ME.CoordinateMapKey([2, 2, 2], "pruned")
    assert repr(ME.MinkowskiPruning()) == "MinkowskiPruning()"


@pytest.mark.parametrize("keep", [True, False])
def test_b5_38_all_rows_and_none(keep, make):
    x = make(10)
    mask = torch.full((10,), keep, device=x.device)
    y = ME.MinkowskiPruning()(x, mask)
    assert len(y) == 10 * keep
    conv = ME.MinkowskiConvolution(4, 2, kernel_size=3, stride=2, dimension=3).to(x.device)
    z = conv(y)
    assert (len(z) > 0) == keep
    assert len(ME.MinkowskiUnion()(x, y)) == 10
    z.F.sum().backward()
    assert x.F.grad.any() == keep


def test_decompositions_keep_the_number_of_samples(make):
    x = make(30, batch_size=3)
    y = ME.MinkowskiPruning()(x, x.C[:, 0] < 2)
    assert len(y.decomposed_coordinates) == len(y.decomposed_features) == 3
    assert len(y.decomposed_features[2]) == 0


def test_gradcheck(make):
    x = make(10, channels=2, dtype=torch.float64)
    mask = torch.arange(10, device=x.device) % 3 > 0

    def run(feats):
        return ME.MinkowskiPruning()(
            ME.SparseTensor(
                feats, coordinate_map_key=x.coordinate_map_key,
                coordinate_manager=x.coordinate_manager,
            ),
            mask,
        ).F  # fmt: skip

    assert torch.autograd.gradcheck(run, (x.F,))


def test_function_sets_the_key(make):
    x = make(10)
    mask, key = torch.arange(10, device=x.device) > 3, ME.CoordinateMapKey(4)
    feats = ME.MinkowskiPruningFunction.apply(
        x.F, mask, x.coordinate_map_key, key, x.coordinate_manager
    )
    assert feats.tolist() == x.F[mask].tolist()
    assert x.coordinate_manager.size(key) == 6


def test_errors(make):
    x = make(10)
    for mask in [torch.ones(9, dtype=torch.bool), torch.ones(10), torch.ones(10, 1).bool()]:
        with pytest.raises(AssertionError, match=r"mask must be bool \[10\]"):
            ME.MinkowskiPruning()(x, mask.to(x.device))
    with pytest.raises(AssertionError, match="takes a SparseTensor; got Tensor"):
        ME.MinkowskiPruning()(x.F, torch.ones(10).bool())
