"""TensorField: points, their cells, and the way back."""

import pytest
import torch

import compat.minkowski as ME
from compat.minkowski import SparseTensorQuantizationMode as Mode
from compat.minkowski._errors import MinkowskiError
from compat.minkowski._fields import CoordinateField
from tests.compat.minkowski import _oracle as oracle

POINTS = [[0, 0.5, -0.2], [0, 0.9, -0.9], [1, 0.5, -0.2], [0, -3.0, 2.0], [0, 0.1, -0.4]]
FEATS = [[1.0, 6], [2, 5], [3, 4], [4, 3], [9, -1]]


@pytest.fixture
def field(device):
    feats = torch.tensor(FEATS, device=device).requires_grad_()
    return ME.TensorField(feats, torch.tensor(POINTS, device=device))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (Mode.UNWEIGHTED_AVERAGE, [[4.0, 10 / 3], [3.0, 4.0], [4.0, 3.0]]),
        (Mode.UNWEIGHTED_SUM, [[12.0, 10.0], [3.0, 4.0], [4.0, 3.0]]),
        (Mode.RANDOM_SUBSAMPLE, [[1.0, 6.0], [3.0, 4.0], [4.0, 3.0]]),
        (Mode.MAX_POOL, [[9.0, 6.0], [3.0, 4.0], [4.0, 3.0]]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_b5_42_sparse_combines_the_points_of_a_cell(mode, expected, field):
    x = field.sparse(quantization_mode=mode)
    assert x.C.tolist() == [[0, 0, -1], [1, 0, -1], [0, -3, 2]]
    torch.testing.assert_close(x.F.tolist(), expected)
    assert field.inverse_mapping(x.coordinate_map_key).tolist() == [0, 0, 1, 2, 0]
    # The points may also be on an existing map with the same sites.
    again = field.sparse(coordinate_map_key=x.coordinate_map_key, quantization_mode=mode)
    assert again.coordinate_map_key == x.coordinate_map_key
    torch.testing.assert_close(again.F.tolist(), expected)
    x.F.sum().backward()
    assert field.F.grad.any()


@pytest.mark.parametrize("mode", [Mode.RANDOM_SUBSAMPLE, Mode.UNWEIGHTED_SUM], ids=str)
def test_sparse_on_a_map_leaves_points_out_and_sites_empty(mode, field):
    coords = torch.tensor([[0, 0, -1], [0, 7, 7]], dtype=torch.int32, device=field.device)
    key, _ = field.coordinate_manager.insert_and_map(coords)
    x = field.sparse(coordinate_map_key=key, quantization_mode=mode)
    assert x.coordinate_map_key == key
    assert x.F.tolist() == [[1, 6] if mode is Mode.RANDOM_SUBSAMPLE else [12, 10], [0, 0]]


def test_b5_42_sparse_averages_by_default_and_keeps_the_caller_s_coordinates(field):
    assert field.quantization_mode is Mode.UNWEIGHTED_AVERAGE
    torch.testing.assert_close(field.C.tolist(), [[float(v) for v in p] for p in POINTS])
    torch.testing.assert_close(
        field.sparse().F, field.sparse(quantization_mode=Mode.UNWEIGHTED_AVERAGE).F
    )


@pytest.mark.parametrize("stride", [2, [4, 1]])
def test_b5_42_sparse_floors_to_the_stride(stride, field):
    x = field.sparse(stride)
    steps = [2, 2] if stride == 2 else stride
    assert x.tensor_stride == steps
    cells = [
        [int(b), *(int(v // s) * s for v, s in zip(p, steps, strict=True))] for b, *p in POINTS
    ]
    assert x.C.tolist() == [c for i, c in enumerate(cells) if c not in cells[:i]]


def test_b5_42_every_call_adds_a_map(field):
    first, second = field.sparse(), field.sparse()
    assert first.coordinate_map_key == ME.CoordinateMapKey([1, 1], "")
    assert second.coordinate_map_key.get_key()[1]
    manager, key = field.coordinate_manager, field.coordinate_field_map_key
    assert manager.field_to_sparse_keys(key) == [t.coordinate_map_key for t in (first, second)]
    assert manager.exists_field_to_sparse(key, first.coordinate_map_key)
    rows, position = manager.get_field_to_sparse_map(key, first.coordinate_map_key)
    assert rows.tolist() == [0, 2, 3]
    assert position.tolist() == [0, 0, 1, 2, 0]


def test_b5_42_batch_indices_are_rounded(device):
    points = torch.tensor([[0.9, 1.0], [1.1, 1.0]], device=device)
    x = ME.TensorField(torch.ones(2, 1, device=device), points).sparse()
    assert x.C.tolist() == [[1, 1]]


def test_b5_42_points_far_out_are_floored_exactly_in_float64(device):
    far = 2.0**24 + 1
    points = torch.tensor([[0, far + 0.5], [0, -far - 0.5]], dtype=torch.float64, device=device)
    x = ME.TensorField(torch.ones(2, 1, device=device), points).sparse()
    assert x.C[:, 1].tolist() == [2**24 + 1, -(2**24) - 2]


@pytest.mark.parametrize("stride", [1, 2])
def test_b5_43_slice_returns_to_the_points(stride, field):
    x = field.sparse()
    y = ME.MinkowskiSumPooling(stride, stride, dimension=2)(x)
    z = y.slice(field)
    assert isinstance(z, ME.TensorField)
    assert z.coordinate_field_map_key == field.coordinate_field_map_key
    assert len(z) == 5
    rows = oracle.rows_of(y.C)
    for feats, site in zip(z.F, field.sparse().C[field.inverse_mapping(x.coordinate_map_key)],
                           strict=True):  # fmt: skip
        cell = oracle.cell(tuple(site.tolist()), y.tensor_stride)
        assert feats.tolist() == y.F[rows[cell]].tolist()
    both = y.cat_slice(field)
    assert torch.equal(both.F, torch.cat([z.F, field.F], 1))


def test_b5_43_slice_by_a_sparse_tensor_of_repeated_coordinates(device):
    coords = torch.tensor([[0, 1], [0, 2], [0, 1]], dtype=torch.int32, device=device)
    feats = torch.tensor([[1.0], [2], [3]], device=device)
    x = ME.SparseTensor(feats, coords, quantization_mode=Mode.UNWEIGHTED_AVERAGE)
    y = x.slice(x)
    assert y.F.flatten().tolist() == [2, 2, 2]
    assert y.C.tolist() == [[0, 1], [0, 2], [0, 1]]
    assert x.cat_slice(x).F.shape == (3, 2)


def test_b5_43_slice_refuses_what_it_cannot_map(field):
    summed = ME.TensorField(
        field.F, coordinate_field_map_key=field.coordinate_field_map_key,
        coordinate_manager=field.coordinate_manager, quantization_mode=Mode.UNWEIGHTED_SUM,
    )  # fmt: skip
    x = field.sparse()
    with pytest.raises(AssertionError, match="quantised by RANDOM_SUBSAMPLE or UNWEIGHTED_AVER"):
        x.slice(summed)
    pruned = ME.MinkowskiPruning()(x, torch.tensor([True, False, True], device=x.device))
    with pytest.raises(AssertionError, match=r"1 of 5 points lie in no cell of .*pruned"):
        pruned.slice(field)
    assert pruned.interpolate(field).shape == (5, 2)


def test_b5_44_splat_and_interpolate_share_their_weights(field):
    x = field.splat()
    total = x.F.sum(0)
    torch.testing.assert_close(total, field.F.sum(0))
    rows = oracle.rows_of(x.C)
    assert (0, -3, 2) in rows
    torch.testing.assert_close(x.F[rows[0, -3, 2]], field.F[3])
    y = x.interpolate(field)
    assert y.coordinate_field_map_key == field.coordinate_field_map_key
    torch.testing.assert_close(y.F, x.features_at_coordinates(field.C))
    y.F.sum().backward()
    assert field.F.grad.any()


def test_points_may_require_a_gradient_and_get_none(device):
    points = torch.tensor(POINTS, device=device, requires_grad=True)
    field = ME.TensorField(torch.tensor(FEATS, device=device).requires_grad_(), points)
    x = field.splat()
    y = x.interpolate(field).F.sum() + field.sparse().F.sum()
    (y + x.features_at_coordinates(points).sum()).backward()
    assert field.F.grad.any()
    assert points.grad is None


def test_b5_44_splat_gradcheck(device):
    points = torch.tensor(POINTS, dtype=torch.float64, device=device)
    feats = torch.tensor(FEATS, dtype=torch.float64, device=device).requires_grad_()

    def run(feats):
        made = ME.TensorField(feats, points)
        return made.splat().interpolate(made).F

    assert torch.autograd.gradcheck(run, (feats,))


def test_members(field):
    assert [rows.tolist() for rows in field.decomposition_permutations] == [[0, 1, 3, 4], [2]]
    assert field.decomposed_features[1].tolist() == [[3, 4]]
    assert field.coordinate_key == field.coordinate_field_map_key
    assert not hasattr(field, "coordinate_map_key")
    assert field.tensor_stride == [1, 1]
    assert (field + field).F.tolist() == (2 * field.F).tolist()
    assert "coordinate_field_map_key=coordinate map key:[1, 1]" in repr(field)
    again = ME.TensorField(
        field.F, coordinate_field_map_key=field.coordinate_field_map_key,
        coordinate_manager=field.coordinate_manager,
    )  # fmt: skip
    assert again.C is not None
    assert torch.equal(again.C, field.C)


def test_errors(field, device):
    points = torch.tensor(POINTS, device=device)
    for options, message in [
        ({}, "give coordinates, or coordinate_field_map_key and coordinate_manager"),
        ({"coordinates": points[:3]}, "the same number of rows; got 5 and 3"),
        ({"coordinates": points, "quantization_mode": Mode.NO_QUANTIZATION}, "must be one of"),
        (
            {"coordinates": points, "coordinate_field_map_key": field.coordinate_field_map_key},
            "not both",
        ),
    ]:
        with pytest.raises((AssertionError, ValueError), match=message):
            ME.TensorField(field.F, **options)
    with pytest.raises(TypeError, match=r"in 0\.5 use features"):
        ME.TensorField(feats=field.F)
    with pytest.raises(AssertionError, match=r"is TensorField\.splat"):
        field.sparse(quantization_mode=Mode.SPLAT_LINEAR_INTERPOLATION)
    other = ME.TensorField(field.F, points + 3)
    with pytest.raises(AssertionError, match="must share a coordinate manager"):
        field + other


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 5)])
def test_points_of_another_shape_are_refused(shape):
    with pytest.raises(MinkowskiError, match=r"points must have shape \[N, 4\].* got"):
        CoordinateField(torch.zeros(shape), 3)
