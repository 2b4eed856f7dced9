"""Mistakes of users: the errors name the mistake and a remedy."""

import numpy as np
import pytest
import torch

import compat.minkowski as ME

COORDS = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0]], dtype=torch.int32)
FEATS = torch.ones(3, 4)
NAN = torch.full((3, 4), float("nan"))


def tensor() -> ME.SparseTensor:
    return ME.SparseTensor(FEATS, COORDS)


def field() -> ME.TensorField:
    return ME.TensorField(FEATS, COORDS.float())


@pytest.mark.parametrize("make", [ME.SparseTensor, ME.TensorField])
@pytest.mark.parametrize("options", [{}, {"device": "cpu"}])
def test_arrays_are_no_tensors(make, options):
    with pytest.raises(
        ValueError, match=r"features must be a torch\.Tensor of shape \[N, C\]; got"
    ):
        make(FEATS.numpy(), COORDS.float(), **options)
    with pytest.raises(ValueError, match=r"coordinates .*; got ndarray\. Convert with torch\.as_t"):
        make(FEATS, COORDS.float().numpy(), **options)
    with pytest.raises(ValueError, match=r"coordinates must be .* batch index first; got list\."):
        make(FEATS, COORDS.tolist(), **options)


@pytest.mark.filterwarnings("ignore:coordinates are rounded down")
@pytest.mark.parametrize(
    "coords",
    [
        NAN,
        COORDS.float().index_fill(0, torch.tensor([1]), float("inf")),
        COORDS.double() + 2**31,
        COORDS.long() - 2**40,
    ],
    ids=["nan", "inf", "float64", "int64"],
)
def test_coordinates_that_int32_cannot_hold_are_refused(coords):
    message = r"coordinates must be finite and fit int32; got values from .* Remove invalid points"
    with pytest.raises(ValueError, match=message):
        ME.SparseTensor(FEATS, coords)
    with pytest.raises(ValueError, match=message):
        ME.TensorField(FEATS, coords).sparse()
    with pytest.raises(ValueError, match=message):
        ME.utils.batched_coordinates([coords])
    for points in (coords, coords.numpy()):
        with pytest.raises(ValueError, match=message):
            ME.utils.sparse_quantize(points)
    if not coords.is_floating_point():
        with pytest.raises(ValueError, match=message):
            ME.CoordinateManager(D=3).insert_and_map(coords)


def test_the_ends_of_int32_are_coordinates():
    ends = torch.tensor([[0, -(2**31)], [0, 2**31 - 1]])
    with pytest.warns(UserWarning, match="rounded down from torch.int64"):
        assert ME.SparseTensor(torch.ones(2, 1), ends).C.tolist() == ends.tolist()
    assert ME.utils.batched_coordinates([ends[:, 1:].double()]).tolist() == ends.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.uint8])
@pytest.mark.filterwarnings("ignore:coordinates are rounded down")
def test_coordinates_of_small_types(dtype):
    assert ME.SparseTensor(FEATS, COORDS.to(dtype)).C.tolist() == COORDS.tolist()


