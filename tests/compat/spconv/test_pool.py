"""Poolings: spconv's floor at zero, its gradient, and averages over active inputs."""

import pytest
import torch

import compat.spconv.pytorch as spconv
from compat.spconv.pytorch import SparseConvTensor

WINDOWS = [(2, None, 0), (3, 2, 1), ((1, 2, 3), (1, 2, 2), 0)]


def windows_of(x: SparseConvTensor, pooled: SparseConvTensor) -> list[list[int]]:
    """Return the input rows in each output's window, from the recorded pairs."""
    record = pooled.indice_dict["k"]
    rows = [[] for _ in range(pooled.features.shape[0])]
    for tap, count in enumerate(record.indice_pair_num.tolist()):
        for source, target in record.indice_pairs[:, tap, :count].T.tolist():
            rows[target].append(source)
    return rows


@pytest.mark.parametrize(("kernel_size", "stride", "padding"), WINDOWS)
def test_max_pool_is_the_maximum_of_zero_and_the_active_inputs(
    make, device, kernel_size, stride, padding
):
    x = make(n=90)
    y = spconv.SparseMaxPool3d(kernel_size, stride, padding, indice_key="k")(x)
    expected = torch.stack([x.features[rows].amax(0).clamp(min=0) for rows in windows_of(x, y)])
    assert torch.equal(y.features, expected)
    assert y.indices.unique(dim=0).shape[0] == y.indices.shape[0]


def test_max_pool_matches_dense_pooling_after_relu(make):
    x = make(n=90)
    x = x.replace_feature(x.features.relu())
    y = spconv.SparseMaxPool3d(3, 2, 1)(x)
    dense = torch.nn.functional.max_pool3d(x.dense(), 3, 2, 1)
    assert torch.equal(y.dense(), dense)


def pooled_gradient(values: list[float], device: torch.device) -> list[float]:
    features = torch.tensor([[v] for v in values], device=device, requires_grad=True)
    rows = [[0, 0, place] for place in range(len(values))]
    indices = torch.tensor(rows, dtype=torch.int32, device=device)
    y = spconv.SparseMaxPool2d(2)(SparseConvTensor(features, indices, [2, 2], 1))
    y.features.sum().backward()
    return features.grad.flatten().tolist()


@pytest.mark.parametrize(
    ("values", "gradient"),
    [
        ([1.0, 1.0], [1.0, 1.0]),
        ([1.0, 2.0], [0.0, 1.0]),
        ([-1.0, 0.0], [0.0, 1.0]),
        ([-1.0, -2.0], [0.0, 0.0]),
    ],
)
def test_max_pool_gradient_goes_to_every_entry_equal_to_the_output(device, values, gradient):
    assert pooled_gradient(values, device) == gradient


@pytest.mark.parametrize(("kernel_size", "stride", "padding"), WINDOWS)
def test_average_pool_divides_by_the_active_inputs(make, device, kernel_size, stride, padding):
    x = make(n=90)
    y = spconv.SparseAvgPool3d(kernel_size, stride, padding, indice_key="k")(x)
    expected = torch.stack([x.features[rows].mean(0) for rows in windows_of(x, y)])
    torch.testing.assert_close(y.features, expected)


@pytest.mark.parametrize(("kernel_size", "stride", "padding"), WINDOWS)
def test_average_pool_gradient_is_that_of_the_mean(make, device, kernel_size, stride, padding):
    x = make(n=90)
    y = spconv.SparseAvgPool3d(kernel_size, stride, padding, indice_key="k")(x)
    grad = torch.randn_like(y.features)
    means = torch.stack([x.features[rows].mean(0) for rows in windows_of(x, y)])
    found, expected = (torch.autograd.grad(out, x.features, grad)[0] for out in (y.features, means))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("kind", "ndim"),
    [
        (kind, ndim)
        for kind in ("Max", "Avg")
        for ndim in (1, 2, 3, 4)
        if kind + str(ndim) != "Avg4"
    ],
)
def test_pools_of_every_dimension(make, kind, ndim):
    x = make(shape=(60, 5, 7, 3)[:ndim])
    y = getattr(spconv, f"Sparse{kind}Pool{ndim}d")(2)(x)
    assert y.spatial_shape == [extent // 2 for extent in x.spatial_shape]


def test_pools_do_not_limit_the_kernel_volume(make):
    assert spconv.SparseAvgPool3d(5)(make(n=90)).spatial_shape == [1, 1, 1]


def test_stride_defaults():
    assert spconv.SparseMaxPool3d(2).stride == [2, 2, 2]
    assert spconv.pool.SparseMaxPool(3, 2).stride == [1, 1, 1]


def test_submanifold_pool_keeps_the_sites(make):
    x = make()
    y = spconv.pool.SparseMaxPool(3, 3, subm=True)(x)
    assert torch.equal(y.indices, x.indices)


@pytest.mark.parametrize("kind", ["Max", "Avg"])
def test_global_pools_return_one_row_per_sample(make, kind):
    x = make(batch_size=3)
    x.indices[x.indices[:, 0] == 1, 0] = 0
    y = getattr(spconv, f"SparseGlobal{kind}Pool")()(x)
    assert y.shape == (3, 4)
    for sample in (0, 2):
        rows = x.features[x.indices[:, 0] == sample]
        torch.testing.assert_close(y[sample], rows.amax(0) if kind == "Max" else rows.mean(0))
    assert torch.equal(y[1], torch.zeros_like(y[1]))


def test_pool_records_the_voxel_count(make):
    pool = spconv.SparseMaxPool3d(2, record_voxel_count=True)
    if make().features.is_cuda:
        pool = pool.cuda()
    y = pool(make())
    assert pool.get_max_num_voxels().tolist() == [y.features.shape[0]]
    del (state := pool.state_dict())["max_num_voxels_during_training"]
    pool.load_state_dict(state)


def test_max_pool_passes_nan_on(device):
    """The original ignores NaN (``tests/parity``), so it hides that a network diverged."""
    indices = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 4]], dtype=torch.int32, device=device)
    feats = torch.tensor([[1.0], [torch.nan], [torch.nan], [2.0]], device=device)
    y = spconv.SparseMaxPool1d(2)(spconv.SparseConvTensor(feats, indices, [6], 1))
    assert y.indices[:, 1].tolist() == [0, 1, 2]
    assert y.features.isnan().flatten().tolist() == [True, True, False]
    assert y.features[2] == 2
