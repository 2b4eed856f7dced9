"""SparseTensor: making one, its members, arithmetic, conversions."""

import inspect
import operator

import pytest
import torch

import compat.minkowski as ME
from compat.minkowski import SparseTensorQuantizationMode as Mode
from tests.compat.minkowski import _oracle as oracle


@pytest.fixture
def repeated(device):
    """Features and coordinates of five points at three sites."""
    coords = torch.tensor([[0, 5], [0, -2], [0, 5], [1, 5], [0, -2]], dtype=torch.int32)
    feats = torch.tensor([[1.0, -8], [2, -7], [5, -6], [6, -5], [7, -4]])
    return feats.to(device).requires_grad_(), coords.to(device)


def on(x, feats):
    return ME.SparseTensor(
        feats, coordinate_map_key=x.coordinate_map_key, coordinate_manager=x.coordinate_manager
    )


# Making


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (Mode.RANDOM_SUBSAMPLE, [[1, -8], [2, -7], [6, -5]]),
        (Mode.UNWEIGHTED_AVERAGE, [[3, -7], [4.5, -5.5], [6, -5]]),
        (Mode.UNWEIGHTED_SUM, [[6, -14], [9, -11], [6, -5]]),
        (Mode.MAX_POOL, [[5, -6], [7, -4], [6, -5]]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_b5_9_features_of_repeated_coordinates_combine(mode, expected, repeated):
    x = ME.SparseTensor(*repeated, quantization_mode=mode)
    assert x.C.tolist() == [[0, 5], [0, -2], [1, 5]]
    assert x.F.tolist() == expected
    assert x.quantization_mode is mode
    x.F.sum().backward()
    assert repeated[0].grad.any()


@pytest.mark.parametrize("mode", list(Mode)[:5], ids=lambda mode: mode.name)
def test_b5_9_distinct_coordinates_keep_their_features(mode, repeated):
    feats, coords = repeated
    x = ME.SparseTensor(feats[:2], coords[:2], quantization_mode=mode)
    assert x.F.tolist() == feats[:2].tolist()


def test_b5_9_modes_that_cannot_be_met_raise(repeated):
    with pytest.raises(ValueError, match="needs distinct coordinates; got 5 rows at 3 sites"):
        ME.SparseTensor(*repeated, quantization_mode=Mode.NO_QUANTIZATION)
    with pytest.raises(ValueError, match=r"is TensorField.splat\(\)"):
        ME.SparseTensor(*repeated, quantization_mode=Mode.SPLAT_LINEAR_INTERPOLATION)
    with pytest.raises(ValueError, match="must be a SparseTensorQuantizationMode; got 0"):
        ME.SparseTensor(*repeated, quantization_mode=0)


def test_b5_8_and_10_rows_stay_in_order_and_are_mapped(repeated):
    x = ME.SparseTensor(*repeated)
    assert x.unique_index.tolist() == [0, 1, 3]
    assert x.inverse_mapping.tolist() == [0, 1, 0, 2, 1]
    assert x.unique_index.dtype == x.inverse_mapping.dtype == torch.int64
    y = ME.MinkowskiSumPooling(3, 1, dimension=1)(x)
    assert not hasattr(y, "unique_index")
    assert not hasattr(y, "inverse_mapping")


def test_b5_8_row_order_of_distinct_coordinates_is_the_callers(make):
    x = make(50)
    assert x.unique_index.tolist() == x.inverse_mapping.tolist() == list(range(50))
    assert x.C.tolist() == make(50).C.tolist() != oracle.sites(x.C)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_b5_1_other_coordinates_are_floored_with_a_warning(dtype, device):
    given = torch.tensor([[0, 1.5, -0.5], [1, -3.0, 2.9]]).to(dtype)
    expected = given.floor().int() if dtype.is_floating_point else given.int()
    with pytest.warns(UserWarning, match="rounded down from torch.* to int32"):
        x = ME.SparseTensor(torch.ones(2, 1, device=device), given.to(device))
    assert x.C.dtype == torch.int32
    assert x.C.tolist() == expected.tolist()


def test_b5_7_a_key_takes_features_of_any_type_and_channels(make):
    x = make(10)
    y = on(x, torch.ones(10, 7, dtype=torch.bool, device=x.device))
    assert y.dtype == torch.bool
    assert y.shape == (10, 7)
    assert y.C.tolist() == x.C.tolist()


def test_d35_coordinates_are_one_object_and_no_part_of_the_map(make):
    x = make(10)
    assert x.C is x.coordinates is x.C
    before = x.coordinate_manager.get_coordinates(x.coordinate_map_key).tolist()
    x.C[:, 1:] += 5
    assert x.coordinate_manager.get_coordinates(x.coordinate_map_key).tolist() == before


def test_d32_device_moves_both(device):
    x = ME.SparseTensor(torch.ones(2, 1), torch.tensor([[0, 1], [0, 2]]).int(), device=device)
    assert x.F.device.type == x.C.device.type == device.type
    assert x.device == x.F.device
    assert x.get_device() == x.F.get_device()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": torch.ones(3)}, r"features must be .* shape \[N, C\]; got \[3\]"),
        ({"features": 3}, "features must be .*; got int"),
        ({"features": torch.ones(3, 1)}, "the same number of rows; got 3 and 2"),
        ({"coordinates": [[0, 1]]}, "coordinates must be a torch.Tensor"),
        ({"coordinates": None}, "give coordinates, or coordinate_map_key and coordinate_manager"),
        ({"coordinate_map_key": ME.CoordinateMapKey([1], "")}, "not both"),
        ({"coordinates": torch.zeros(2, 2, device="meta")}, "must be on one device"),
    ],
    ids=str,
)
def test_errors(options, message):
    valid = {"features": torch.ones(2, 1), "coordinates": torch.zeros(2, 2, dtype=torch.int32)}
    with pytest.raises((AssertionError, ValueError), match=message):
        ME.SparseTensor(**{**valid, **options})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("feats", "features"),
        ("coords", "coordinates"),
        ("coords_key", "coordinate_map_key"),
        ("coords_manager", "coordinate_manager"),
    ],
)
def test_d28_arguments_of_0_4_name_those_of_0_5(old, new):
    with pytest.raises(TypeError, match=f"{old!r} is .* 0.4; in 0.5 use {new}"):
        ME.SparseTensor(**{old: None})
    with pytest.raises(TypeError, match=r"'has_bias' is .*; in 0\.5 use bias"):
        ME.MinkowskiConvolution(1, 1, kernel_size=3, has_bias=True, dimension=3)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("coords", "coordinates"),
        ("feats", "features"),
        ("coords_key", "coordinate_map_key"),
        ("coords_man", "coordinate_manager"),
    ],
)
def test_d28_attributes_of_0_4_name_those_of_0_5(old, new, make):
    with pytest.raises(AttributeError, match=f"no attribute {old!r}.*in 0.5 use {new}"):
        getattr(make(4), old)


