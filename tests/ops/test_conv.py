"""Sparse convolution against brute force, dense layers and its own adjoint."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests._back_end import every_back_end
from tests._oracle import map_triples
from tests._strategies import KINDS as WINDOWS
from tests._strategies import Share, a_few, problems, site_sets
from tritonspconv import reference
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import KernelMap, kernel_map
from tritonspconv.ops import ChannelNorm, TrainingNorm, sparse_conv
from tritonspconv.testing import assert_close, block_sites, random_sites, surface_sites

every_window = pytest.mark.parametrize("window", WINDOWS)

SUBM3 = ConvGeometry.submanifold((3, 3, 3), (1, 1, 1))
SUBM_EVEN = ConvGeometry.submanifold((2, 4, 3), (1, 1, 2))
DOWN2 = ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))
CELLS2 = ConvGeometry(
    (2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1), sites="cells", tap_order="first_axis_fastest"
)
UP2 = ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1), transposed=True)
POINTWISE = ConvGeometry.submanifold((1, 1, 1), (1, 1, 1))
KINDS = {
    "subm": SUBM3,
    "subm-even": SUBM_EVEN,
    "strided": DOWN2,
    "cells": CELLS2,
    "transposed": UP2,
    "pointwise": POINTWISE,
}
every_kind = pytest.mark.parametrize("geometry", KINDS.values(), ids=KINDS)

LOW = [torch.float16, torch.bfloat16]
DTYPES = [torch.float64, torch.float32, *LOW]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def operands(
    kmap: KernelMap, c_in: int, c_out: int, dtype=torch.float64, bias: bool = True
) -> list[Tensor | None]:
    """Return leaves that require gradients: feats, weight, bias."""
    device = kmap.out_sites.device
    shapes = [(kmap.n_in, c_in), (kmap.kernel_volume, c_in, c_out), (c_out,)]
    made = [torch.randn(s).to(device, dtype).requires_grad_() for s in shapes]
    return made if bias else [*made[:2], None]


def run(conv, leaves: list[Tensor | None], grad: Tensor, **how) -> list[Tensor | None]:
    """Return output and gradients of ``conv(feats, weight, bias)``."""
    out = conv(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [out, *torch.autograd.grad(out, wanted, grad.to(out.dtype), **how)]


def check(kmap: KernelMap, leaves: list[Tensor | None], dtype: torch.dtype | None = None, **how):
    """Check output and every gradient against the reference, within the tolerance of ``dtype``."""
    dtype = dtype or leaves[0].dtype
    triples = map_triples(kmap)

    def oracle(feats, weight, bias):
        return reference.conv(feats, weight, triples, kmap.n_out, bias)

    def copies(of_dtype):
        return [x if x is None else x.detach().cpu().to(of_dtype).requires_grad_() for x in leaves]

    grad = torch.randn(kmap.n_out, leaves[1].shape[2]).to(dtype)
    # Without triples the reference does not use its inputs, so their gradients are zeros.
    truth = run(oracle, copies(torch.float64), grad, materialize_grads=True)
    eager = run(oracle, copies(dtype), grad, materialize_grads=True)
    ours = run(
        lambda *x: sparse_conv(x[0], x[1], kmap, x[2], **how), leaves, grad.to(leaves[0].device)
    )
    for name, a, t, e in zip(
        ("out", "dfeats", "dweight", "dbias")[: len(ours)], ours, truth, eager, strict=True
    ):
        assert_close(a, t, dtype, eager=e, name=name)
    assert ours[0].dtype == dtype
    for leaf, leaf_grad in zip([x for x in leaves if x is not None], ours[1:], strict=True):
        assert leaf_grad.dtype == leaf.dtype
    return ours


@every_back_end
@every_window
def test_any_map(device, window):
    share = Share()

    @a_few(20)
    @given(data=st.data())
    def is_brute_force(data):
        kmap = kernel_map(*data.draw(problems((window,), device)))
        share.note(map_triples(kmap), kmap.in_sites is kmap.out_sites)
        if data.draw(st.booleans()):
            kmap = kmap.inverse()
        channels = st.integers(1, 5)
        with_bias = data.draw(st.booleans())
        check(kmap, operands(kmap, data.draw(channels), data.draw(channels), bias=with_bias))

    is_brute_force()
    share.check()


@every_window
def test_any_map_is_adjoint(device, window):
    """``<A x, y> == <x, A' y>``: the gradient in the features is the exact transpose."""
    share = Share()

    @a_few(20)
    @given(data=st.data())
    def is_adjoint(data):
        sites, geometry = data.draw(problems((window,), device))
        out_sites = None
        if geometry.sites != "same" and data.draw(st.integers(0, 3)) == 0:
            out_sites = data.draw(site_sets(geometry.ndim, device=device))
        kmap = kernel_map(sites, geometry, out_sites=out_sites)
        share.note(map_triples(kmap), kmap.in_sites is kmap.out_sites)
        x, weight, _ = operands(kmap, 3, 2)
        y = torch.randn(kmap.n_out, 2, dtype=torch.float64, device=device)
        out = sparse_conv(x, weight, kmap)
        (adjoint,) = torch.autograd.grad(out, x, y)
        torch.testing.assert_close((out * y).sum(), (x * adjoint).sum())
        # The inverse map with transposed matrices is the adjoint as well.
        back = sparse_conv(y, weight.transpose(1, 2), kmap.inverse())
        torch.testing.assert_close(back, adjoint)

    is_adjoint()
    share.check()


