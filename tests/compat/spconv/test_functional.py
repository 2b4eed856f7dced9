"""Convolution and pooling along raw pair lists and pair tables."""

import gc
import weakref

import numpy as np
import pytest
import torch

import compat.spconv.pytorch as spconv
from compat.cumm.gemm.layout import to_stride
from compat.spconv.core import Activation
from compat.spconv.pytorch import _pairs, functional, ops
from tritonspconv.testing import assert_close

NATIVE = spconv.ConvAlgo.Native
STRIDED = {"ksize": [3, 2, 3], "stride": [2, 2, 1], "padding": [1, 0, 1]}
SUBM = {"ksize": [3, 3, 3], "stride": [1, 1, 1], "padding": [0, 0, 0], "subm": True}


def arguments(x, window):
    tail = {"dilation": [1, 1, 1], "out_padding": [0, 0, 0], "algo": NATIVE}
    return (x.indices, x.batch_size, x.spatial_shape), window | tail


def pairs_of(x, window):
    args, options = arguments(x, window)
    return ops.get_indice_pairs(*args, **options)


def tables_of(x, window):
    args, options = arguments(x, window)
    return ops.get_indice_pairs_implicit_gemm(*args, **options)


def foreign(*tensors):
    """Return copies of the tensors, for which the adapter has to build new maps."""
    return [tensor.clone() for tensor in tensors]


def halved(pairs, counts):
    """Return a submanifold list as spconv writes it: counts of taps from the centre on are zero."""
    pairs, counts = foreign(pairs, counts)
    counts[counts.shape[0] // 2 :] = 0
    return pairs, counts


def with_gradients(function, *leaves):
    out = function()
    grad = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def assert_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)


@pytest.fixture
def layer(device):
    def make_layer(kind, **options):
        return getattr(spconv, kind)(4, 6, **options, algo=NATIVE).double().to(device)

    return make_layer


def strided_layer(layer, **options):
    return layer("SparseConv3d", kernel_size=[3, 2, 3], stride=[2, 2, 1], padding=[1, 0, 1])


@pytest.mark.parametrize("prepare", [lambda *t: t, foreign], ids=["ours", "foreign"])
def test_indice_conv_is_the_layer(prepare, make, layer):
    x, conv = make(dtype=torch.float64), strided_layer(layer)
    out_indices, *pairs = pairs_of(x, STRIDED)
    leaves = x.features, conv.weight, conv.bias
    got = with_gradients(
        lambda: functional.indice_conv(
            x.features, conv.weight, *prepare(*pairs), len(out_indices), NATIVE, bias=conv.bias
        ),
        *leaves,
    )
    out = conv(x)
    assert torch.equal(out.indices, out_indices)
    assert_same(got, with_gradients(lambda: conv(x).features, *leaves))
    raw = ops.indice_conv_backward(
        x.features, conv.weight, torch.ones_like(out.features), *prepare(*pairs)
    )
    assert_same(raw, torch.autograd.grad(out.features.sum(), leaves[:2]))


@pytest.mark.parametrize("prepare", [lambda *t: t, foreign, halved], ids=["ours", "all", "half"])
def test_indice_subm_conv_is_the_layer(prepare, make, layer):
    x, conv = make(dtype=torch.float64), layer("SubMConv3d", kernel_size=3, bias=False)
    out_indices, *pairs = pairs_of(x, SUBM)
    assert out_indices is x.indices
    leaves = x.features, conv.weight
    got = with_gradients(
        lambda: functional.indice_subm_conv(*leaves, *prepare(*pairs), len(x.indices), NATIVE),
        *leaves,
    )
    assert_same(got, with_gradients(lambda: conv(x).features, *leaves))


@pytest.mark.parametrize("prepare", [lambda *t: t, foreign], ids=["ours", "foreign"])
def test_indice_inverse_conv_returns_to_the_inputs(prepare, make, device):
    x = make(dtype=torch.float64)
    out_indices, *pairs = pairs_of(x, STRIDED)
    feats = torch.randn(len(out_indices), 6, dtype=torch.float64, device=device).requires_grad_()
    down = spconv.SparseConv3d(4, 6, [3, 2, 3], [2, 2, 1], [1, 0, 1], indice_key="k", algo=NATIVE)
    up = spconv.SparseInverseConv3d(6, 5, [3, 2, 3], "k", bias=False, algo=NATIVE)
    middle = down.double().to(device)(x).replace_feature(feats)
    up = up.double().to(device)
    leaves = feats, up.weight
    got = with_gradients(
        lambda: functional.indice_inverse_conv(*leaves, *prepare(*pairs), len(x.indices), NATIVE),
        *leaves,
    )
    assert_same(got, with_gradients(lambda: up(middle).features, *leaves))
    ones = torch.ones(len(x.indices), 5, dtype=torch.float64, device=device)
    raw = ops.indice_conv_backward(feats, up.weight, ones, *prepare(*pairs), inverse=True)
    assert_same(raw, torch.autograd.grad(up(middle).features.sum(), leaves))


