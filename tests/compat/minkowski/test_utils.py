"""``MinkowskiEngine.utils``: quantisation, collation, initial weights, hashes."""

import logging
import pickle

import numpy as np
import pytest
import torch

import compat.minkowski as ME
from compat.minkowski import utils
from compat.minkowski._unique import unique_coordinates
from compat.minkowski.utils.coords import get_coords_map
from compat.minkowski.utils.gradcheck import gradcheck
from compat.minkowski.utils.quantization import quantize

POINTS = np.array([[0.5, 1.2, 3.9], [-0.5, 1, 3], [0.1, 1.0, 3.0], [0.5, 1.2, 3.9]])
FEATS = np.arange(8, dtype=np.float32).reshape(4, 2)
LABELS = np.array([1, 2, 3, 1], dtype=np.int32)
CELLS = [[0, 1, 3], [-1, 1, 3]]
COLLATED = [[0, 0, 1, 3], [0, -1, 1, 3], [0, 0, 1, 3], [0, 0, 1, 3], [1, 0, 1, 3]]


def test_b5_45_coordinates_come_back_as_an_int_tensor_and_features_in_their_container():
    coords, feats = utils.sparse_quantize(POINTS, FEATS)
    assert coords.dtype == torch.int32
    assert coords.tolist() == CELLS
    assert isinstance(feats, np.ndarray)
    assert feats.tolist() == FEATS[:2].tolist()
    coords, feats = utils.sparse_quantize(torch.from_numpy(POINTS), torch.from_numpy(FEATS))
    assert coords.tolist() == CELLS
    assert torch.equal(feats, torch.from_numpy(FEATS[:2]))


def test_b5_45_order_of_what_is_returned():
    items = utils.sparse_quantize(POINTS, FEATS, LABELS, return_index=True, return_inverse=True)
    assert [type(item) for item in items] == [torch.Tensor, np.ndarray, np.ndarray] + [
        torch.Tensor
    ] * 2
    coords, feats, labels, index, inverse = items
    assert coords.tolist() == CELLS
    assert feats.tolist() == FEATS[:2].tolist()
    assert (index.dtype, index.tolist()) == (torch.int64, [0, 1])
    assert (inverse.dtype, inverse.tolist()) == (torch.int64, [0, 1, 0, 0])
    # The released 0.5.4 keeps the first point's label where labels of a voxel differ.
    assert (labels.dtype, labels.tolist()) == (np.int32, [1, 2])


def test_b5_45_a_single_item_comes_bare():
    assert utils.sparse_quantize(POINTS).tolist() == CELLS
    assert utils.sparse_quantize(POINTS, return_maps_only=True).tolist() == [0, 1]
    index, inverse = utils.sparse_quantize(
        POINTS, return_index=True, return_inverse=True, return_maps_only=True
    )
    assert (index.tolist(), inverse.tolist()) == ([0, 1], [0, 1, 0, 0])


@pytest.mark.parametrize("as_tensor", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    "size", [0.5, [0.5, 1, 2], np.array([0.5, 1, 2]), torch.tensor([0.5, 1, 2]), np.float32(0.5)]
)
def test_b5_45_cells_are_floored_after_division(as_tensor: bool, size):
    points = torch.from_numpy(POINTS) if as_tensor else POINTS
    expected = np.floor(POINTS / np.array(torch.as_tensor(size).tolist())).astype(int)
    assert utils.sparse_quantize(points, quantization_size=size).tolist() == expected[:3].tolist()


def test_b5_45_integer_coordinates_are_exact():
    coords = np.array([[2**24 + 1, 0], [2**24, 0], [-(2**31), 2**31 - 1]])
    assert utils.sparse_quantize(coords).tolist() == coords.tolist()


def test_sparse_quantize_of_nothing():
    coords, feats, index, inverse = utils.sparse_quantize(
        np.zeros((0, 3)), np.zeros((0, 2)), return_index=True, return_inverse=True
    )
    assert (coords.shape, feats.shape, len(index), len(inverse)) == ((0, 3), (0, 2), 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinates": POINTS.tolist()}, "array or tensor of two axes is expected; got list"),
        ({"coordinates": POINTS[0]}, r"got ndarray of shape \[3\]"),
        ({"coordinates": POINTS, "features": FEATS[:2]}, "features must have 4 rows.*got 2"),
        ({"coordinates": POINTS, "labels": LABELS[:2]}, "labels must have 4 rows.*got 2"),
        ({"coordinates": POINTS, "return_inverse": True}, "needs return_index=True"),
        ({"coordinates": POINTS, "quantization_size": [1, 2]}, "must have 3 entries.*got 2"),
        ({"coordinates": POINTS, "quantization_size": "a"}, "must be a number.*got 'a'"),
        ({"coordinates": POINTS, "device": "xpu"}, "device must be cpu or cuda; got 'xpu'"),
    ],
)
def test_sparse_quantize_errors(arguments, message: str):
    with pytest.raises(AssertionError, match=message):
        utils.sparse_quantize(**arguments)


