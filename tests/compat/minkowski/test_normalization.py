"""Batch norm, its synchronised form, and instance norms."""

import pytest
import torch
from torch import nn

import compat.minkowski as ME


def test_batch_norm_is_torchs_over_all_rows(make, make_field, device):
    layer = ME.MinkowskiBatchNorm(4, eps=1e-3, momentum=0.2).to(device)
    reference = nn.BatchNorm1d(4, eps=1e-3, momentum=0.2).to(device)
    for x in (make(), make_field()):
        y = layer(x)
        assert torch.equal(y.F, reference(x.F))
        assert type(y) is type(x)
    assert torch.equal(layer.bn.running_var, reference.running_var)
    assert torch.equal(layer.eval()(make()).F, reference.eval()(make().F))


def test_b7_batch_norm_state_dict_is_the_originals():
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(ME.MinkowskiBatchNorm(4).state_dict()) == [f"bn.{name}" for name in names]
    assert list(ME.MinkowskiSyncBatchNorm(4).state_dict()) == [f"bn.{name}" for name in names]
    expected = "(4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)"
    assert repr(ME.MinkowskiBatchNorm(4)) == f"MinkowskiBatchNorm{expected}"


@pytest.mark.parametrize("affine", [True, False])
def test_convert_sync_batchnorm_shares_parameters_and_buffers(affine: bool):
    first, second = ME.MinkowskiBatchNorm(4, affine=affine), nn.BatchNorm1d(4)
    net = nn.Sequential(nn.Sequential(first), ME.MinkowskiReLU(), second).eval()
    converted = ME.MinkowskiSyncBatchNorm.convert_sync_batchnorm(net)
    assert converted is net
    sync = net[0][0]
    assert isinstance(sync, ME.MinkowskiSyncBatchNorm)
    assert isinstance(sync.bn, nn.SyncBatchNorm)
    assert sync.bn.weight is first.bn.weight
    assert sync.bn.running_mean is first.bn.running_mean
    assert (sync.bn.eps, sync.bn.momentum, sync.training) == (1e-5, 0.1, False)
    assert net[2] is second, "batch norms of torch stay"
    alone = ME.MinkowskiSyncBatchNorm.convert_sync_batchnorm(first)
    assert isinstance(alone, ME.MinkowskiSyncBatchNorm)


def instance_norm(feats: torch.Tensor, batch: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the normalised rows, sample by sample."""
    out = torch.empty_like(feats)
    for sample in batch.unique():
        rows = feats[batch == sample]
        out[batch == sample] = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + eps).sqrt()
    return out


@pytest.mark.parametrize(
    ("cls", "eps"), [(ME.MinkowskiInstanceNorm, 1e-8), (ME.MinkowskiStableInstanceNorm, 1e-6)]
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_b5_33_instance_norm_takes_the_biased_variance_of_each_sample(
    cls, eps: float, batch_size: int, make, device
):
    x = make(dtype=torch.float64, batch_size=batch_size)
    layer = cls(4).to(device, torch.float64)
    nn.init.uniform_(layer.weight)
    nn.init.uniform_(layer.bias)
    for training in (True, False):
        y = layer.train(training)(x)
        expected = instance_norm(x.F, x.C[:, 0], eps) * layer.weight + layer.bias
        torch.testing.assert_close(y.F, expected)
        assert y.coordinate_map_key == x.coordinate_map_key
    feats = x.F.detach().requires_grad_()
    (expected_grad,) = torch.autograd.grad(
        (instance_norm(feats, x.C[:, 0], eps) * layer.weight).sin().sum(), feats
    )
    out = (layer(x).F - layer.bias).sin().sum()
    (grad,) = torch.autograd.grad(out, x.F)
    torch.testing.assert_close(grad, expected_grad)


def test_b7_instance_norm_state_dict_is_the_originals():
    layer = ME.MinkowskiInstanceNorm(4)
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == {
        "weight": (1, 4),
        "bias": (1, 4),
    }
    assert repr(layer) == "MinkowskiInstanceNorm(nchannels=4)"
    assert torch.equal(layer.weight, torch.ones(1, 4))


def test_instance_norm_function_is_the_layer_without_parameters(make):
    x = make()
    out = ME.MinkowskiInstanceNormFunction.apply(
        x.F, x.coordinate_map_key, None, x.coordinate_manager
    )
    assert torch.equal(out, ME.MinkowskiInstanceNorm(4).to(x.device)(x).F)


def test_instance_norm_refuses_fields(make_field):
    with pytest.raises(AssertionError, match="input must be a SparseTensor; got TensorField"):
        ME.MinkowskiInstanceNorm(4)(make_field())
