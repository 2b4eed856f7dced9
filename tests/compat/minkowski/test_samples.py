"""Samples: the batch indices for which global pools, broadcasts and instance norms have rows."""

import pytest
import torch

import compat.minkowski as ME
from tests._back_end import every_back_end

pytestmark = every_back_end

POOLS = {
    "Sum": lambda rows: rows.sum(0),
    "Avg": lambda rows: rows.mean(0),
    "Max": lambda rows: rows.amax(0),
}


def tensor(batches, device, channels=2, **options):
    """Return a tensor with a site for each entry of ``batches``, in this order."""
    coords = torch.tensor([[b, 3 * i - 4, i] for i, b in enumerate(batches)], dtype=torch.int32)
    feats = torch.randn(len(batches), channels)
    return ME.SparseTensor(feats.to(device), coords.to(device), **options)


def batches_of(tensor):
    """Return the batch index of each row of an origin."""
    assert not tensor.C[:, 1:].any()
    return tensor.C[:, 0].tolist()


@pytest.mark.parametrize("mode", POOLS)
@pytest.mark.parametrize(
    ("batches", "samples"),
    [([1, 1, 1], [1]), ([0, 2, 0], [0, 2]), ([2], [2]), ([7, 0, 3, 0], [0, 3, 7])],
    ids=str,
)
def test_batch_indices_that_never_occur_have_no_row(mode, batches, samples, device):
    x = tensor(batches, device)
    y = getattr(ME, f"MinkowskiGlobal{mode}Pooling")()(x)
    assert batches_of(y) == samples
    for row, sample in enumerate(samples):
        torch.testing.assert_close(y.F[row], POOLS[mode](x.F[x.C[:, 0] == sample]))
    assert x.coordinate_manager.get_batch_indices() == samples
    assert x.coordinate_manager.number_of_unique_batch_indices() == len(samples)


@pytest.mark.parametrize("batches", [[1, 1, 1], [0, 2, 0]], ids=str)
def test_global_pools_of_fields_likewise(batches, device):
    x = tensor(batches, device)
    field = ME.TensorField(x.F, x.C.float())
    y = ME.MinkowskiGlobalSumPooling()(field)
    assert batches_of(y) == sorted(set(batches))
    for row, sample in enumerate(batches_of(y)):
        torch.testing.assert_close(y.F[row], x.F[x.C[:, 0] == sample].sum(0))
    assert field.coordinate_manager.number_of_unique_batch_indices() == len(y)


def test_a_sample_that_lost_its_rows_keeps_its_row(device):
    x = tensor([2, 0, 2, 0], device)
    kept = ME.MinkowskiPruning()(x, x.C[:, 0] == 2)
    y = ME.MinkowskiGlobalSumPooling()(kept)
    assert batches_of(y) == [0, 2]
    torch.testing.assert_close(y.F, torch.stack([torch.zeros_like(y.F[0]), kept.F.sum(0)]))


@pytest.mark.parametrize("mode", POOLS)
def test_global_pools_after_pruning_unsorted_batches(mode, device):
    x = tensor([2, 0, 1, 2, 0, 1, 2, 1], device)
    mask = torch.tensor([True, False, True, True, True, False, True, True], device=device)
    kept = ME.MinkowskiPruning()(x, mask)
    y = getattr(ME, f"MinkowskiGlobal{mode}Pooling")()(kept)
    assert batches_of(y) == [0, 1, 2]
    for sample in range(3):
        rows = x.F[mask & (x.C[:, 0] == sample)]
        torch.testing.assert_close(y.F[sample], POOLS[mode](rows))