@pytest.mark.parametrize(
    "make_layer",
    [
        ME.MinkowskiGlobalPooling,
        ME.MinkowskiGlobalMaxPooling,
        ME.MinkowskiBroadcast,
        ME.MinkowskiBroadcastConcatenation,
        ME.MinkowskiBroadcastMultiplication,
        ME.MinkowskiPruning,
        ME.MinkowskiUnion,
        lambda **old: ME.MinkowskiInstanceNorm(4, **old),
        lambda **old: ME.MinkowskiStableInstanceNorm(4, **old),
    ],
)
@pytest.mark.parametrize("old", ["dimension", "D"])
def test_d28_layers_that_0_5_does_not_tell_the_dimension_say_so(make_layer, old):
    with pytest.raises(TypeError, match=f"{old!r} is .* 0.4; in 0.5 use nothing: the input knows"):
        make_layer(**{old: 3})
    make_layer()


def test_d28_other_arguments_and_members_of_0_4_name_those_of_0_5():
    with pytest.raises(TypeError, match=r"'average' .* in 0\.5 use MinkowskiGlobalAvgPooling or"):
        ME.MinkowskiGlobalPooling(average=False)
    with pytest.raises(TypeError, match=r"sparse_quantize: 'coords' .* in 0\.5 use coordinates"):
        ME.utils.sparse_quantize(coords=torch.zeros(2, 3))
    with pytest.raises(AttributeError, match=r"no member 'HYPERCUBE'.* in 0\.5 use HYPER_CUBE"):
        _ = ME.RegionType.HYPERCUBE
    with pytest.raises(AttributeError, match=r"in 0\.5 use SHARE_COORDINATE_MANAGER"):
        _ = ME.SparseTensorOperationMode.SHARE_COORDS_MANAGER
    with pytest.raises(AttributeError, match=r"RegionType has no member 'HYPER'\.$"):
        _ = ME.RegionType.HYPER


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("MinkowskiAvgUnpooling", "MinkowskiPoolingTranspose"),
        ("GlobalPoolingMode", "PoolingMode"),
        ("clear_global_coords_man", "clear_global_coordinate_manager"),
    ],
)
def test_names_of_other_versions_say_what_to_use(old, new):
    with pytest.raises(AttributeError, match=rf"{old!r}: 0\.5 has {new}\."):
        getattr(ME, old)
    assert hasattr(ME, new)


