"""The oracle itself, against dense torch layers on full and on partly filled grids."""

import ast
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tritonspconv import reference
from tritonspconv.reference import Box

DENSE_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
DENSE_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
DENSE_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}

# (input shape, kernel size, stride, padding, dilation)
WINDOWS = [
    pytest.param((9,), (3,), (1,), (1,), (1,), id="1d"),
    pytest.param((11,), (4,), (3,), (2,), (2,), id="1d-even-strided-dilated"),
    pytest.param((6, 7), (3, 2), (2, 1), (1, 0), (1, 3), id="2d-anisotropic"),
    pytest.param((7, 5), (1, 5), (3, 1), (0, 2), (1, 1), id="2d-stride-beyond-kernel"),
    pytest.param((4, 5, 6), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), id="3d"),
    pytest.param((5, 4, 6), (2, 3, 3), (2, 2, 1), (0, 1, 2), (1, 1, 2), id="3d-mixed"),
]


def cells(shape, batch_size=2, share=1.0) -> Tensor:
    every = list(itertools.product(range(batch_size), *(range(n) for n in shape)))
    kept = torch.randperm(len(every))[: math.ceil(share * len(every))]
    return torch.tensor(every, dtype=torch.int32)[kept]


def box(shape, batch_size=2) -> Box:
    return Box((0,) * len(shape), tuple(shape), batch_size)


def dense_weight(weight: Tensor, kernel_size, transposed: bool) -> Tensor:
    """``[V, c_in, c_out]`` as torch stores it, taps with the last axis fastest."""
    window = weight.reshape(*kernel_size, *weight.shape[1:])
    axes = range(len(kernel_size))
    return window.permute(*((-2, -1) if transposed else (-1, -2)), *axes)


@pytest.mark.parametrize("share", [1.0, 0.4], ids=["full", "partly"])
@pytest.mark.parametrize(("shape", "kernel_size", "stride", "padding", "dilation"), WINDOWS)
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_conv_is_the_dense_layer(transposed, shape, kernel_size, stride, padding, dilation, share):
    geometry = (kernel_size, stride, padding, dilation)
    coords = cells(shape, share=share)
    feats = torch.randn(len(coords), 3, dtype=torch.float64)
    weight = torch.randn(math.prod(kernel_size), 3, 2, dtype=torch.float64)

    layer = (DENSE_TRANSPOSED if transposed else DENSE_CONV)[len(shape)]
    dense = layer(
        reference.to_dense(feats, coords, box(shape)),
        dense_weight(weight, kernel_size, transposed),
        stride=stride,
        padding=padding,
        dilation=dilation,
    )
    out_box = box(dense.shape[2:])
    out_coords = reference.output_sites(
        coords, *geometry, transposed=transposed, in_box=box(shape), out_box=out_box
    )
    triples = reference.relation(coords, out_coords, *geometry, transposed=transposed)
    out = reference.conv(feats, weight, triples, len(out_coords))

    assert out_coords.tolist() == sorted(out_coords.tolist())
    # Sites that are not reached are zero in the dense layer as well.
    torch.testing.assert_close(reference.to_dense(out, out_coords, out_box), dense)


@pytest.mark.parametrize(("shape", "kernel_size", "stride", "padding", "dilation"), WINDOWS)
def test_max_pool_is_the_dense_layer(shape, kernel_size, stride, padding, dilation):
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel_size, strict=True))
    geometry = (kernel_size, stride, padding, dilation)
    coords = cells(shape)
    feats = torch.randn(len(coords), 2, dtype=torch.float64)
    dense = DENSE_MAX_POOL[len(shape)](
        reference.to_dense(feats, coords, box(shape)), kernel_size, stride, padding, dilation
    )
    out_box = box(dense.shape[2:])
    out_coords = reference.output_sites(coords, *geometry, out_box=out_box)
    triples = reference.relation(coords, out_coords, *geometry)
    out = reference.pool(feats, triples, len(out_coords), "max")
    torch.testing.assert_close(reference.to_dense(out, out_coords, out_box), dense)