def test_the_origin_grows_when_a_larger_batch_joins_the_manager(device):
    first = tensor([0, 1, 1], device)
    before = ME.MinkowskiGlobalSumPooling()(first)
    joined = tensor([0, 1, 2, 3], device, coordinate_manager=first.coordinate_manager)
    after = ME.MinkowskiGlobalSumPooling()(joined)
    assert batches_of(after) == [0, 1, 2, 3]
    torch.testing.assert_close(after.F, joined.F)
    # The first result keeps its two rows, and layers still accept it.
    assert batches_of(before) == [0, 1]
    assert before.coordinate_map_key != after.coordinate_map_key
    spread = ME.MinkowskiBroadcast()(first, before)
    torch.testing.assert_close(spread.F, before.F[[0, 1, 1]])
    again = ME.MinkowskiGlobalSumPooling()(first)
    assert again.coordinate_map_key == after.coordinate_map_key
    torch.testing.assert_close(again.F[:2], before.F)
    assert not again.F[2:].any()


@pytest.mark.parametrize("batches", [[0, 2, 2, 0], [3, 1, 3, 1]], ids=str)
def test_broadcasts_and_instance_norms_where_batch_indices_are_missing(batches, device):
    x = tensor(batches, device)
    pooled = ME.MinkowskiGlobalAvgPooling()(x)
    row = [batches_of(pooled).index(b) for b in batches]
    torch.testing.assert_close(ME.MinkowskiBroadcast()(x, pooled).F, pooled.F[row])
    torch.testing.assert_close(ME.MinkowskiBroadcastAddition()(x, pooled).F, x.F + pooled.F[row])
    normed = ME.MinkowskiInstanceNorm(2).to(device)(x)
    for sample in set(batches):
        rows = x.F[x.C[:, 0] == sample]
        expected = (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-8).sqrt()
        torch.testing.assert_close(normed.F[x.C[:, 0] == sample], expected)


def test_broadcasts_refuse_more_or_fewer_values_than_samples(device):
    x = tensor([0, 1, 1], device)
    pooled = ME.MinkowskiGlobalSumPooling()(x)
    for n in (1, 3):
        values = ME.SparseTensor(
            torch.ones(n, 2, device=device),
            coordinate_map_key=pooled.coordinate_map_key,
            coordinate_manager=x.coordinate_manager,
        )
        with pytest.raises(RuntimeError, match=f"for each of 2 samples; got {n}. Pass"):
            ME.MinkowskiBroadcast()(x, values)


@pytest.mark.parametrize(("batches", "own"), [([0, 0, 0], [0, 1]), ([0, 3], [0, 2])], ids=str)
def test_broadcasts_refuse_the_samples_of_another_batch(batches, own, device):
    pooled = ME.MinkowskiGlobalSumPooling()(tensor(own, device))
    x = tensor(batches, device)
    if batches == [0, 0, 0]:
        # Sample 0 is in both. Sample 1 is in no row of x.
        torch.testing.assert_close(ME.MinkowskiBroadcast()(x, pooled).F, pooled.F[[0, 0, 0]])
    else:
        with pytest.raises(RuntimeError, match=r"for each of 4 samples; got 2 of the samples"):
            ME.MinkowskiBroadcast()(x, pooled)


def test_the_pooling_function_takes_the_key_of_a_field(device):
    coords = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 3, 2], [0, 0, 0]], device=device)
    feats = torch.arange(8.0, device=device).view(4, 2)
    field = ME.TensorField(feats, coords.float())
    manager, key = field.coordinate_manager, field.coordinate_field_map_key
    mode = ME.PoolingMode.GLOBAL_SUM_POOLING_PYTORCH_INDEX
    apply = ME.MinkowskiGlobalPoolingFunction.apply
    assert apply(feats, mode, key, None, manager).tolist() == [[8, 11], [4, 5]]
    # A map of the same key has three rows. The number of features tells field and map apart.
    sparse = field.sparse()
    assert sparse.coordinate_map_key == key
    out_key = ME.CoordinateMapKey(3)
    assert apply(feats, mode, key, out_key, manager).tolist() == [[8, 11], [4, 5]]
    assert out_key == manager.origin()
    assert apply(sparse.F, mode, key, None, manager).tolist() == [[5, 7], [4, 5]]
    with pytest.raises(RuntimeError, match="coordinate_manager must be a CoordinateManager"):
        apply(feats, mode, key)
