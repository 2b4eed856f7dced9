"""SparseConvTensor: members, checks, arithmetic, dense conversion."""

import copy
import pickle

import numpy as np
import pytest
import torch

import compat.spconv.pytorch as spconv
from compat.spconv.pytorch import SparseConvTensor

FIELDS = (
    "grid", "voxel_num", "benchmark", "benchmark_record", "thrust_allocator", "_timer",
    "force_algo", "int8_scale", "indice_dict", "batch_size", "spatial_shape", "indices",
)  # fmt: skip


def test_positional_and_keyword_construction(make):
    x = make()
    indice_dict = {}
    y = SparseConvTensor(x.features, x.indices, x.spatial_shape, 2, None, None, indice_dict)
    assert y.indice_dict is indice_dict
    y = SparseConvTensor(
        features=x.features, indices=x.indices, spatial_shape=x.spatial_shape, batch_size=2
    )
    assert y.indices is x.indices
    assert y.features is x.features
    assert y.indice_dict == {}


@pytest.mark.parametrize(
    "shape",
    [(6, 5, 7), torch.Size((6, 5, 7)), np.array([6, 5, 7]), [torch.tensor(n) for n in (6, 5, 7)]],
    ids=["tuple", "size", "array", "tensors"],
)
def test_spatial_shape_becomes_a_list_of_ints(make, shape):
    x = make()
    y = SparseConvTensor(x.features, x.indices, shape, 2)
    assert y.spatial_shape == [6, 5, 7]
    assert all(type(extent) is int for extent in y.spatial_shape)
    assert y.spatial_size == 210


def test_construction_checks(make):
    x = make()
    good = (x.features, x.indices, [6, 5, 7], 2)
    for place, value, text in (
        (0, x.features[0], r"features \[N, C\]"),
        (1, x.indices[0], r"indices \[N, 1 \+ ndim\]"),
        (1, x.indices.long(), "must be int32"),
        (2, [6, 5], "must have 3 extents"),
        (3, 0, "batch_size must be positive"),
        (3, None, "batch_size must be positive; got None"),
        (2, 6, "must have 3 extents.*got 6"),
        (2, [6, 5, 7.5], r"spatial_shape must be whole numbers; got \[6, 5, 7\.5\]"),
        (2, torch.tensor([6, 5, 7.5]), "spatial_shape must be whole numbers"),
        (2, [6, 5, None], "spatial_shape must be whole numbers"),
        (3, 1.5, r"batch_size must be a whole number; got 1\.5"),
        (3, torch.tensor(1.5), "batch_size must be a whole number"),
        (0, x.features[:3], r"one row per site each; got shapes \(3, 4\) and \(40, 4\)"),
    ):
        parts = list(good)
        parts[place] = value
        with pytest.raises(AssertionError, match=text):
            SparseConvTensor(*parts)
    for place, name in ((0, "features"), (1, "indices")):
        parts = list(good)
        parts[place] = parts[place].detach().cpu().numpy()
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor; got ndarray"):
            SparseConvTensor(*parts)
    for whole in ([6.0, 5.0, 7.0], np.array([6, 5, 7]), torch.tensor([6, 5, 7])):
        y = SparseConvTensor(x.features, x.indices, whole, torch.tensor(2))
        assert (y.spatial_shape, y.batch_size) == ([6, 5, 7], 2)


def test_layers_name_the_rows_that_do_not_fit(make, device):
    """``replace_feature`` takes any number of rows; ``indices`` are assigned afterwards."""
    x = make()
    y = x.replace_feature(x.features[:3])
    layers = [
        spconv.SubMConv3d(4, 4, 3), spconv.SparseConv3d(4, 4, 3, 2), spconv.SparseMaxPool3d(2),
        spconv.SparseAvgPool3d(2), spconv.SparseGlobalMaxPool(), spconv.ToDense(),
    ]  # fmt: skip
    for layer in layers:
        with pytest.raises(AssertionError, match=r"3 rows of features and 40 of indices.*assign"):
            layer.to(device)(y)


@pytest.mark.parametrize("row", [[2, 0, 0, 0], [0, 6, 0, 0], [0, 0, 0, 7], [-1, 0, 0, 0]])
def test_dense_on_a_cpu_refuses_rows_outside(row):
    indices = torch.tensor([[0, 1, 2, 3], row], dtype=torch.int32)
    x = SparseConvTensor(torch.ones(2, 1), indices, [6, 5, 7], 2)
    with pytest.raises(IndexError, match=r"1 of 2 coordinates lie outside.*row 1: \["):
        x.dense()