def test_avg_pool_is_the_dense_layer():
    shape, geometry = (6, 7), ((3, 2), (2, 2), (1, 0), (1, 1))
    coords = cells(shape)
    feats = torch.randn(len(coords), 2, dtype=torch.float64)
    in_dense = reference.to_dense(feats, coords, box(shape))
    dense = F.avg_pool2d(in_dense, (3, 2), (2, 2), (1, 0), count_include_pad=False)
    out_coords = reference.output_sites(coords, *geometry, out_box=box(dense.shape[2:]))
    triples = reference.relation(coords, out_coords, *geometry)
    out = reference.pool(feats, triples, len(out_coords), "avg")
    torch.testing.assert_close(reference.to_dense(out, out_coords, box(dense.shape[2:])), dense)


def test_shares_no_code_with_the_package():
    tree = ast.parse(Path(reference.__file__).read_text())
    imported = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    roots = {name.split(".")[0] for name in imported}
    assert roots <= {"collections", "itertools", "math", "torch", "typing"}


def test_tap_orders_name_one_window():
    last = reference.taps((2, 3, 2))
    first = reference.taps((2, 3, 2), "first_axis_fastest")
    assert last[:3] == [(0, 0, 0), (0, 0, 1), (0, 1, 0)]
    assert first[:3] == [(0, 0, 0), (1, 0, 0), (0, 1, 0)]
    assert set(last) == set(first)


def test_relation_of_repeated_rows():
    coords = torch.tensor([[0, 4], [0, 4], [0, 5]], dtype=torch.int32)
    geometry = ((3,), (1,), (1,), (1,))
    triples = reference.relation(coords, coords, *geometry)
    assert triples == [(0, 2, 0), (0, 0, 1), (2, 2, 1), (2, 0, 2)]
    triples = reference.relation(coords, coords, *geometry, submanifold=True)
    assert triples == [(0, 2, 0), (0, 0, 1), (1, 1, 1), (2, 2, 1), (2, 0, 2)]


def test_relation_of_rows_outside_the_box():
    coords = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 1], [-1, 1]], dtype=torch.int32)
    geometry = ((3,), (1,), (1,), (1,))
    inner = Box((1,), (2,), 1)
    triples = reference.relation(coords, coords, *geometry, in_box=inner)
    assert triples == [(1, 2, 0), (1, 1, 1), (2, 2, 1), (1, 0, 2), (2, 1, 2)]
    triples = reference.relation(coords, coords, *geometry, in_box=inner, out_box=inner)
    assert triples == [(1, 2, 0), (1, 1, 1), (2, 2, 1), (2, 1, 2)]
    triples = reference.relation(
        coords, coords, *geometry, submanifold=True, in_box=inner, out_box=inner
    )
    assert [t for t in triples if t[2] == 1] == [(row, row, 1) for row in range(5)]
    assert len(triples) == 7


def test_cells_round_down():
    coords = torch.tensor([[0, -3, 5], [0, -4, 4], [1, -1, 0], [0, -5, 4]], dtype=torch.int32)
    out = reference.output_sites(coords, (3, 3), (2, 2), (1, 1), (1, 1), rule="cells")
    assert out.tolist() == [[0, -3, 2], [0, -2, 2], [1, -1, 0]]


def test_reached_has_no_end_without_a_box():
    coords = torch.tensor([[0, -1]], dtype=torch.int32)
    geometry = ((3,), (2,), (1,), (1,))
    assert reference.output_sites(coords, *geometry).tolist() == [[0, -1], [0, 0]]
    out = reference.output_sites(coords, *geometry, transposed=True)
    assert out.tolist() == [[0, -3], [0, -2], [0, -1]]


def test_conv_is_differentiable():
    coords = cells((3, 3), 1, share=0.7)
    triples = reference.relation(coords, coords, (3, 3), (1, 1), (1, 1), (1, 1))
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((len(coords), 2), (9, 2, 3), (3,))
    ]
    assert torch.autograd.gradcheck(
        lambda feats, weight, bias: reference.conv(feats, weight, triples, len(coords), bias),
        inputs,
    )