@pytest.mark.parametrize("prepare", [lambda *t: t, foreign], ids=["ours", "foreign"])
def test_implicit_gemm_is_the_layer_in_both_directions(prepare, make, layer):
    x, conv = make(dtype=torch.float64), strided_layer(layer)
    out_indices, counts, *tables = tables_of(x, STRIDED)
    forward, backward = prepare(*tables[:2])
    assert torch.equal(counts, pairs_of(x, STRIDED)[2])
    leaves = x.features, conv.weight, conv.bias
    options = ([], [], [], [], len(out_indices), [], True, False)
    got = with_gradients(
        lambda: functional.implicit_gemm(
            *leaves[:2], forward, backward, *options, bias=conv.bias, act_type=Activation.ReLU
        ),
        *leaves,
    )
    assert_same(got, with_gradients(lambda: conv(x).features.relu(), *leaves))
    ones = torch.ones_like(conv(x).features)
    raw = ops.implicit_gemm_backward(
        *leaves[:2], ones, forward, backward, [], [], [], [], None, [], -1, False
    )
    assert_same(raw, torch.autograd.grad(conv(x).features.sum(), leaves[:2]))
    back = functional.implicit_gemm(
        ones, conv.weight.new_ones(2, 3, 2, 3, 6), backward, forward, [], [], [], [],
        len(x.indices), [], True, False,
    )  # fmt: skip
    pairs = pairs_of(x, STRIDED)[1:]
    assert_close(
        back,
        functional.indice_inverse_conv(
            ones, conv.weight.new_ones(2, 3, 2, 3, 6), *pairs, len(x.indices), NATIVE
        ),
    )


@pytest.mark.parametrize("prepare", [lambda *t: t, foreign], ids=["ours", "foreign"])
def test_pools_are_the_layers(prepare, make):
    x = make(dtype=torch.float64)
    out_indices, *pairs = pairs_of(x, STRIDED)
    forward, backward = prepare(*tables_of(x, STRIDED)[2:4])
    n = len(out_indices)
    args = ([3, 2, 3], [2, 2, 1], [1, 0, 1])
    largest = with_gradients(lambda: spconv.SparseMaxPool3d(*args)(x).features, x.features)
    for function in (
        lambda: functional.indice_maxpool(x.features, *prepare(*pairs), n),
        lambda: functional.indice_maxpool_implicit_gemm(x.features, forward, backward, n),
    ):
        assert_same(with_gradients(function, x.features), largest)
    mean = with_gradients(lambda: spconv.SparseAvgPool3d(*args)(x).features, x.features)
    got = with_gradients(
        lambda: functional.indice_avgpool_implicit_gemm(x.features, forward, backward, n, True),
        x.features,
    )
    assert_same(got, mean)
    ones = torch.ones_like(largest[0])
    expected = torch.autograd.grad(spconv.SparseMaxPool3d(*args)(x).features.sum(), x.features)[0]
    out = largest[0]
    for grad in (
        ops.indice_maxpool_backward(x.features, out, ones, *prepare(*pairs)),
        ops.indice_maxpool_implicit_gemm_backward(x.features, out, ones, backward),
    ):
        assert_close(grad, expected)
    expected = torch.autograd.grad(spconv.SparseAvgPool3d(*args)(x).features.sum(), x.features)[0]
    _, count = ops.indice_avgpool_implicit_gemm(x.features, forward, n, True)
    assert_close(ops.indice_avgpool_implicit_gemm_backward(ones, backward, count), expected)
    assert ops.indice_avgpool_implicit_gemm(x.features, forward, n, False)[1].numel() == 0


def test_pair_tensors_remember_their_map_until_they_change(make, device):
    x = make()
    _, pairs, counts = pairs_of(x, STRIDED)
    n = int(pairs[1].max()) + 1
    found = _pairs.map_of_pairs(pairs, counts, len(x.indices), n)
    assert _pairs.map_of_pairs(pairs, counts, len(x.indices), n) is found
    weight = torch.ones(1, 3, 2, 3, 4, device=device)
    counts.zero_()
    assert not functional.indice_conv(x.features, weight, pairs, counts, n, NATIVE).any()
    alive = weakref.ref(found)
    del found, pairs, counts
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("written", ["pairs", "counts", "table"])
def test_writes_without_a_trace_to_pairs_are_seen_on_a_cpu(written):
    """NumPy does not change the version of a tensor."""
    indices = torch.tensor([[0, n] for n in range(4)], dtype=torch.int32)
    window = [[4], NATIVE, [3], [1], [1], [1], [0]]
    feats, weight = torch.arange(1.0, 5.0)[:, None], torch.ones(1, 3, 1)
    if written == "table":
        _, _, table, *_ = ops.get_indice_pairs_implicit_gemm(indices, 1, *window, subm=True)

        def run():
            none = ([], [], [], [])
            return functional.implicit_gemm(
                feats, weight, table, table, *none, 4, [], False, True
            ).flatten()

        assert run().tolist() == [3, 6, 9, 7]
        table.numpy()[0] = -1  # The tap of the left neighbour.
        assert run().tolist() == [3, 5, 7, 4]
        return
    _, pairs, counts = ops.get_indice_pairs(indices, 1, *window, subm=True)

    def run():
        return functional.indice_conv(feats, weight, pairs, counts, 4, NATIVE).flatten()

    assert run().tolist() == [3, 6, 9, 7]
    if written == "counts":
        counts.numpy()[0] = 0
        assert run().tolist() == [3, 5, 7, 4]
    else:
        pairs.numpy()[0, 1] = [3, 2, 1, 0]  # The central tap reads the rows backwards.
        pairs.numpy()[1, 1] = [0, 1, 2, 3]
        assert run().tolist() == [2 + 4, 4 + 3, 6 + 2, 3 + 1]