@pytest.mark.parametrize("columns", [1, 3, 7], ids="{}d".format)
@pytest.mark.parametrize("reach", [3, 2**30], ids=["narrow", "wide"])
def test_unique_coordinates_keep_the_order_of_first_appearance(columns: int, reach: int):
    generator = torch.Generator().manual_seed(columns)
    distinct = torch.randint(-reach, reach, (20, columns), generator=generator, dtype=torch.int32)
    coords = distinct[torch.randint(20, (60,), generator=generator)]
    rows, inverse = unique_coordinates(coords)
    first = {}
    for row, coord in enumerate(coords.tolist()):
        first.setdefault(tuple(coord), row)
    assert rows.tolist() == list(first.values())
    assert torch.equal(coords[rows][inverse], coords)


def test_unique_coordinate_map_and_quantize():
    coords = torch.tensor([[0, 0], [0, 0], [0, 1], [0, 2]], dtype=torch.int32)
    index, inverse = utils.unique_coordinate_map(coords)
    assert (index.tolist(), inverse.tolist()) == ([0, 2, 3], [0, 0, 1, 2])
    index, inverse = quantize(coords.numpy())
    assert (index.dtype, index.tolist()) == (np.int32, [0, 2, 3])
    assert inverse.tolist() == [0, 0, 1, 2]
    index, inverse = quantize(coords.long())
    assert (index.dtype, index.tolist()) == (torch.int64, [0, 2, 3])
    with pytest.raises(RuntimeError, match=r"must be int32; got torch\.int64"):
        utils.unique_coordinate_map(coords.long())
    with pytest.raises(AssertionError, match="must be int32; got float64"):
        quantize(POINTS)


def test_hashes_are_the_originals():
    # MinkowskiEngine 0.5.4 printed these numbers.
    assert utils.fnv_hash_vec(np.array([[1, -2], [0, 0], [1, 2]])).tolist() == [
        17856061105400746436,
        590684067820433389,
        590682968308805176,
    ]
    assert utils.ravel_hash_vec(np.array([[1, -2], [0, 0], [1, 2]])).tolist() == [5, 2, 9]
    with pytest.raises(AssertionError, match="two axes is expected"):
        utils.fnv_hash_vec(np.zeros(3))


def test_b5_46_batched_coordinates_floor_to_int32_and_keep_fractions_in_float32():
    coords = utils.batched_coordinates([POINTS, torch.from_numpy(POINTS[:1])])
    assert (coords.dtype, coords.tolist()) == (torch.int32, COLLATED)
    coords = utils.batched_coordinates((POINTS,), dtype=torch.float32)
    assert torch.equal(coords[:, 1:], torch.from_numpy(POINTS).float())
    assert utils.batched_coordinates([np.zeros((0, 3)), POINTS[:1]]).tolist() == [[1, 0, 1, 3]]


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        (torch.zeros(2, 3, 4), "must be a list or tuple.*got Tensor"),
        ((POINTS, POINTS[:, :2]), r"same D; got shapes \[\[4, 3\], \[4, 2\]\]"),
        ([POINTS[0]], r"got shapes \[\[3\]\]"),
        ([], r"got shapes \[\]"),
        ([POINTS.tolist()], "must be a numpy array or tensor; got list"),
    ],
)
def test_b5_46_batched_coordinates_need_a_list_of_matrices(coords, message: str):
    with pytest.raises(AssertionError, match=message):
        utils.batched_coordinates(coords)


def test_batched_coordinates_types():
    with pytest.raises(AssertionError, match=r"must be torch\.int32 or torch\.float32; got"):
        utils.batched_coordinates([POINTS], dtype=torch.int64)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["numpy", "torch"])