def test_fields_of_a_copy_are_those_of_the_constructor(make):
    from compat.spconv.pytorch.core import _FIELDS

    assert vars(make()).keys() == _FIELDS


def test_a_grid_of_too_many_cells_names_the_limit(make):
    x = make()
    x.spatial_shape, x.batch_size = [2**20] * 3, 4
    grown = spconv.SparseConvTranspose3d(4, 4, 3, 2, 1)
    padded = spconv.SparseConv3d(4, 4, 3, 1, 2**20)
    for layer in (grown, padded):
        with pytest.raises(AssertionError, match=r"at most 2\*\*62 cells"):
            layer.to(x.features.device)(x)
    x.spatial_shape, x.batch_size = [2**21] * 3, 8
    with pytest.raises(ValueError, match=r"at most 2\*\*62 cells.*larger voxels or crop"):
        spconv.SubMConv3d(4, 4, 3).to(x.features.device)(x)
    with pytest.raises(AssertionError, match="at most"):
        x.dense()


def test_features_are_read_only_and_underscore_features_are_not(make):
    x = make()
    with pytest.raises(ValueError, match="replace_feature"):
        x.features = x.features
    x._features = torch.zeros(40, 2, 3)
    assert x.features.shape == (40, 2, 3)
    assert "replace_feature" in x.__dir__()


def test_every_field_can_be_copied_one_by_one(make):
    x = make()
    y = make(seed=1)
    for name in FIELDS:
        setattr(y, name, getattr(x, name))
    assert torch.equal(y.dense() != 0, y.replace_feature(y.features).dense() != 0)
    assert y.indices is x.indices


def test_replace_feature_shares_sites_and_dict(make, device):
    x = spconv.SubMConv3d(4, 4, 3, indice_key="k").to(device)(make())
    y = x.replace_feature(x.features[:, :2])
    assert y.indice_dict is x.indice_dict
    assert y.indices is x.indices
    assert y.grid is x.grid
    assert y.spatial_shape == x.spatial_shape
    assert y.spatial_shape is not x.spatial_shape
    assert x.replace_feature(x.features[:7]).features.shape == (7, 4)
    with pytest.raises(AssertionError, match="expected features"):
        x.replace_feature(torch.zeros(40, 2, 2))


def test_shadow_copy_minus_and_dequantize(make):
    x = make()
    copy = x.shadow_copy()
    assert copy is not x
    assert copy.features is x.features
    assert copy.indice_dict is x.indice_dict
    assert torch.equal(x.minus().features, -x.features)
    assert not x.is_quantized
    assert x.dequantize().features is x.features
    with pytest.raises(ValueError, match="needs quantised"):
        x.q_scale()


def test_select_by_index_takes_masks_and_rows(make, device):
    x = spconv.SubMConv3d(4, 4, 3, indice_key="k").to(device)(make())
    mask = x.indices[:, 0] == 1
    for chosen in (mask, mask.nonzero()[:, 0]):
        y = x.select_by_index(chosen)
        assert torch.equal(y.features, x.features[mask])
        assert torch.equal(y.indices, x.indices[mask])
        assert y.indice_dict == {}
        spconv.SubMConv3d(4, 4, 3, indice_key="k").to(device)(y)
    assert list(x.indice_dict) == ["k"]


def test_addition_is_by_row_and_keeps_the_left_dict(make, device):
    a = spconv.SubMConv3d(4, 4, 3, indice_key="a").to(device)(make())
    b = make(seed=1)
    total = a + b
    assert torch.equal(total.features, a.features + b.features)
    assert total.indice_dict is a.indice_dict
    assert total.indices is a.indices
    assert torch.equal((a + torch.ones(4, device=device)).features, a.features + 1)
    assert torch.equal((torch.ones(4, device=device) + a).features, a.features + 1)
    for scalar in (lambda: a + 1, lambda: sum([a, b])):
        with pytest.raises(AssertionError, match="expected a SparseConvTensor"):
            scalar()


def test_in_place_addition_works_and_leaves_the_operand_alone(make):
    x = make()
    before = x.features
    y = x
    y += x
    assert torch.equal(y.features, 2 * before)
    assert x.features is before
    y += torch.ones_like(before)
    y.features.sum().backward()


