"""Convolutions against dense torch: the spconv rules about sites, sizes, order and weights."""

import pytest
import torch
from torch import nn

import compat.spconv.pytorch as spconv
from compat.spconv.core import Activation
from compat.spconv.pytorch import SparseConvTensor
from tritonspconv.geometry import IntTuple

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def at_sites(dense: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the rows of a dense [B, C, *spatial] at ``indices``."""
    batch, *spatial = indices.long().unbind(1)
    return dense.movedim(1, -1)[(batch, *spatial)]


def dense_weight(layer: spconv.conv.SparseConvolution) -> torch.Tensor:
    return layer.weight.movedim(-1, 1)


def ascending(x: SparseConvTensor) -> bool:
    keys = x.indices.long()[:, 0]
    for axis, extent in enumerate(x.spatial_shape, start=1):
        keys = keys * extent + x.indices[:, axis]
    return bool((keys.diff() > 0).all())


DENSE = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}
DENSE_TRANSPOSED = {
    1: nn.functional.conv_transpose1d,
    2: nn.functional.conv_transpose2d,
    3: nn.functional.conv_transpose3d,
}
SHAPES: dict[int, IntTuple] = {1: (60,), 2: (9, 11), 3: (6, 5, 7), 4: (4, 3, 5, 4)}


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 1), (5, 1), (3, 2)])
def test_subm_is_centred_correlation_at_the_input_sites(make, device, ndim, kernel_size, dilation):
    x = make(shape=SHAPES[ndim])
    layer = getattr(spconv, f"SubMConv{ndim}d")(4, 6, kernel_size, dilation=dilation).to(device)
    y = layer(x)
    padding = dilation * (kernel_size // 2)
    dense = DENSE[ndim](x.dense(), dense_weight(layer), layer.bias, 1, padding, dilation)
    torch.testing.assert_close(y.features, at_sites(dense, x.indices), **TOLERANCE)


def test_subm_and_conv_in_four_dimensions_agree_with_the_pair_lists(make, device):
    x = make(shape=SHAPES[4])
    for layer in (spconv.SubMConv4d(4, 3, 3), spconv.SparseConv4d(4, 3, 2, 2)):
        layer = layer.to(device)
        y = layer(x)
        assert y.indices.shape[1] == 5
        _, pairs, counts = spconv.ops.get_indice_pairs(
            x.indices, 2, x.spatial_shape, spconv.ConvAlgo.Native, layer.kernel_size, layer.stride,
            layer.padding, layer.dilation, [0] * 4, subm=layer.subm,
        )  # fmt: skip
        weight = layer.weight.reshape(3, -1, 4)
        expected = layer.bias.repeat(y.features.shape[0], 1)
        for tap, count in enumerate(counts.tolist()):
            source, target = pairs[:, tap, :count].long()
            expected = expected.index_add(0, target, x.features[source] @ weight[:, tap].T)
        torch.testing.assert_close(y.features, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("ndim", "kernel_size", "stride", "padding", "dilation"),
    [
        (1, 3, 2, 1, 1),
        (2, 3, 2, 1, 1),
        (3, 3, 2, 1, 1),
        (3, 2, 2, 0, 1),
        (3, (3, 1, 1), (2, 1, 1), 0, 1),
        (3, 3, 1, 2, 2),
        (3, 2, 3, 1, 1),
        (3, 1, 2, 0, 1),
    ],
)
def test_conv_is_the_dense_convolution_at_every_reached_site(
    make, device, ndim, kernel_size, stride, padding, dilation
):
    x = make(shape=SHAPES[ndim])
    layer = getattr(spconv, f"SparseConv{ndim}d")(
        4, 6, kernel_size, stride, padding, dilation, bias=False
    ).to(device)
    y = layer(x)
    dense = DENSE[ndim](x.dense(), dense_weight(layer), None, stride, padding, dilation)
    assert tuple(y.spatial_shape) == tuple(dense.shape[2:])
    torch.testing.assert_close(y.dense(), dense, **TOLERANCE)
    active = x.replace_feature(torch.ones_like(x.features)).dense()
    reached = DENSE[ndim](
        active, torch.ones_like(dense_weight(layer)), None, stride, padding, dilation
    )
    assert y.indices.shape[0] == int((reached[:, 0] > 0).sum())
    assert ascending(y)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(("kernel_size", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_transposed_conv_is_the_dense_one_at_every_reached_site(
    make, device, ndim, kernel_size, stride, padding
):
    x = make(shape=SHAPES[ndim])
    layer = getattr(spconv, f"SparseConvTranspose{ndim}d")(
        4, 6, kernel_size, stride, padding, bias=False
    ).to(device)
    y = layer(x)
    weight = layer.weight.movedim(-1, 0)
    dense = DENSE_TRANSPOSED[ndim](x.dense(), weight, None, stride, padding)
    assert tuple(y.spatial_shape) == tuple(dense.shape[2:])
    torch.testing.assert_close(y.dense(), dense, **TOLERANCE)
    assert ascending(y)


def test_transposed_size_leaves_dilation_out(make, device):
    x = make()
    layer = spconv.SparseConvTranspose3d(4, 6, 3, 2, 1, 2, bias=False).to(device)
    y = layer(x)
    assert y.spatial_shape == [11, 9, 13]
    dense = nn.functional.conv_transpose3d(
        x.dense(), layer.weight.movedim(-1, 0), None, 2, 1, dilation=2
    )
    torch.testing.assert_close(y.dense(), dense[:, :, :11, :9, :13], **TOLERANCE)


def test_output_size_functions():
    size = spconv.ops.get_conv_output_size
    assert size([5, 5, 5], [3, 3, 2], [2, 1, 2], [1, 0, 0], [1, 2, 1]) == [3, 1, 2]
    assert size([5, 5], [-1, 3], [2, 2], [1, 1], [1, 1]) == [1, 3]
    assert size([1, 1], [3, 3], [2, 2], [0, 0], [1, 1]) == [0, 0]
    deconv = spconv.ops.get_deconv_output_size
    assert deconv([5], [3], [2], [1], [2], [1]) == [10]
    with pytest.raises(ValueError, match="at least 1"):
        deconv([5], [-1], [2], [1], [1], [0])


def test_subm_ignores_stride_and_padding(make, device):
    x = make()
    plain = spconv.SubMConv3d(4, 6, 3).to(device)
    odd = spconv.SubMConv3d(4, 6, 3, stride=2, padding=1).to(device)
    odd.load_state_dict(plain.state_dict())
    y = odd(x)
    assert y.spatial_shape == x.spatial_shape
    torch.testing.assert_close(y.features, plain(x).features)


def test_even_subm_raises_at_the_call(make, device):
    layer = spconv.SubMConv3d(4, 4, 2).to(device)
    with pytest.raises(RuntimeError, match="odd kernel sizes"):
        layer(make())


def test_subm_and_pointwise_return_the_same_indices_object(make, device):
    x = make()
    assert spconv.SubMConv3d(4, 4, 3).to(device)(x).indices is x.indices
    assert spconv.SubMConv3d(4, 4, 1).to(device)(x).indices is x.indices
    assert spconv.SparseConv3d(4, 4, 1).to(device)(x).indices is x.indices


def test_strided_rows_ascend_by_batch_and_coordinates(make, device):
    y = spconv.SparseConv3d(4, 4, 3, 2, 1).to(device)(make(n=90))
    assert ascending(y)


def test_batch_indices_out_of_range_are_dropped(make, device):
    x = make()
    x.batch_size = 1
    kept = x.indices[:, 0] < 1
    layer = spconv.SparseConv3d(4, 4, 3, 2, 1).to(device)
    y = layer(x)
    only = SparseConvTensor(x.features[kept], x.indices[kept], x.spatial_shape, 1)
    torch.testing.assert_close(y.features, layer(only).features)
    assert torch.equal(y.indices, layer(only).indices)


def test_points_vanished_raises_value_error(device):
    indices = torch.tensor([[0, 7, 7, 7]], dtype=torch.int32, device=device)
    x = SparseConvTensor(torch.ones(1, 4, device=device), indices, [9, 9, 9], 1)
    with pytest.raises(ValueError, match="points vanished"):
        spconv.SparseConv3d(4, 4, 2, stride=8).to(device)(x)


@pytest.mark.parametrize(
    "layer", [spconv.SubMConv2d(4, 4, 3), spconv.SparseConv4d(4, 4, 3), spconv.SparseMaxPool2d(2)]
)
def test_layers_of_another_dimension_raise(make, device, layer):
    with pytest.raises(ValueError, match=r"spatial axes; got.*\[6, 5, 7\]. Use the 3d layer"):
        layer.to(device)(make())


@pytest.mark.parametrize("kernel_size", [7, (3, 9, 3)])
def test_extent_below_one_raises(make, device, kernel_size):
    with pytest.raises(ValueError, match="at least 1"):
        spconv.SparseConv3d(4, 4, kernel_size).to(device)(make())


@pytest.mark.parametrize(
    ("pair", "kernel_size"),
    [
        (lambda: spconv.SparseConv3d(4, 4, 3, 2, 1, indice_key="k"), 3),
        (lambda: spconv.SparseConvTranspose3d(4, 4, 3, 2, 1, indice_key="k"), 3),
        (lambda: spconv.SparseMaxPool3d(2, indice_key="k"), 2),
    ],
    ids=["conv", "transposed", "pool"],
)
def test_inverse_relabels_the_pairs_of_the_recorded_layer(make, device, pair, kernel_size):
    x = make()
    middle = pair().to(device)(x)
    inverse = spconv.SparseInverseConv3d(4, 5, kernel_size, indice_key="k").to(device)
    y = inverse(middle)
    assert y.indices is x.indices
    assert y.spatial_shape == x.spatial_shape
    record = middle.indice_dict["k"]
    weight = inverse.weight.reshape(5, -1, 4)
    expected = inverse.bias.repeat(x.features.shape[0], 1)
    for tap, count in enumerate(record.indice_pair_num.tolist()):
        fine, coarse = record.indice_pairs[:, tap, :count].long()
        expected = expected.index_add(0, fine, middle.features[coarse] @ weight[:, tap].T)
    torch.testing.assert_close(y.features, expected, **TOLERANCE)


@pytest.mark.parametrize("kind", [spconv.SubMConv3d, spconv.SparseConv3d])
@pytest.mark.parametrize("out_channels", [4, 7])
def test_1x1_reads_the_weight_memory_as_in_out(make, device, kind, out_channels):
    x = make()
    layer = kind(4, out_channels, 1).to(device)
    y = layer(x)
    expected = x.features @ layer.weight.view(4, out_channels) + layer.bias
    torch.testing.assert_close(y.features, expected)


def test_1x1_subm_takes_padding_and_conv_does_not(make, device):
    assert spconv.SubMConv3d(4, 7, 1, padding=1, stride=2).to(device)(make()).features.shape[1] == 7
    with pytest.raises(AssertionError, match="no padding"):
        spconv.SparseConv3d(4, 7, 1, padding=1)


def test_1x1_neither_reads_nor_writes_its_key(make, device):
    x = spconv.SubMConv3d(4, 4, 3, indice_key="k").to(device)(make())
    y = spconv.SubMConv3d(4, 4, 1, indice_key="k").to(device)(x)
    assert y.indice_dict is x.indice_dict
    y = spconv.SparseConv3d(4, 4, 1, indice_key="other").to(device)(x)
    assert list(y.indice_dict) == ["k"]


def test_inverse_of_a_strided_1x1_returns_to_the_fine_sites(make, device):
    x = make()
    coarse = spconv.SparseConv3d(4, 4, 1, 2, indice_key="k").to(device)(x)
    y = spconv.SparseInverseConv3d(4, 4, 1, indice_key="k").to(device)(coarse)
    assert y.indices is x.indices


@pytest.mark.parametrize("training", [True, False])
def test_bias_and_gradients_are_the_same_in_train_and_eval(make, device, training):
    x = make()
    layer = spconv.SubMConv3d(4, 6, 3).to(device).train(training)
    y = layer(x)
    dense = nn.functional.conv3d(x.dense(), dense_weight(layer), layer.bias, 1, 1)
    expected = at_sites(dense, x.indices)
    torch.testing.assert_close(y.features, expected, **TOLERANCE)
    grad = torch.randn_like(expected)
    ours = torch.autograd.grad(y.features, [x.features, layer.weight, layer.bias], grad)
    theirs = torch.autograd.grad(expected, [x.features, layer.weight, layer.bias], grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def test_eval_layers_share_a_key_with_training_layers(make, device):
    x = make()
    first = spconv.SubMConv3d(4, 4, 3, indice_key="k").to(device).eval()
    second = spconv.SubMConv3d(4, 4, 3, indice_key="k").to(device)
    second(first(x)).features.sum().backward()
    assert first.weight.grad is not None
    assert x.features.grad is not None


@pytest.mark.parametrize("algo", [None, *spconv.ConvAlgo])
def test_every_algo_gives_the_same_result(make, device, algo):
    x = make()
    plain = spconv.SubMConv3d(4, 6, 3).to(device)
    layer = spconv.SubMConv3d(4, 6, 3, algo=algo).to(device)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer(x).features, plain(x).features)


@pytest.mark.parametrize(
    "layer",
    [
        spconv.SubMConv3d(4, 6, 3, indice_key="a"),
        spconv.SubMConv3d(4, 6, 1),
        spconv.SparseConv3d(4, 6, 3, 2, 1, indice_key="b"),
        spconv.SparseConvTranspose3d(4, 6, 3, 2, 1),
        spconv.SparseMaxPool3d(2),
        spconv.SparseAvgPool3d(2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_empty_input_gives_an_empty_output_with_gradients(make, device, layer):
    x = make(n=0)
    layer = layer.to(device)
    y = layer(x)
    assert y.features.shape[0] == 0
    assert y.indices.shape == (0, 4)
    y.features.sum().backward()
    assert x.features.grad is not None
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_empty_input_comes_back_through_an_inverse(make, device):
    x = make(n=0)
    down = spconv.SparseConv3d(4, 6, 3, 2, 1, indice_key="k").to(device)
    up = spconv.SparseInverseConv3d(6, 4, 3, indice_key="k").to(device)
    assert up(down(x)).indices is x.indices


def test_rows_outside_the_grid_take_no_part(device):
    indices = torch.tensor([[0, 1, 1], [0, -1, 1], [0, 1, 4]], dtype=torch.int32, device=device)
    features = torch.tensor([[1.0], [100.0], [10000.0]], device=device)
    x = SparseConvTensor(features, indices, [4, 4], 1)
    inside = SparseConvTensor(features[:1], indices[:1], [4, 4], 1)
    layer = spconv.SparseConv2d(1, 1, 3, 2, 1, bias=False).to(device)
    assert torch.equal(layer(x).features, layer(inside).features)
    layer = spconv.SubMConv2d(1, 1, 3, bias=False).to(device)
    expected = features * layer.weight[0, 1, 1, 0]
    torch.testing.assert_close(layer(x).features, expected)


def test_grids_beyond_int32_cells_work(device):
    shape = [2000, 2000, 2000]
    indices = torch.tensor(
        [[1, 1999, 1999, 1998], [1, 1999, 1999, 1999], [0, 0, 0, 0]], dtype=torch.int32
    ).to(device)
    x = SparseConvTensor(torch.ones(3, 1, device=device), indices, shape, 2)
    layer = spconv.SubMConv3d(1, 1, 3, bias=False).to(device)
    weight = layer.weight[0, ..., 0]
    expected = torch.stack([weight[1, 1, 1] + weight[1, 1, 2], weight[1, 1, 1] + weight[1, 1, 0]])
    torch.testing.assert_close(layer(x).features[:2, 0], expected)
    y = spconv.SparseConv3d(1, 1, 2, 2).to(device)(x)
    assert y.indices.tolist() == [[0, 0, 0, 0], [1, 999, 999, 999]]


def test_initial_weights_follow_fan_in_of_the_whole_window():
    torch.manual_seed(0)
    layer = spconv.SubMConv3d(3, 5, 3)
    torch.manual_seed(0)
    bound = 81**-0.5
    assert torch.equal(layer.weight, torch.empty(5, 3, 3, 3, 3).uniform_(-bound, bound))
    assert torch.equal(layer.bias, torch.empty(5).uniform_(-bound, bound))


def test_add_input_and_activation(make, device):
    x = make()
    layer = spconv.conv.SparseConvolution(3, 4, 4, 3, subm=True, act_type=Activation.ReLU).to(
        device
    )
    plain = spconv.SubMConv3d(4, 4, 3).to(device)
    plain.load_state_dict(layer.state_dict())
    expected = (plain(x).features + x.features).relu()
    torch.testing.assert_close(layer(x, add_input=x).features, expected)


def test_wrong_channels_groups_and_input_types_raise(make, device):
    with pytest.raises(AssertionError, match="channel size mismatch"):
        spconv.SubMConv3d(5, 4, 3).to(device)(make())
    with pytest.raises(AssertionError, match="groups must be 1"):
        spconv.SubMConv3d(4, 4, 3, groups=2)
    with pytest.raises(TypeError, match="takes a SparseConvTensor"):
        spconv.SubMConv3d(4, 4, 3)(torch.ones(2, 4))
    with pytest.raises(AssertionError, match="3 of them"):
        spconv.SubMConv3d(4, 4, [3, 3])


def test_record_voxel_count_keeps_the_largest_output(make, device):
    """The buffer counts in training and in evaluation; ``tests/parity`` compares with spconv."""
    layer = spconv.SparseConv3d(4, 4, 3, 2, 1, record_voxel_count=True).to(device)
    assert layer.get_max_num_voxels().tolist() == [0]
    rows = [layer(make(n=n)).features.shape[0] for n in (40, 10)]
    assert layer.max_num_voxels_during_training.tolist() == [max(rows)]
    more = layer.eval()(make(n=90)).features.shape[0]
    assert layer.max_num_voxels_during_training.tolist() == [more]
    assert spconv.SparseConv3d(4, 4, 3).get_max_num_voxels() is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stride": 0}, "stride must be at least 1"),
        ({"dilation": 0}, "dilation must be at least 1"),
        ({"kernel_size": 0}, "kernel_size must be at least 1"),
        ({"stride": 1.5}, r"stride must be a whole number, or 3 of them, .*; got 1\.5"),
        ({"padding": [1, 0.5, 0]}, r"padding must be .*; got \[1, 0\.5, 0\]"),
        ({"kernel_size": "3"}, "kernel_size must be .*; got '3'"),
        ({"dilation": object}, "dilation must be .* one per axis"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["SparseConv3d", "SparseConvTranspose3d", "SparseMaxPool3d"])
def test_windows_that_cannot_be_raise_spconvs_exceptions(make, device, kind, options, text):
    """The original divides by zero, or reads one cell for every tap."""
    channels = () if "Pool" in kind else (4, 4)
    for exception in (AssertionError, ValueError, RuntimeError):
        with pytest.raises(exception, match=text):
            getattr(spconv, kind)(*channels, **{"kernel_size": 3, **options}).to(device)(make())


@pytest.mark.parametrize("dilation", [0, -1])
def test_submanifold_windows_that_cannot_be(make, device, dilation):
    with pytest.raises(AssertionError, match="dilation must be at least 1"):
        spconv.SubMConv3d(4, 4, 3, dilation=dilation).to(device)(make())