def test_b5_46_sparse_collate_floors_and_concatenates(as_tensor: bool):
    convert = torch.from_numpy if as_tensor else np.asarray
    coords, feats, labels = (
        [convert(whole), convert(whole[:1])] for whole in (POINTS, FEATS, LABELS)
    )
    batch = utils.sparse_collate(coords, feats, labels)
    assert batch[0].tolist() == COLLATED
    assert batch[1].tolist() == [*FEATS.tolist(), FEATS[0].tolist()]
    assert batch[2].tolist() == [1, 2, 3, 1, 1]
    assert len(utils.sparse_collate(coords, feats)) == 2
    assert utils.sparse_collate(coords, feats, [3, 4])[2] == [3, 4]
    data = list(zip(coords, feats, labels, strict=True))
    for collate in (utils.batch_sparse_collate, utils.SparseCollation()):
        assert all(torch.equal(a, b) for a, b in zip(collate(data), batch, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 2, 3), [FEATS]), "coords must be a list or tuple"),
        (([POINTS], FEATS), "feats must be a list or tuple.*got ndarray"),
        (([POINTS], [FEATS], 3), "labels must be a list or tuple.*got int"),
        (([POINTS], [FEATS[:2]]), "as many features as coordinates; got 2 and 4"),
        (([POINTS], [FEATS.tolist()]), "features of a sample must be.*got list"),
    ],
)
def test_sparse_collate_errors(arguments, message: str):
    with pytest.raises(AssertionError, match=message):
        utils.sparse_collate(*arguments)


def test_b5_46_sparse_collation_needs_three_fields_and_limits_points(caplog):
    data = [(POINTS, FEATS, LABELS), (POINTS[:1], FEATS[:1], LABELS[:1])]
    with caplog.at_level(logging.WARNING):
        coords, _, labels = utils.SparseCollation(limit_numpoints=4)(data)
    assert (coords.tolist(), labels.tolist()) == (COLLATED[:4], LABELS.tolist())
    assert "5 points exceed limit_numpoints=4; keeping 1 of 2 samples" in caplog.text
    with pytest.raises(ValueError, match="not enough values"):
        utils.SparseCollation()([(POINTS, FEATS)])


class Scans(torch.utils.data.Dataset):
    """Quantises in a worker process, as training code does."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int):
        coords, feats = utils.sparse_quantize(POINTS[: 4 - index], FEATS[: 4 - index])
        return coords, feats, np.full(len(coords), index)


def test_quantisation_and_collation_work_in_worker_processes():
    collate = pickle.loads(pickle.dumps(utils.SparseCollation()))
    loader = torch.utils.data.DataLoader(Scans(), 2, num_workers=1, collate_fn=collate)
    ((coords, feats, labels),) = loader
    assert coords.tolist() == [[b, *cell] for b in (0, 1) for cell in CELLS]
    assert feats.shape == (4, 2)
    assert labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("shape", "mode", "fan"),
    [
        ((27, 4, 8), "fan_in", 27 * 4),
        ((27, 4, 8), "FAN_OUT", 27 * 8),
        # A pointwise kernel is [in, out], but the original reads it as [out, in], as in a linear
        # layer.
        ((4, 8), "fan_in", 8),
        ((4, 8), "fan_out", 4),
    ],
)
def test_kaiming_normal_fans(shape: tuple[int, ...], mode: str, fan: int):
    kernel = torch.empty(shape)
    torch.manual_seed(0)
    assert utils.kaiming_normal_(kernel, mode=mode, nonlinearity="relu") is kernel
    torch.manual_seed(0)
    assert torch.equal(kernel, torch.empty(shape).normal_(0, (2 / fan) ** 0.5))


def test_kaiming_normal_errors():
    with pytest.raises(ValueError, match=r"one of \['fan_in', 'fan_out'\]; got 'x'"):
        utils.kaiming_normal_(torch.zeros(2, 2), mode="x")
    with pytest.raises(ValueError, match=r"at least 2 axes; got shape \[2\]"):
        utils.kaiming_normal_(torch.zeros(2))


def test_get_coords_map_pairs_rows_with_their_cells(make):
    x = make(40)
    y = ME.MinkowskiMaxPooling(2, 2, dimension=3)(x)
    fine, coarse = get_coords_map(x, y)
    assert fine.tolist() == list(range(40))
    steps = x.C.new_tensor([1, 2, 2, 2])
    assert torch.equal(y.C[coarse], x.C.div(steps, rounding_mode="floor") * steps)
    assert [rows.tolist() for rows in get_coords_map(x, x)] == [list(range(40))] * 2
    with pytest.raises(AssertionError, match="takes two SparseTensors; got Tensor"):
        get_coords_map(x, y.F)
    with pytest.raises(AssertionError, match="must share a coordinate manager"):
        get_coords_map(x, make(40))


class Square(torch.autograd.Function):
    """Squares; its gradient is right."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_gradcheck_takes_functions_and_function_classes():
    x = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(Square, (x,))
    assert gradcheck(torch.sin, (x,))