def test_pairs_of_inference_mode_are_read_each_time(make):
    x = make()
    weight = torch.ones(1, 3, 2, 3, 4, device=x.features.device)
    with torch.inference_mode():
        out_indices, pairs, counts = pairs_of(x, STRIDED)
        first = functional.indice_conv(x.features, weight, pairs, counts, len(out_indices), NATIVE)
        counts.zero_()
        second = functional.indice_conv(x.features, weight, pairs, counts, len(out_indices), NATIVE)
    assert first.any()
    assert not second.any()


def test_empty_pairs_give_the_bias(make, device):
    x = make(n=0)
    weight, bias = torch.ones(5, 3, 2, 3, 4, device=device), torch.arange(5.0, device=device)
    pairs = torch.full((2, 18, 0), -1, dtype=torch.int32, device=device)
    counts = torch.zeros(18, dtype=torch.int32, device=device)
    out = functional.indice_conv(x.features, weight, pairs, counts, 2, NATIVE, bias=bias)
    assert out.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize(
    ("kind", "slope", "expected"),
    [
        (Activation.None_, 0.0, [-2.0, 3.0]),
        (Activation.ReLU, 0.0, [0.0, 3.0]),
        (Activation.LeakyReLU, 0.5, [-1.0, 3.0]),
        (Activation.Sigmoid, 0.0, [0.1192, 0.9526]),
    ],
)
def test_activation_of_the_output(kind, slope, expected):
    pairs = torch.tensor([[[0, 1]], [[0, 1]]], dtype=torch.int32)
    out = functional.indice_conv(
        torch.tensor([[-2.0], [3.0]]), torch.ones(1, 1, 1), pairs, torch.tensor([2]), 2, NATIVE,
        act_alpha=slope, act_type=kind,
    )  # fmt: skip
    torch.testing.assert_close(out[:, 0], torch.tensor(expected), atol=1e-4, rtol=0)


def test_pairs_that_do_not_fit_are_named(make):
    x = make()
    weight = torch.ones(1, 3, 2, 3, 4, device=x.features.device)
    out_indices, pairs, counts = pairs_of(x, STRIDED)
    n, rows = len(out_indices), len(x.indices)
    with pytest.raises(ValueError, match=r"indice_pairs must be \[2, V, N\]"):
        ops.indice_conv(x.features, weight, pairs[0], counts, n)
    with pytest.raises(ValueError, match=r"filters must be .* with 18 taps"):
        ops.indice_conv(x.features, weight[:, :2], pairs, counts, n)
    with pytest.raises(ValueError, match=r"submanifold pairs must be .* odd V"):
        ops.indice_conv(x.features, weight, *foreign(pairs, counts), rows, subm=True)
    with pytest.raises(ValueError, match="lie outside"):
        ops.indice_conv(x.features, weight, pairs, counts, n - 1)
    with pytest.raises(ValueError, match=rf"a pair table must be \[V, {n}\]"):
        ops.indice_maxpool_implicit_gemm(x.features, pairs[0], n)
    table = tables_of(x, STRIDED)[2]
    with pytest.raises(NotImplementedError, match="int8 layers"):
        ops.implicit_gemm(x.features, weight, table, [], [], n, [], True, False, output_scale=2.0)
    half = ops.implicit_gemm(
        x.features, weight, table, [], [], n, [], True, False, output_dtype=torch.float16
    )
    assert half[0].dtype == torch.float16
    assert half[1:] == (None, -1)


def test_sparse_add_hash_based_is_sparse_add(make):
    a, b = make(seed=0), make(seed=1)
    assert_close(
        functional.sparse_add_hash_based(a, b).features, functional.sparse_add(a, b).features
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_cells_are_numbered_as_numpy_numbers_them(make, dtype):
    x = make()
    shape = [x.batch_size, *x.spatial_shape]
    found = functional._indice_to_scalar(x.indices.to(dtype), shape)
    assert found.dtype is dtype
    expected = np.ravel_multi_index(tuple(x.indices.cpu().numpy().T), shape)
    assert found.tolist() == expected.tolist()
    assert to_stride(np.array(shape)).tolist() == [210, 35, 7, 1]
    assert to_stride(np.array([4])).tolist() == [1]
    with pytest.raises(AssertionError, match="must have 4 extents"):
        functional._indice_to_scalar(x.indices, shape[1:])
