"""Broadcasts give the features of a sample to its rows."""

import pytest
import torch

import compat.minkowski as ME

COMBINE = {
    "": lambda rows, sample: sample,
    "Addition": lambda rows, sample: rows + sample,
    "Multiplication": lambda rows, sample: rows * sample,
    "Concatenation": lambda rows, sample: torch.cat([rows, sample], 1),
}


@pytest.mark.parametrize("name", COMBINE)
def test_b5_32_rows_meet_the_features_of_their_sample(name, make):
    x = make(40, batch_size=3)
    pooled = ME.MinkowskiGlobalPooling()(x)
    y = getattr(ME, f"MinkowskiBroadcast{name}")()(x, pooled)
    assert y.coordinate_map_key == x.coordinate_map_key
    expected = COMBINE[name](x.F, pooled.F[x.C[:, 0].long()])
    torch.testing.assert_close(y.F, expected)
    assert repr(getattr(ME, f"MinkowskiBroadcast{name}")()) == f"MinkowskiBroadcast{name}"


@pytest.mark.parametrize("name", COMBINE)
def test_gradcheck(name, make):
    x = make(8, channels=2, reach=1, dtype=torch.float64)
    pooled = ME.MinkowskiGlobalPooling()(x)

    def run(feats, samples):
        manager = x.coordinate_manager
        rows = ME.SparseTensor(
            feats, coordinate_map_key=x.coordinate_map_key, coordinate_manager=manager
        )
        origin = ME.SparseTensor(
            samples, coordinate_map_key=pooled.coordinate_map_key, coordinate_manager=manager
        )
        return getattr(ME, f"MinkowskiBroadcast{name}")()(rows, origin).F

    assert torch.autograd.gradcheck(run, (x.F, pooled.F.detach().requires_grad_()))


def test_function(make):
    x = make(10)
    pooled = ME.MinkowskiGlobalPooling()(x)
    feats = ME.MinkowskiBroadcastFunction.apply(
        x.F, pooled.F, ME.BroadcastMode.ELEMENTWISE_ADDITON, x.coordinate_map_key,
        pooled.coordinate_map_key, x.coordinate_manager,
    )  # fmt: skip
    torch.testing.assert_close(feats, ME.MinkowskiBroadcastAddition()(x, pooled).F)


def test_errors(make):
    x = make(10)
    pooled = ME.MinkowskiGlobalPooling()(x)
    with pytest.raises(AssertionError, match="takes two SparseTensors; got Tensor"):
        ME.MinkowskiBroadcast()(x, pooled.F)
    narrow = ME.SparseTensor(
        pooled.F[:, :1], coordinate_map_key=pooled.coordinate_map_key,
        coordinate_manager=x.coordinate_manager,
    )  # fmt: skip
    with pytest.raises(AssertionError, match="must have the same channels; got 4 and 1"):
        ME.MinkowskiBroadcastAddition()(x, narrow)
    with pytest.raises(AssertionError, match="operation_type must be a BroadcastMode; got 0"):
        ME.MinkowskiBroadcast.__subclasses__()[1](0)