@pytest.mark.parametrize("channels_first", [True, False])
def test_dense_covers_the_whole_grid(make, channels_first):
    x = make()
    expected = torch.zeros(2, 6, 5, 7, 4, device=x.features.device)
    expected[tuple(x.indices.long().unbind(1))] = x.features.detach()
    if channels_first:
        expected = expected.permute(0, 4, 1, 2, 3)
    dense = x.dense(channels_first=channels_first)
    assert dense.is_contiguous()
    assert torch.equal(dense, expected)
    weight = torch.randn_like(dense)
    (gradient,) = torch.autograd.grad(dense, x.features, weight)
    rows = weight if not channels_first else weight.permute(0, 2, 3, 4, 1)
    assert torch.equal(gradient, rows[tuple(x.indices.long().unbind(1))])


def test_dense_keeps_the_last_of_repeated_sites(device):
    indices = torch.tensor([[0, 1], [0, 2], [0, 1]], dtype=torch.int32, device=device)
    features = torch.tensor([[1.0], [2.0], [4.0]], device=device)
    x = SparseConvTensor(features, indices, [3], 1)
    assert x.dense().tolist() == [[[0.0, 4.0, 2.0]]]


def test_from_dense_reads_channels_last_in_lexicographic_order(device):
    dense = torch.zeros(2, 2, 3, 2, device=device)
    dense[1, 0, 2, 1] = 5
    dense[0, 1, 1] = torch.tensor([1.0, 2.0])
    dense.requires_grad_()
    x = SparseConvTensor.from_dense(dense)
    assert x.indices.tolist() == [[0, 1, 1], [1, 0, 2]]
    assert x.indices.dtype == torch.int32
    assert x.features.tolist() == [[1, 2], [0, 5]]
    assert x.spatial_shape == [2, 3]
    assert x.batch_size == 2
    assert torch.equal(x.dense(channels_first=False), dense)
    x.features.sum().backward()
    assert dense.grad.sum() == 4


def test_expand_nd_and_scatter_nd():
    expand = spconv.core.expand_nd
    assert expand(3, 2) == [2, 2, 2]
    assert expand(3, (1, 2, 3)) == [1, 2, 3]
    assert expand(2, np.array([1, 2])) == [1, 2]
    assert expand(2, np.int64(3)) == [3, 3]
    with pytest.raises(AssertionError, match="3 of them"):
        expand(3, [1, 2])
    where = torch.tensor([[0, 1], [1, 0], [0, 1]])
    out = spconv.core.scatter_nd(where, torch.tensor([1.0, 2.0, 3.0]), [2, 2])
    assert out.tolist() == [[0, 3], [2, 0]]


def test_validate_coords_names_bad_rows(make):
    x = make()
    x.validate_coords()
    x.spatial_shape = [1, 1, 1]
    with pytest.raises(ValueError, match="lie outside the grid"):
        x.validate_coords()


def test_fx_proxies_are_recorded_not_checked():
    class Wrap(torch.nn.Module):
        def forward(self, features, indices):
            return SparseConvTensor(features, indices, [4, 4], 1)

    graph = torch.fx.symbolic_trace(Wrap())
    out = graph(torch.ones(1, 2), torch.zeros(1, 3, dtype=torch.int32))
    assert isinstance(out, SparseConvTensor)


def test_repr_names_the_shape(make):
    assert repr(make()) == "SparseConvTensor[shape=torch.Size([40, 4])]"


def test_tensors_can_be_pickled_and_copied(make):
    x = make()
    x.dense()
    for twin in (pickle.loads(pickle.dumps(x)), copy.deepcopy(x.shadow_copy())):
        assert torch.equal(twin.dense(), x.dense())


@pytest.mark.parametrize("strides", ["columns", "every other row", "columns of a wider tensor"])
def test_indices_of_any_strides(make, device, strides):
    """The original reads their memory as if it were contiguous (``tests/parity``)."""
    x = make()
    if strides == "columns":
        indices = x.indices.T.contiguous().T
    elif strides == "every other row":
        indices = x.indices.repeat_interleave(2, 0)[::2]
    else:
        indices = torch.cat([x.indices, x.indices], 1)[:, :4]
    assert not indices.is_contiguous()
    y = SparseConvTensor(x.features, indices, [6, 5, 7], 2)
    for layer in (
        spconv.SubMConv3d(4, 4, 3),
        spconv.SparseConv3d(4, 4, 3, 2, 1),
        spconv.SparseMaxPool3d(2),
        spconv.SparseGlobalMaxPool(),
        spconv.ToDense(),
    ):
        layer = layer.to(device)
        got, expected = layer(y), layer(x)
        if isinstance(got, SparseConvTensor):
            assert torch.equal(got.indices, expected.indices)
            got, expected = got.features, expected.features
        assert torch.equal(got, expected)