def test_b4_signature():
    assert list(inspect.signature(ME.SparseTensor).parameters) == [
        "features", "coordinates", "tensor_stride", "coordinate_map_key", "coordinate_manager",
        "quantization_mode", "allocator_type", "minkowski_algorithm", "requires_grad", "device",
    ]  # fmt: skip


def test_b5_47_managers_are_separate_or_shared(make):
    assert make().coordinate_manager is not make().coordinate_manager
    ME.set_sparse_tensor_operation_mode(ME.SparseTensorOperationMode.SHARE_COORDINATE_MANAGER)
    try:
        x, y = make(10, seed=1), make(10, seed=2)
        assert x.coordinate_manager is y.coordinate_manager is ME.global_coordinate_manager()
        assert oracle.sites((x + y).C) == sorted(
            map(list, {tuple(c) for t in (x, y) for c in t.C.tolist()})
        )
        ME.clear_global_coordinate_manager()
        assert make().coordinate_manager is not x.coordinate_manager
    finally:
        ME.set_sparse_tensor_operation_mode(
            ME.SparseTensorOperationMode.SEPARATE_COORDINATE_MANAGER
        )
        ME.clear_global_coordinate_manager()
    with pytest.raises(AssertionError, match="must share a coordinate manager"):
        make() + make()
    with pytest.raises(AssertionError, match="expected a SparseTensorOperationMode; got 1"):
        ME.set_sparse_tensor_operation_mode(1)


# Members


def test_b5_39_decomposition_is_by_batch_index(device):
    coords = torch.tensor([[2, 1], [0, 5], [2, -7], [0, 3]], dtype=torch.int32, device=device)
    feats = torch.arange(4.0, device=device)[:, None]
    x = ME.SparseTensor(feats, coords)
    assert [rows.tolist() for rows in x.decomposition_permutations] == [[1, 3], [], [0, 2]]
    assert x._batchwise_row_indices is x.decomposition_permutations
    assert [c.tolist() for c in x.decomposed_coordinates] == [[[5], [3]], [], [[1], [-7]]]
    assert [f.tolist() for f in x.decomposed_features] == [[[1], [3]], [], [[0], [2]]]
    assert len(x.decomposed_coordinates) == 3
    both = x.decomposed_coordinates_and_features
    assert [len(part) for part in both[0]] == [len(part) for part in both[1]] == [2, 0, 2]
    assert x.coordinates_at(2).tolist() == [[1], [-7]]
    assert x.features_at(2).tolist() == [[0], [2]]
    assert x.coordinates_and_features_at(2)[1].tolist() == [[0], [2]]


def test_b5_39_concatenated_samples_are_the_rows_of_a_sorted_batch(make):
    x = make(40)
    order = x.C[:, 0].sort(stable=True).indices
    x = ME.SparseTensor(x.F[order], x.C[order])
    for each in (x, ME.MinkowskiMaxPooling(2, 2, dimension=3)(x)):
        assert torch.equal(torch.cat(each.decomposed_features), each.F)
        assert torch.equal(torch.cat(each.decomposed_coordinates), each.C[:, 1:])


def test_members(make):
    x = make(10, channels=3, tensor_stride=2)
    assert len(x) == 10
    assert x.shape == x.size() == (10, 3)
    assert x.size(1) == 3
    assert x.D == x.dimension == 3
    assert x.tensor_stride == [2, 2, 2]
    assert x.coordinate_key == x.coordinate_map_key
    assert x.features is x.F
    assert x.requires_grad
    assert x._manager is x.coordinate_manager
    assert "coordinate map key:[2, 2, 2]" in repr(x)


def test_b5_36_conversions_modify_and_return_the_tensor(make):
    x = make(10)
    for convert, dtype in [("double", torch.float64), ("half", torch.float16),
                           ("bfloat16", torch.bfloat16), ("float", torch.float32)]:  # fmt: skip
        assert getattr(x, convert)() is x
        assert x.dtype == dtype
    assert x.detach() is x
    assert not x.requires_grad
    assert x.requires_grad_() is None
    assert x.requires_grad