@every_dtype
@every_kind
def test_every_dtype(device, geometry, dtype):
    sites = random_sites(60, extent=7, repeats=4, device=device)
    kmap = kernel_map(sites, geometry)
    check(kmap, operands(kmap, 16, 24, dtype))
    check(kmap.inverse(), operands(kmap.inverse(), 16, 24, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("c_in", "c_out"),
    [*itertools.pairwise([1, 3, 5, 17, 33, 1]), (17, 17), (64, 33), (128, 96), (3, 260)],
)
def test_channels(device, c_in, c_out, dtype):
    sites = random_sites(70, extent=6, device=device)
    for geometry in (SUBM3, DOWN2):
        kmap = kernel_map(sites, geometry)
        check(kmap, operands(kmap, c_in, c_out, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "geometry",
    [
        ConvGeometry.submanifold((5,) * 3, (1,) * 3),
        ConvGeometry.submanifold((3,) * 4, (1,) * 4),
        ConvGeometry.submanifold((7,) * 3, (1,) * 3),
        ConvGeometry((4,) * 3, (2,) * 3, (1,) * 3, (1,) * 3),
        ConvGeometry((2,) * 5, (2,) * 5, (0,) * 5, (1,) * 5),
    ],
    ids=["5x5x5", "3x3x3x3", "7x7x7", "strided-4x4x4", "2x2x2x2x2"],
)
def test_more_taps_than_mask_bits(device, geometry, dtype):
    sites = random_sites(50, geometry.ndim, extent=10 if geometry.ndim == 3 else 5, device=device)
    kmap = kernel_map(sites, geometry)
    check(kmap, operands(kmap, 8, 12, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_many_rows(device, dtype):
    """There are enough rows for ordered columns and for many slices of the weight's gradient."""
    sites = surface_sites(36, device=device)
    for geometry in (SUBM3, DOWN2):
        kmap = kernel_map(sites, geometry)
        check(kmap, operands(kmap, 16, 16, dtype))


@pytest.mark.parametrize("n", [0, 1, 63])
@every_kind
def test_few_rows(device, geometry, n):
    sites = random_sites(n, extent=5, device=device)
    kmap = kernel_map(sites, geometry)
    ours = check(kmap, operands(kmap, 4, 6, torch.float32))
    assert ours[0].shape == (kmap.n_out, 6)


@every_back_end
def test_no_output_rows(device):
    """If there are inputs but no outputs, gradients are zeros, not None."""
    sites = random_sites(5, extent=4, device=device)
    nowhere = ActiveSites(sites.coords[:0], sites.grid)
    kmap = kernel_map(sites, DOWN2, out_sites=nowhere)
    for a in check(kmap, operands(kmap, 4, 6, torch.float32))[1:]:
        assert not a.any()
    kmap = kernel_map(nowhere, DOWN2, out_sites=sites)
    out, *_ = check(kmap, leaves := operands(kmap, 4, 6, torch.float32))
    assert torch.equal(out, leaves[2].expand(5, 6))


@every_back_end
def test_a_row_without_pairs_is_the_bias(device):
    sites = random_sites(10, extent=4, device=device)
    far = torch.tensor([[0, 3, 3, 3], [1, 40, 40, 40]], dtype=torch.int32, device=device)
    kmap = kernel_map(sites, DOWN2, out_sites=ActiveSites(far, Grid((0,) * 3, (50,) * 3, 2)))
    feats, weight, bias = operands(kmap, 4, 6)
    assert torch.equal(sparse_conv(feats, weight, kmap, bias)[1], bias)
    assert not sparse_conv(feats, weight, kmap)[1].any()


DENSE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
DENSE_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@pytest.mark.parametrize("share", [1.0, 0.3], ids=["full", "partly"])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize(
    ("shape", "kernel_size", "stride", "padding", "dilation"),
    [
        pytest.param((17,), (3,), (1,), (1,), (1,), id="1d"),
        pytest.param((23,), (4,), (3,), (2,), (2,), id="1d-even"),
        pytest.param((9, 8), (3, 2), (2, 1), (1, 0), (1, 3), id="2d"),
        pytest.param((7, 9), (1, 5), (3, 1), (0, 2), (1, 1), id="2d-stride-beyond-kernel"),
        pytest.param((6, 5, 7), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), id="3d"),
        pytest.param((5, 6, 7), (2, 3, 1), (1, 2, 3), (2, 0, 0), (2, 1, 1), id="3d-mixed"),
    ],
)
def test_is_the_dense_layer(
    device, shape, kernel_size, stride, padding, dilation, transposed, share
):
    """The results are equal at active sites; elsewhere the dense layer has only the bias."""
    ndim = len(shape)
    sites = block_sites(shape, 2)
    rows = torch.randperm(sites.num_rows)[: int(share * sites.num_rows)]
    sites = ActiveSites(sites.coords[rows].to(device), sites.grid)
    extra = (1,) * ndim if transposed and min(stride) > 1 else (0,) * ndim
    geometry = ConvGeometry(
        kernel_size, stride, padding, dilation, transposed=transposed,
        output_padding=extra if transposed else (),
    )  # fmt: skip
    kmap = kernel_map(sites, geometry)
    leaves = operands(kmap, 3, 4)

    def dense(feats, weight, bias):
        volume = feats.new_zeros(2, *shape, 3).index_put(tuple(sites.coords.long().T), feats)
        window = weight.reshape(*kernel_size, 3, 4).movedim((-2, -1), (0, 1))
        if transposed:
            out = DENSE_TRANSPOSED[ndim](
                volume.movedim(-1, 1), window, bias, stride, padding, extra, dilation=dilation
            )
        else:
            out = DENSE[ndim](
                volume.movedim(-1, 1), window.transpose(0, 1), bias, stride, padding, dilation
            )
        out = out.movedim(1, -1)
        assert out.shape[1:-1] == kmap.out_sites.grid.shape
        at = tuple(kmap.out_sites.coords.long().T)
        others = torch.ones(out.shape[:-1], dtype=torch.bool, device=out.device)
        others[at] = False
        torch.testing.assert_close(out[others], bias.expand_as(out[others]))
        return out[at]

    grad = torch.randn(kmap.n_out, 4, dtype=torch.float64, device=device)
    ours = run(lambda *x: sparse_conv(x[0], x[1], kmap, x[2]), leaves, grad)
    for a, b in zip(ours, run(dense, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_submanifold_is_the_dense_layer_at_active_sites(device, ndim):
    sites = random_sites(30, ndim, extent=(40, 8, 5)[ndim - 1], device=device)
    kmap = kernel_map(sites, ConvGeometry.submanifold((3,) * ndim, (2,) * ndim))
    feats, weight, bias = operands(kmap, 3, 4)
    at = tuple(sites.coords.long().T)
    volume = feats.new_zeros(2, *sites.grid.shape, 3).index_put(at, feats).movedim(-1, 1)
    window = weight.reshape(*(3,) * ndim, 3, 4).movedim((-1, -2), (0, 1))
    out = DENSE[ndim](volume, window, bias, padding=2, dilation=2).movedim(1, -1)
    torch.testing.assert_close(sparse_conv(feats, weight, kmap, bias), out[at])


@every_kind
def test_gradcheck(device, geometry):
    sites = random_sites(9, extent=3, batch_size=1, repeats=1, device=device)
    for kmap in (kernel_map(sites, geometry), kernel_map(sites, geometry).inverse()):
        leaves = operands(kmap, 2, 3)
        assert torch.autograd.gradcheck(
            lambda feats, weight, bias, kmap=kmap: sparse_conv(feats, weight, kmap, bias), leaves
        )


@every_back_end
@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)), ids=str)
def test_gradients_that_are_asked_for(device, wanted):
    kmap = kernel_map(random_sites(20, extent=4, device=device), SUBM3)
    leaves = [
        x.detach().requires_grad_(w) for x, w in zip(operands(kmap, 3, 4), wanted, strict=True)
    ]
    out = sparse_conv(leaves[0], leaves[1], kmap, leaves[2])
    assert out.requires_grad == any(wanted)
    if any(wanted):
        out.sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == list(wanted)


@every_back_end
def test_a_gradient_of_the_residual_alone(device):
    """Only the residual requires a gradient, so no kernel without a graph may run."""
    kmap = kernel_map(random_sites(20, extent=4, device=device), DOWN2)
    feats, weight, bias = (x.detach() for x in operands(kmap, 3, 4))
    residual = torch.randn(kmap.n_out, 4, dtype=torch.float64, device=device, requires_grad=True)
    out = sparse_conv(feats, weight, kmap, bias, residual=residual, relu=True)
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, residual, grad)
    assert 0 < int((out > 0).sum()) < out.numel()
    assert torch.equal(found, grad * (out > 0))


@every_back_end
@every_kind
def test_a_weight_gradient_where_features_are_frozen(device, geometry):
    """This holds along an inverse map too, which lists its pairs with in and out swapped."""
    kmap = kernel_map(random_sites(40, extent=5, repeats=2, device=device), geometry)
    for way in (kmap, kmap.inverse()):
        feats, weight, _ = operands(way, 3, 4)
        frozen = feats.detach()
        grad = torch.randn(way.n_out, 4, dtype=torch.float64, device=device)
        (alone,) = torch.autograd.grad(sparse_conv(frozen, weight, way), weight, grad)
        exact = torch.zeros(way.kernel_volume, 3, 4, dtype=torch.float64)
        for in_row, out_row, tap in map_triples(way):
            exact[tap] += torch.outer(frozen[in_row].cpu(), grad[out_row].cpu())
        torch.testing.assert_close(alone.cpu(), exact)
        # Both gradients at once come from another kernel along an inverse map.
        both = torch.autograd.grad(sparse_conv(feats, weight, way), (feats, weight), grad)
        torch.testing.assert_close(both[1], alone)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_bias_gradient_of_more_rows_than_half_precision_counts(device, dtype):
    """70,000 is too large for float16, and in bfloat16 a sum of ones stops at 256."""
    n = 70_000
    coords = torch.zeros(n, 2, dtype=torch.int32, device=device)
    coords[:, 1] = torch.arange(n)
    kmap = kernel_map(
        ActiveSites(coords, Grid((0,), (n,), 1)), ConvGeometry.submanifold((1,), (1,))
    )
    feats = torch.zeros(n, 1, device=device)
    weight, bias = torch.zeros(1, 1, 1, device=device), torch.zeros(1, device=device)
    with torch.autocast(device.type, dtype):
        out = sparse_conv(feats, weight, kmap, bias.requires_grad_())
    assert out.dtype == dtype
    (found,) = torch.autograd.grad(out, bias, torch.ones_like(out))
    assert found.dtype == torch.float32
    assert found.tolist() == [n]


def strided_views(tensor: Tensor) -> dict[str, Tensor]:
    """Return tensors of equal values in other memory layouts."""
    views = {"contiguous": tensor.contiguous()}
    for axes in itertools.permutations(range(tensor.ndim)):
        stored = tensor.permute(axes).contiguous()
        views[f"stored{axes}"] = stored.permute([axes.index(i) for i in range(tensor.ndim)])
    padded = tensor.new_full([2 * n + 1 for n in tensor.shape], float("nan"))
    views["gaps"] = padded[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)
    views["expanded"] = tensor[:1].expand_as(tensor)
    return views


@pytest.mark.parametrize("geometry", [SUBM3, DOWN2], ids=["subm", "strided"])
def test_layouts_of_operands(device, geometry):
    kmap = kernel_map(random_sites(20, extent=4, device=device), geometry)
    feats, weight, bias = (x.detach() for x in operands(kmap, 5, 7, torch.float32))
    for view in strided_views(feats).values():
        check(kmap, [view.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()])
    for name, view in strided_views(weight.detach()).items():
        leaves = [feats.requires_grad_(), view.detach().requires_grad_(), bias.requires_grad_()]
        _, _, dweight, _ = check(kmap, leaves)
        if name.startswith("stored"):
            assert dweight.stride() == view.stride(), "a gradient has its parameter's layout"


@every_back_end
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("geometry", [SUBM3, DOWN2], ids=["subm", "strided"])
def test_weight_of_another_layout(device, geometry, dtype):
    """The layer equals that of a view of the weight, with and without a graph."""
    kmap = kernel_map(random_sites(20, extent=4, device=device), geometry)
    feats, matrices, bias = operands(kmap, 5, 7, dtype)
    stored = matrices.detach().permute(2, 0, 1).reshape(7, 3, 3, 3, 5)
    for weight in (stored.contiguous(), strided_views(stored)["gaps"]):
        leaf = weight.detach().requires_grad_()

        def layer(feats, weight, bias):
            return sparse_conv(feats, weight, kmap, bias, weight_layout="OVI")

        grad = torch.randn(kmap.n_out, 7).to(device, dtype)
        out, *grads = run(layer, [feats, leaf, bias], grad)
        expected, *expected_grads = run(
            lambda *leaves: sparse_conv(*leaves[:2], kmap, leaves[2]), [feats, matrices, bias], grad
        )
        assert grads[1].shape == leaf.shape
        grads[1] = grads[1].flatten(1, -2).permute(1, 2, 0)
        for one, two in zip([out, *grads], [expected, *expected_grads], strict=True):
            torch.testing.assert_close(one, two)
        with torch.no_grad():
            assert torch.equal(layer(feats, leaf, bias), out)


@every_back_end
def test_a_changed_weight_of_another_layout_is_noticed(device):
    kmap = kernel_map(random_sites(20, extent=4, device=device), SUBM3)
    weight = torch.randn(7, 3, 3, 3, 5, device=device).requires_grad_()
    feats = torch.randn(kmap.n_in, 5, device=device).requires_grad_()
    out = sparse_conv(feats, weight, kmap, weight_layout="OVI")
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_layouts_of_the_incoming_gradient(device):
    kmap = kernel_map(random_sites(20, extent=4, device=device), DOWN2)
    leaves = operands(kmap, 5, 7, torch.float64)
    out = sparse_conv(leaves[0], leaves[1], kmap, leaves[2])
    dense_grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, dense_grad, retain_graph=True)
    for name, grad in strided_views(dense_grad).items():
        if name == "expanded":
            continue
        for a, b in zip(
            torch.autograd.grad(out, leaves, grad, retain_graph=True), expected, strict=True
        ):
            torch.testing.assert_close(a, b, msg=name)
    # The gradient of a sum is an expanded scalar with strides of zero.
    summed = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    ones = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for a, b in zip(summed, ones, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_equal_those_of_the_products(device):
    kmap = kernel_map(random_sites(10, extent=3, device=device), SUBM3)
    feats, weight, _ = operands(kmap, 2, 2, bias=False)
    rows, others, tap_ptr = kmap.pairs()
    taps = torch.arange(kmap.kernel_volume, device=device).repeat_interleave(tap_ptr.diff())

    def products():
        made = torch.bmm(feats[rows.long(), None], weight[taps])[:, 0]
        return made.new_zeros(kmap.n_out, 2).index_add(0, others.long(), made)

    found = []
    for run in (lambda: sparse_conv(feats, weight, kmap), products):
        (first,) = torch.autograd.grad(run().pow(3).sum(), feats, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (feats, weight)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("half", LOW, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast(device, half, training):
    """Both operands become half precision; gradients come back in the parameters' dtype."""
    kmap = kernel_map(random_sites(60, extent=6, device=device), SUBM3)
    feats, weight, bias = operands(kmap, 16, 24, torch.float32)
    with torch.set_grad_enabled(training), torch.autocast(device.type, half):
        out = sparse_conv(feats, weight, kmap, bias)
    assert out.dtype == half
    with torch.no_grad():
        explicit = sparse_conv(feats.to(half), weight.to(half), kmap, bias)
    assert torch.equal(out, explicit)
    if not training:
        return

    triples = map_triples(kmap)

    def oracle(*x):
        return reference.conv(x[0], x[1], triples, kmap.n_out, x[2])

    grad = torch.randn(kmap.n_out, 24).to(half)
    rounded = [x.detach().cpu().to(half) for x in (feats, weight, bias)]
    truth, eager = (
        run(oracle, [x.to(d).requires_grad_() for x in rounded], grad)
        for d in (torch.float64, half)
    )
    ours = torch.autograd.grad(out, (feats, weight, bias), grad.to(device))
    assert_close(out, truth[0], half, eager=eager[0], name="out")
    for name, a, t, e in zip(
        ("dfeats", "dweight", "dbias"), ours, truth[1:], eager[1:], strict=True
    ):
        assert a.dtype == torch.float32
        assert_close(a, t, half, eager=e, name=name)


def test_autocast_weight_gradient_is_not_rounded(device):
    """The sum reaches the float32 parameter and is never rounded to half precision."""
    kmap = kernel_map(surface_sites(10, device=device), SUBM3)
    feats, weight, _ = operands(kmap, 8, 8, torch.float32, bias=False)
    with torch.autocast(device.type, torch.bfloat16):
        out = sparse_conv(feats, weight, kmap)
    (dweight,) = torch.autograd.grad(out, weight, torch.ones_like(out))
    assert not torch.equal(dweight, dweight.bfloat16().float())


def test_autocast_backward_inside_the_context(device):
    kmap = kernel_map(random_sites(30, extent=4, device=device), SUBM3)
    grads = []
    for inside in (False, True):
        leaves = [x.detach().requires_grad_() for x in _fixed_operands(kmap)]
        with torch.autocast(device.type, torch.bfloat16):
            out = sparse_conv(leaves[0], leaves[1], kmap, leaves[2])
            if inside:
                out.sum().backward()
        if not inside:
            out.sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def _fixed_operands(kmap: KernelMap) -> list[Tensor]:
    torch.manual_seed(0)
    return operands(kmap, 8, 12, torch.float32)


def test_autocast_leaves_float64_alone(device):
    kmap = kernel_map(random_sites(20, extent=4, device=device), SUBM3)
    feats, weight, bias = operands(kmap, 4, 4)
    expected = sparse_conv(feats, weight, kmap, bias)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(sparse_conv(feats, weight, kmap, bias), expected)


@pytest.mark.parametrize(
    ("feats_dtype", "weight_dtype", "out_dtype"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
    ids=str,
)
def test_unlike_dtypes_are_promoted(device, feats_dtype, weight_dtype, out_dtype):
    kmap = kernel_map(random_sites(30, extent=4, device=device), SUBM3)
    feats, weight, bias = operands(kmap, 4, 6, torch.float64)
    leaves = [
        feats.detach().to(feats_dtype).requires_grad_(),
        weight.detach().to(weight_dtype).requires_grad_(),
        bias.detach().to(weight_dtype).requires_grad_(),
    ]
    grad = torch.randn(kmap.n_out, 6, dtype=out_dtype, device=device)
    out, *grads = run(lambda *x: sparse_conv(x[0], x[1], kmap, x[2]), leaves, grad)
    promoted = [x.detach().to(out_dtype).requires_grad_() for x in leaves]
    expected = run(lambda *x: sparse_conv(x[0], x[1], kmap, x[2]), promoted, grad)
    assert out.dtype == out_dtype
    torch.testing.assert_close(out, expected[0])
    for leaf, a, b in zip(leaves, grads, expected[1:], strict=True):
        assert a.dtype == leaf.dtype
        torch.testing.assert_close(a, b.to(leaf.dtype))


@every_dtype
@every_kind
def test_the_same_bits_twice(device, geometry, dtype):
    sites = random_sites(300, extent=8, repeats=20, device=device)
    bits = []
    for _ in range(2):
        kmap = kernel_map(ActiveSites(sites.coords, sites.grid), geometry)
        torch.manual_seed(0)
        leaves = operands(kmap, 17, 12, dtype)
        grad = torch.randn(kmap.n_out, 12).to(device, dtype)
        bits.append(run(lambda *x, kmap=kmap: sparse_conv(x[0], x[1], kmap, x[2]), leaves, grad))
    for a, b in zip(*bits, strict=True):
        assert torch.equal(a, b)


def test_order_of_input_rows_does_not_matter(device):
    """Shuffled inputs give the same generated rows, up to the rounding of sums."""
    sites = random_sites(80, extent=6, device=device)
    shuffle = torch.randperm(80, device=device)
    shuffled = ActiveSites(sites.coords[shuffle], sites.grid)
    feats = torch.randn(80, 4, dtype=torch.float64, device=device)
    for geometry in (DOWN2, UP2, CELLS2):
        one, other = kernel_map(sites, geometry), kernel_map(shuffled, geometry)
        weight = torch.randn(geometry.kernel_volume, 4, 5, dtype=torch.float64, device=device)
        torch.testing.assert_close(
            sparse_conv(feats, weight, one), sparse_conv(feats[shuffle], weight, other)
        )


def test_samples_do_not_mix(device):
    sites = random_sites(60, extent=4, batch_size=3, device=device)
    feats = torch.randn(60, 4, dtype=torch.float64, device=device)
    for geometry in (SUBM3, DOWN2, UP2):
        weight = torch.randn(geometry.kernel_volume, 4, 5, dtype=torch.float64, device=device)
        kmap = kernel_map(sites, geometry)
        out = sparse_conv(feats, weight, kmap)
        for sample in range(3):
            mine = sites.coords[:, 0] == sample
            alone = kernel_map(ActiveSites(sites.coords[mine], sites.grid), geometry)
            torch.testing.assert_close(
                sparse_conv(feats[mine], weight, alone),
                out[kmap.out_sites.coords[:, 0] == sample],
            )


@every_back_end
def test_nan_stays_where_it_is_read(device):
    sites = random_sites(40, extent=5, device=device)
    kmap = kernel_map(sites, DOWN2)
    feats, weight, _ = operands(kmap, 4, 5, torch.float32, bias=False)
    with torch.no_grad():
        clean = sparse_conv(feats, weight, kmap)
        feats[3] = torch.nan
        out = sparse_conv(feats, weight, kmap)
    readers = sorted({o for i, o, _ in map_triples(kmap) if i == 3})
    assert out[readers].isnan().all()
    others = sorted(set(range(kmap.n_out)) - set(readers))
    assert torch.equal(out[others], clean[others])


# Errors give the expected value, the received value and, for a common mistake, a correction.


def error_case(**changes):
    kmap = kernel_map(random_sites(6, extent=3), SUBM3)
    feats, weight, bias = (x.detach() for x in operands(kmap, 4, 5, torch.float32))
    arguments = {"feats": feats, "weight": weight, "kernel_map": kmap, "bias": bias, **changes}
    return lambda: sparse_conv(**arguments)


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        pytest.param(
            TypeError, {"feats": torch.zeros(6, 4, dtype=torch.int32)},
            r"float16, bfloat16, float32 or float64; got torch.int32 and torch.float32",
            id="feats-dtype",
        ),
        pytest.param(
            TypeError, {"weight": torch.zeros(27, 4, 5, dtype=torch.complex64)},
            r"got torch.float32 and torch.complex64", id="weight-dtype",
        ),
        pytest.param(
            ValueError, {"feats": torch.zeros(7, 4)},
            r"feats must be \[6, c_in\].* got \[7, 4\]", id="feats-rows",
        ),
        pytest.param(
            ValueError, {"feats": torch.zeros(6)}, r"feats must be \[6, c_in\].* got \[6\]",
            id="feats-axes",
        ),
        pytest.param(
            ValueError, {"weight": torch.zeros(8, 4, 5)},
            r"weight must be \[27, c_in, c_out\].*got \[8, 4, 5\]", id="weight-taps",
        ),
        pytest.param(
            ValueError, {"weight": torch.zeros(27, 4)},
            r"weight must be \[27, c_in, c_out\].*got \[27, 4\]", id="weight-axes",
        ),
        pytest.param(
            ValueError, {"weight": torch.zeros(27, 3, 5)},
            r"weight must have c_in=4 to match feats \[6, 4\]; got \[27, 3, 5\]. Build the layer "
            r"with in_channels=4", id="weight-channels",
        ),
        pytest.param(
            ValueError, {"bias": torch.zeros(4)}, r"bias must be \[5\]; got \[4\]", id="bias",
        ),
        pytest.param(
            ValueError, {"bias": torch.zeros(5, device="meta")}, r"on one device", id="device",
        ),
        pytest.param(
            ValueError, {"precision": "tf16"},
            r"precision must be 'ieee' or 'tf32'; got 'tf16'", id="precision",
        ),
        pytest.param(
            ValueError, {"weight_layout": "IVO"},
            r"weight_layout must be 'VIO' or 'OVI'; got 'IVO'", id="layout",
        ),
        pytest.param(
            ValueError, {"weight_layout": "OVI", "weight": torch.zeros(5, 4)},
            r"weight must be \[c_out, ..., c_in\] in the layout 'OVI'.* got \[5, 4\]",
            id="layout-axes",
        ),
    ],
)  # fmt: skip
def test_errors(error, changes, message):
    with pytest.raises(error, match=f"^sparse_conv: .*{message}"):
        error_case(**changes)()


@every_back_end
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_residual_and_relu(device, relu):
    kmap = kernel_map(random_sites(60, device=device), DOWN2)
    leaves = operands(kmap, 5, 7)
    residual = torch.randn(kmap.n_out, 7, dtype=torch.float64, device=device, requires_grad=True)

    def fused(feats, weight, bias, residual):
        return sparse_conv(feats, weight, kmap, bias, residual=residual, relu=relu)

    def plain(feats, weight, bias, residual):
        out = sparse_conv(feats, weight, kmap, bias) + residual
        return out.relu() if relu else out

    grad = torch.randn(kmap.n_out, 7, dtype=torch.float64, device=device)
    for ours, expected in zip(
        run(fused, [*leaves, residual], grad), run(plain, [*leaves, residual], grad), strict=True
    ):
        torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        torch.testing.assert_close(fused(*leaves, residual), plain(*leaves, residual))


def test_residual_of_another_shape_is_refused():
    kmap = kernel_map(random_sites(20), SUBM3)
    feats, weight, _ = operands(kmap, 3, 4)
    with pytest.raises(ValueError, match=r"residual must be \[20, 4\]"):
        sparse_conv(feats, weight, kmap, residual=torch.zeros(20, 3))


def random_norm(channels: int, device, dtype=torch.float64) -> ChannelNorm:
    """Return statistics, and a weight and a bias that require gradients."""
    mean, shift = torch.randn(2, channels).to(device, dtype)
    variance, scale = torch.rand(2, channels).add(0.5).to(device, dtype)
    return ChannelNorm(mean, variance, scale.requires_grad_(), shift.requires_grad_(), 1e-3)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@every_kind
def test_norm(device, geometry, relu):
    """The norm comes before residual and ReLU, and has the gradients of batch norm."""
    kmap = kernel_map(random_sites(60, extent=7, device=device), geometry)
    leaves = operands(kmap, 5, 7)
    norm = random_norm(7, device)
    residual = torch.randn(kmap.n_out, 7, dtype=torch.float64, device=device, requires_grad=True)
    leaves += [norm.weight, norm.bias, residual]

    def normalised(feats, weight, bias, scale, shift, residual):
        norm_ = norm._replace(weight=scale, bias=shift)
        return sparse_conv(feats, weight, kmap, bias, norm=norm_, residual=residual, relu=relu)

    def plain(feats, weight, bias, scale, shift, residual):
        out = sparse_conv(feats, weight, kmap, bias)
        out = reference.channel_norm(out, norm.mean, norm.variance, scale, shift, 1e-3) + residual
        return out.relu() if relu else out

    grad = torch.randn(kmap.n_out, 7, dtype=torch.float64, device=device)
    for ours, expected in zip(run(normalised, leaves, grad), run(plain, leaves, grad), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(normalised(*leaves), plain(*leaves), rtol=1e-12, atol=1e-12)


def training_norm(channels: int, device) -> TrainingNorm:
    """Return running statistics, a count, and a weight and a bias that require gradients."""
    norm = random_norm(channels, device, torch.float32)
    count = torch.tensor(4, device=device)
    return TrainingNorm(*norm[:4], num_batches=count, momentum=0.3, eps=1e-3)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@every_kind
def test_training_norm(device, geometry, relu, with_residual):
    """The result is torch's batch norm of these rows, which also moves the running statistics."""
    kmap = kernel_map(random_sites(60, extent=7, device=device), geometry)
    leaves, norm = operands(kmap, 5, 7, torch.float32), training_norm(7, device)
    residual = torch.randn(kmap.n_out, 7, device=device, requires_grad=True)
    leaves += [norm.weight, norm.bias, *[residual] * with_residual]
    state = norm._replace(**{
        name: getattr(norm, name).double() for name in ("running_mean", "running_var")
    })  # fmt: skip

    def normalised(feats, weight, bias, scale, shift, *residual):
        norm_ = norm._replace(weight=scale, bias=shift)
        added = residual[0] if residual else None
        return sparse_conv(feats, weight, kmap, bias, norm=norm_, residual=added, relu=relu)

    def plain(feats, weight, bias, scale, shift, *residual):
        out = sparse_conv(feats, weight, kmap, bias)
        out = F.batch_norm(
            out, state.running_mean, state.running_var, scale, shift, True, norm.momentum, norm.eps
        )
        out = out + residual[0] if residual else out
        return out.relu() if relu else out

    grad = torch.randn(kmap.n_out, 7, device=device)
    expected = run(plain, [x.detach().double().requires_grad_() for x in leaves], grad.double())
    for ours, exact in zip(run(normalised, leaves, grad), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
    for ours, exact in zip(norm[:2], state[:2], strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    assert int(norm.num_batches) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_training_norm_of_halves(device, dtype):
    """Statistics are of the rounded sums; a norm may lack weight, bias and count."""
    kmap = kernel_map(random_sites(60, extent=6, device=device), SUBM3)
    feats, weight, _ = operands(kmap, 16, 24, dtype)
    feats = feats.detach()
    out = sparse_conv(feats, weight, kmap)
    weight_ovi = weight.detach().permute(2, 0, 1).reshape(24, 3, 3, 3, 16).requires_grad_()
    mean, var = torch.zeros(2, 24, device=device)
    ours = sparse_conv(
        feats, weight_ovi, kmap, weight_layout="OVI", norm=TrainingNorm(mean, var, momentum=1.0)
    )
    assert ours.dtype == dtype
    exact = F.batch_norm(out.double(), None, None, training=True)
    assert_close(ours, exact, dtype, eager=exact.to(dtype), name="out")
    torch.testing.assert_close(mean.double(), out.double().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), out.double().var(0), rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(exact)
    ours.backward(grad.to(dtype))
    exact.backward(grad.to(dtype).double())
    wanted = weight.grad.permute(2, 0, 1).reshape_as(weight_ovi)
    torch.testing.assert_close(weight_ovi.grad, wanted, rtol=0.05, atol=0.05)


@every_back_end
def test_a_relu_that_rounds_to_zero_passes_no_gradient(device):
    """A positive number that rounds to zero passes no gradient, as in torch."""
    kmap = kernel_map(random_sites(60, extent=6, device=device), POINTWISE)
    dtype = torch.float16
    feats, weight, _ = operands(kmap, 4, 5, dtype)
    norm = training_norm(5, device)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    # Outputs of the norm lie around the smallest number there is; some round to zero.
    with torch.no_grad():
        norm.weight.fill_(smallest / 2)
        norm.bias.zero_()
    out = sparse_conv(feats, weight, kmap, norm=norm, relu=True)
    passed = out > 0
    plain = sparse_conv(feats, weight, kmap).double()
    positive = F.batch_norm(plain, None, None, training=True) > 0
    assert 0 < int(passed.sum()) < int(positive.sum())
    (found,) = torch.autograd.grad(out, norm.bias, torch.ones_like(out))
    assert torch.equal(found, passed.sum(0).float())


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (ValueError, {"running_mean": torch.zeros(4)}, r"norm.running_mean must be \[5\] on cpu"),
        (
            TypeError,
            {"running_var": torch.zeros(10)[::2]},
            "norm.running_var must be .* contiguous",
        ),
        (TypeError, {"weight": torch.zeros(5).double()}, "norm.weight must be float32"),
        (ValueError, {"bias": torch.zeros(5, device="meta")}, "norm.bias must be"),
        (ValueError, {"num_batches": torch.tensor(1.0)}, "norm.num_batches must be one int64"),
    ],
)
def test_training_norms_that_do_not_fit_are_refused(error, changes, message):
    kmap = kernel_map(random_sites(20), SUBM3)
    feats, weight, bias = operands(kmap, 3, 5, torch.float32)
    norm = TrainingNorm(torch.zeros(5), torch.ones(5))._replace(**changes)
    with pytest.raises(error, match=message):
        sparse_conv(feats, weight, kmap, bias, norm=norm)


@pytest.mark.parametrize(
    ("n", "dtype"), [(1, torch.float32), (0, torch.float32), (20, torch.float64)]
)
def test_training_norms_take_two_rows(n, dtype):
    kmap = kernel_map(random_sites(n), SUBM3)
    feats, weight, bias = operands(kmap, 3, 5, dtype)
    with pytest.raises(ValueError, match=f"at least two rows .* got {n} of"):
        sparse_conv(feats, weight, kmap, bias, norm=TrainingNorm(torch.zeros(5), torch.ones(5)))


@pytest.mark.parametrize("vectors", DTYPES, ids=str)
@every_dtype
def test_norm_of_another_dtype(device, dtype, vectors):
    """The output has the dtype of the operands, with gradients and without."""
    kmap = kernel_map(random_sites(60, extent=6, device=device), SUBM3)
    norm = random_norm(24, device, vectors)
    leaves = operands(kmap, 16, 24, dtype)
    out = sparse_conv(leaves[0], leaves[1], kmap, leaves[2], norm=norm)
    assert out.requires_grad
    out.sum().backward()
    assert norm.weight.grad.dtype == vectors
    with torch.no_grad():
        fused = sparse_conv(leaves[0], leaves[1], kmap, leaves[2], norm=norm)
        exact = sparse_conv(*(x.double() for x in leaves[:2]), kmap, leaves[2].double())
        exact = reference.channel_norm(exact, *norm.each(Tensor.double))
    for ours in (fused, out):
        assert ours.dtype == dtype
        assert_close(ours, exact, dtype, eager=exact.to(dtype), name="out")


@every_back_end
def test_layouts_of_vectors(device):
    kmap = kernel_map(random_sites(30, extent=5, device=device), SUBM3)
    feats, weight, bias = operands(kmap, 3, 5, torch.float32)
    norm = random_norm(5, device, torch.float32)
    with torch.no_grad():
        expected = sparse_conv(feats, weight, kmap, bias, norm=norm)
        gaps = norm.each(lambda x: strided_views(x.detach())["gaps"])
        bias = strided_views(bias.detach())["gaps"]
        assert torch.equal(sparse_conv(feats, weight, kmap, bias, norm=gaps), expected)


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (ValueError, {"mean": torch.zeros(4)}, r"norm.mean must be \[5\] on cpu.*got \[4\]"),
        (ValueError, {"variance": torch.zeros(1)}, r"norm.variance must be \[5\]"),
        (ValueError, {"weight": torch.zeros(5, 1)}, r"norm.weight must .* got \[5, 1\]"),
        (ValueError, {"bias": torch.zeros(5, device="meta")}, r"norm.bias must .* on meta"),
        (TypeError, {"mean": torch.zeros(5, dtype=torch.int32)}, r"norm.mean must be float16,"),
    ],
    ids=["mean", "variance", "weight", "device", "dtype"],
)
def test_norms_that_are_refused(error, changes, message):
    norm = random_norm(5, "cpu", torch.float32)._replace(**changes)
    with pytest.raises(error, match=f"^sparse_conv: {message}"):
        error_case(norm=norm)()