@pytest.mark.parametrize("mode", ["max", "avg", "sum"])
def test_pool_is_differentiable(mode):
    coords = cells((3, 3), 1, share=0.7)
    triples = reference.relation(coords, coords, (3, 3), (1, 1), (1, 1), (1, 1))
    feats = torch.randn(len(coords), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: reference.pool(x, triples, len(coords), mode, ties="all"), [feats]
    )


def test_max_pool_ties_and_floor():
    triples = [(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 1, 0)]

    def grad(values, **options):
        feats = torch.tensor(values).reshape(4, 1).requires_grad_()
        out = reference.pool(feats, triples, 3, "max", **options)
        out.sum().backward()
        return out.flatten().tolist(), feats.grad.flatten().tolist()

    assert grad([2.0, 2.0, 1.0, -1.0]) == ([2.0, -1.0, 0.0], [1.0, 0.0, 0.0, 1.0])
    assert grad([2.0, 2.0, 1.0, -1.0], ties="all") == ([2.0, -1.0, 0.0], [1.0, 1.0, 0.0, 1.0])
    assert grad([0.0, -2.0, 0.0, -1.0], ties="all", floor=0.0) == (
        [0.0, 0.0, 0.0],
        [1.0, 0.0, 1.0, 0.0],
    )


def test_global_pool():
    feats = torch.tensor([[1.0, 5.0], [3.0, -2.0], [4.0, 4.0]])
    batch = torch.tensor([0, 0, 2])
    pooled = {m: reference.global_pool(feats, batch, 3, m).tolist() for m in ("max", "avg", "sum")}
    assert pooled["max"] == [[3.0, 5.0], [0.0, 0.0], [4.0, 4.0]]
    assert pooled["avg"] == [[2.0, 1.5], [0.0, 0.0], [4.0, 4.0]]
    assert pooled["sum"] == [[4.0, 3.0], [0.0, 0.0], [4.0, 4.0]]


def test_to_dense_lets_the_last_row_win():
    coords = torch.tensor([[0, 1], [0, 1], [0, 9]], dtype=torch.int32)
    dense = reference.to_dense(torch.tensor([[1.0], [2.0], [3.0]]), coords, Box((0,), (3,), 1))
    assert dense.tolist() == [[[0.0, 2.0, 0.0]]]


def test_voxelize():
    coords = torch.tensor([[0, 2], [0, -1], [0, 2]], dtype=torch.int32)
    feats = torch.tensor([[1.0], [2.0], [5.0]])
    for mode, expected in (("avg", 3.0), ("sum", 6.0), ("max", 5.0), ("first", 1.0)):
        sites, merged, site_of_row = reference.voxelize(coords, feats, mode)
        assert sites.tolist() == [[0, -1], [0, 2]]
        assert merged.tolist() == [[2.0], [expected]]
        assert site_of_row.tolist() == [1, 0, 1]


def test_empty():
    coords = torch.zeros(0, 3, dtype=torch.int32)
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1))
    assert reference.output_sites(coords, *geometry).shape == (0, 3)
    assert reference.relation(coords, coords, *geometry) == []
    assert reference.conv(torch.zeros(0, 2), torch.zeros(9, 2, 4), [], 0).shape == (0, 4)
    assert reference.pool(torch.zeros(0, 2), [], 0, "max").shape == (0, 2)
    assert reference.to_dense(torch.zeros(0, 2), coords, box((3, 4))).shape == (2, 2, 3, 4)


@pytest.mark.parametrize("affine", [True, False])
def test_channel_norm_is_batch_norm_in_evaluation(affine):
    norm = torch.nn.BatchNorm1d(5, eps=1e-3, affine=affine, dtype=torch.float64).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    x = torch.randn(7, 5, dtype=torch.float64)
    vectors = norm.running_mean, norm.running_var, norm.weight, norm.bias
    torch.testing.assert_close(reference.channel_norm(x, *vectors, 1e-3), norm(x))