def test_to_keeps_the_map_on_its_device(make):
    x = make(10)
    y = x.to(torch.float64)
    assert y.dtype == torch.float64
    assert y.coordinate_manager is x.coordinate_manager
    z = x.cpu()
    assert z.device.type == "cpu"
    assert z.C.tolist() == x.C.tolist()
    assert z.coordinate_map_key == x.coordinate_map_key


@pytest.mark.gpu
def test_cuda_makes_a_new_manager():
    x = ME.SparseTensor(torch.ones(2, 1), torch.tensor([[0, 2], [0, -4]]).int(), tensor_stride=2)
    y = x.cuda()
    assert y.C.is_cuda
    assert y.C.tolist() == x.C.tolist()
    assert y.tensor_stride == [2]
    assert y.coordinate_manager is not x.coordinate_manager


# Arithmetic


OPERATORS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}


@pytest.mark.parametrize("name", OPERATORS)
def test_b5_34_one_key_is_elementwise_and_keeps_it(name, make):
    x = make()
    y = on(x, torch.rand_like(x.F) + 1)
    z = OPERATORS[name](x, y)
    assert z.coordinate_map_key == x.coordinate_map_key
    torch.testing.assert_close(z.F, OPERATORS[name](x.F, y.F))


@pytest.mark.parametrize("name", OPERATORS)
def test_b5_34_different_keys_meet_on_the_union(name, make):
    """Rows that only the left operand has keep their value, for every operator."""
    x = make(30, channels=2, dtype=torch.float64)
    y = make(30, channels=2, seed=1, dtype=torch.float64, coordinate_manager=x.coordinate_manager)
    z = OPERATORS[name](x, y)
    own, others = oracle.rows_of(x.C), oracle.rows_of(y.C)
    assert set(own) - set(others)
    assert set(own) & set(others)
    assert {tuple(c) for c in z.C.tolist()} == set(own) | set(others)
    for site, row in oracle.rows_of(z.C).items():
        left = x.F[own[site]] if site in own else torch.zeros_like(x.F[0])
        expected = OPERATORS[name](left, y.F[others[site]]) if site in others else left
        torch.testing.assert_close(z.F[row], expected)


def test_b5_34_union_of_strides_has_the_least(make):
    x = make(30)
    coarse = ME.MinkowskiSumPooling([2, 1, 4], [2, 1, 4], dimension=3)(x)
    z = coarse + x
    assert z.tensor_stride == [1, 1, 1]
    assert set(oracle.rows_of(z.C)) == set(oracle.rows_of(x.C)) | set(oracle.rows_of(coarse.C))


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_b5_34_arithmetic_gradcheck(name, make):
    x = make(8, channels=2, reach=1, dtype=torch.float64)
    y = make(8, channels=2, reach=1, seed=1, dtype=torch.float64,
             coordinate_manager=x.coordinate_manager)  # fmt: skip
    assert torch.autograd.gradcheck(lambda a, b: OPERATORS[name](on(x, a), on(y, b)).F, (x.F, y.F))


@pytest.mark.parametrize("name", ["iadd", "isub", "imul"])
def test_b5_35_in_place_operators_modify_the_left_features(name, make):
    x = make()
    feats = x.F.detach().clone()
    left, right = on(x, feats.clone()), on(x, torch.rand_like(feats) + 1)
    memory = left.F
    result = getattr(operator, name)(left, right)
    assert result is left
    assert left.F is memory
    torch.testing.assert_close(left.F, getattr(operator, name)(feats.clone(), right.F))


def test_b5_35_division_in_place_makes_a_new_tensor(make):
    """The keys may therefore differ, and features that the tensor shares stay as they are."""
    x = make(30, channels=2)
    y = make(30, channels=2, seed=1, coordinate_manager=x.coordinate_manager)
    for right in (y, on(x, x.F + 2), x.F + 2, 2.0):
        feats = x.F.detach().clone().requires_grad_()
        z = left = on(x, feats)
        z /= right
        assert z is not left
        assert torch.equal(left.F, x.F)
        expected = left / right
        torch.testing.assert_close(z.F, expected.F)
        assert torch.equal(z.C, expected.C)


def test_b5_35_in_place_operators_need_one_key(make):
    x = make()
    y = make(seed=1, coordinate_manager=x.coordinate_manager)
    with pytest.raises(AssertionError, match="must have the same coordinate_map_key; got"):
        x += y