def test_a_missing_batch_index_is_named():
    advice = r"\. Coordinates are \[N, 1 \+ D\], batch index first: utils\.batched_coordinates"
    x = ME.SparseTensor(FEATS, COORDS[:, 1:])
    with pytest.raises(RuntimeError, match=rf"dimension=3; got a tensor with D=2{advice}"):
        ME.MinkowskiConvolution(4, 4, 3, dimension=3)(x)
    with pytest.raises(RuntimeError, match=rf"with D=3; got D=2{advice}"):
        ME.MinkowskiMaxPooling(2, 2, dimension=3)(x)
    with pytest.raises(RuntimeError, match=rf"must not be negative; got -1{advice}"):
        ME.SparseTensor(FEATS, COORDS - 1)
    with pytest.raises(RuntimeError, match=r"with D=3; got Tensor\.\nMore: "):
        ME.MinkowskiMaxPooling(2, 2, dimension=3)(FEATS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ME.SparseTensor(FEATS, COORDS, [1, 1]), r"an int or 3 of them.*; got \[1, 1\]\."),
        (lambda: ME.SparseTensor(FEATS, COORDS, tensor().coordinate_map_key), "or 3 of them.*key:"),
        (lambda: ME.SparseTensor(FEATS, COORDS, -1), r"not be negative; got \[-1, -1, -1\]\."),
        (lambda: ME.KernelGenerator(2.5, dimension=2), r"an int or 2 of them.*; got 2\.5\."),
        (lambda: ME.KernelGenerator("3", dimension=2), "an int or 2 of them.*; got '3'"),
        (lambda: ME.KernelGenerator([[3, 1]] * 2, dimension=2), "an int or 2 of them"),
        (lambda: ME.utils.sparse_quantize(COORDS, quantization_size=0), r"positive; got \[0\.0\]"),
        (lambda: ME.utils.sparse_quantize(COORDS, quantization_size=[1, 1, 1, -1]), "be positive"),
        (lambda: tensor().slice(FEATS), "slice takes the TensorField.*; got Tensor"),
        (lambda: tensor().interpolate(FEATS), "For points in a torch tensor, use features_at_coor"),
        (lambda: tensor().interpolate(tensor()), "takes a TensorField; got SparseTensor"),
    ],
)
def test_arguments_of_the_wrong_kind(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "layer",
    [
        ME.MinkowskiReLU(),
        ME.MinkowskiDropout(),
        ME.MinkowskiBatchNorm(4),
        ME.MinkowskiLinear(4, 4),
        ME.MinkowskiSinusoidal(4, 4),
        ME.MinkowskiGlobalPooling(),
        ME.MinkowskiFunctional.relu,
        lambda feats: ME.MinkowskiFunctional.mse_loss(feats, feats),
    ],
)
def test_layers_take_no_plain_tensors(layer):
    with pytest.raises(ValueError, match="takes a SparseTensor or TensorField; got Tensor"):
        layer(FEATS)


def test_a_broadcast_needs_a_row_for_each_sample():
    one = ME.MinkowskiGlobalPooling()(ME.SparseTensor(FEATS[:2], COORDS[:2]))
    for layer in (ME.MinkowskiBroadcast(), ME.MinkowskiBroadcastAddition()):
        with pytest.raises(ValueError, match=r"for each of 2 samples; got 1 of the samples"):
            layer(tensor(), one)


def test_managers_take_keys_not_tensors():
    x = tensor()
    for call in (x.coordinate_manager.get_coordinates, lambda x: x.coordinate_manager.stride(x, 2)):
        with pytest.raises(ValueError, match=r"got a SparseTensor\. Pass its coordinate_map_key"):
            call(x)
    with pytest.raises(ValueError, match=r"must be at least 1; got \[0, 0, 0\]"):
        field().sparse(0)


def test_a_column_that_is_no_batch_index_exhausts_no_memory():
    coords = COORDS.clone()
    coords[2, 0] = 2**31 - 1
    x, points = ME.SparseTensor(FEATS, coords), ME.TensorField(FEATS, coords.double())
    message = r"less than 16777216 .*; got 2147483647\. Coordinates are .* batch index first"
    for call in (
        lambda: x.decomposed_features,
        lambda: points.decomposed_features,
        lambda: ME.MinkowskiGlobalPooling()(x),
        lambda: ME.MinkowskiGlobalPooling()(points),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_slices_need_points_that_know_their_rows():
    x = ME.MinkowskiReLU()(tensor())
    with pytest.raises(ValueError, match=r"the output of a layer\. Pass the network's input"):
        x.slice(x)


@pytest.mark.parametrize("size", [3.0, np.float32(3), np.int64(3), torch.tensor(3)])
def test_whole_numbers_are_ints(size):
    generator = ME.KernelGenerator(size, dimension=2)
    assert generator.kernel_size == [3, 3]
    assert ME.KernelGenerator([size, 1], dimension=2).kernel_size == [3, 1]