def test_b5_35_numbers_and_tensors_broadcast_on_both_sides(make):
    x = make(10, channels=3)
    row = torch.rand(3, device=x.device) + 1
    for operand in (2, 0.5, row):
        for function in OPERATORS.values():
            torch.testing.assert_close(function(x, operand).F, function(x.F, operand))
            torch.testing.assert_close(function(operand, x).F, function(operand, x.F))
    torch.testing.assert_close((-x).F, -x.F)
    torch.testing.assert_close((x**2).F, x.F**2)
    with pytest.raises(TypeError):
        x + "1"


# Conversions


@pytest.mark.parametrize("contract", [True, False])
def test_b5_40_dense_starts_at_the_origin(contract, device):
    coords = torch.tensor([[0, 0, 4], [1, 6, 2]], dtype=torch.int32, device=device)
    feats = torch.tensor([[1.0, 2, 3], [4, 5, 6]], device=device).requires_grad_()
    x = ME.SparseTensor(feats, coords, tensor_stride=2)
    dense, first, stride = x.dense(contract_stride=contract)
    assert dense.shape == ((2, 3, 4, 3) if contract else (2, 3, 7, 5))
    step = 2 if contract else 1
    assert dense[0, :, 0, 4 // step].tolist() == [1, 2, 3]
    assert dense[1, :, 6 // step, 2 // step].tolist() == [4, 5, 6]
    assert dense.count_nonzero() == 6
    assert first.tolist() == [[0, 2]]
    assert stride.tolist() == [2, 2]
    dense.sum().backward()
    assert feats.grad.tolist() == [[1.0] * 3] * 2


def test_b5_40_dense_from_a_corner_and_to_a_shape(make):
    x = make(20, channels=2)
    with pytest.raises(ValueError, match=r"coordinates are negative.*pass min_coordinate="):
        x.dense()
    corner = torch.IntTensor([-3, -4, -3])
    dense, first, _ = x.dense(shape=torch.Size([4, 9, 7, 8, 6]), min_coordinate=corner)
    assert dense.shape == (4, 2, 7, 8, 6)
    assert first.tolist() == [[-3, -4, -3]]
    for (batch, *site), feats in zip(x.C.tolist(), x.F, strict=True):
        at = [s - c for s, c in zip(site, corner.tolist(), strict=True)]
        assert dense[(batch, slice(None), *at)].tolist() == feats.tolist()


def test_b5_40_errors(make):
    x = make(20, tensor_stride=2)
    for options, message in [
        ({"min_coordinate": torch.IntTensor([-3, -4, -4])}, "must be a multiple of the tensor"),
        ({"min_coordinate": torch.IntTensor([0, 0, 0])}, "do not fit shape"),
        ({"min_coordinate": torch.IntTensor([-4])}, "must be an integer tensor of 3 entries"),
        ({"shape": torch.Size([2, 4, 9])}, r"shape must be \[B, C, 3 spatial extents\]"),
        (
            {"shape": torch.Size([1, 4, 9, 9, 9]), "min_coordinate": torch.IntTensor([-4] * 3)},
            r"do not fit shape \[1, 4, 9, 9, 9\]",
        ),
    ]:
        with pytest.raises((AssertionError, ValueError), match=message):
            x.dense(**options)


def test_sparse_is_a_torch_sparse_tensor(make):
    x = ME.MinkowskiSumPooling(2, 2, dimension=3)(make(20, channels=2))
    made, first, stride = x.sparse()
    made = made.coalesce()
    assert stride.tolist() == [2, 2, 2]
    low = x.C[:, 1:].amin(0).cpu()
    assert first.tolist() == [(low // 2).tolist()]
    corner = torch.IntTensor((low // 2 * 2).tolist())
    dense, _, _ = x.dense(min_coordinate=corner)
    torch.testing.assert_close(made.to_dense(), dense.movedim(1, -1))


def test_empty_tensors(device):
    coords = torch.empty(0, 3, dtype=torch.int32, device=device)
    x = ME.SparseTensor(torch.empty(0, 4, device=device), coords)
    assert len(x) == 0
    assert x.decomposed_features == []
    assert (x + x).shape == (0, 4)
    assert x.dense(shape=torch.Size([1, 4, 2, 2]))[0].shape == (1, 4, 2, 2)
    with pytest.raises(AssertionError, match="a tensor without rows needs shape="):
        x.dense()
