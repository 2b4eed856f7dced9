"""Kernel maps from explicit pairs: the same relation, values and gradients as the listed map."""

import pytest
import torch

from tests._oracle import pair_triples, swapped, table_triples
from tritonspconv import ops
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import kernel_map
from tritonspconv.kernel_map.from_pairs import map_from_pairs
from tritonspconv.testing import assert_close, random_sites

GEOMETRIES = [
    pytest.param(ConvGeometry.submanifold((3, 3), (1, 1)), id="submanifold"),
    pytest.param(ConvGeometry((2, 3), (2, 1), (0, 1), (1, 1)), id="strided"),
    pytest.param(ConvGeometry((6, 6), (2, 2), (2, 2), (1, 1)), id="36-taps"),
    pytest.param(ConvGeometry((2, 2), (2, 2), (0, 0), (1, 1), transposed=True), id="transposed"),
]


def both_maps(geometry, device, n=50):
    sites = random_sites(n, 2, extent=(9, 8), device=device)
    listed = kernel_map(sites, geometry)
    return listed, map_from_pairs(*listed.pairs(), listed.n_in, listed.n_out)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("n", [0, 1, 50])
def test_every_form_holds_the_listed_pairs(geometry, n, device):
    listed, built = both_maps(geometry, device, n)
    expected = sorted(pair_triples(*listed.pairs()))
    assert sorted(pair_triples(*built.pairs())) == expected
    assert sorted(table_triples(built.out_table)) == expected
    assert sorted(swapped(table_triples(built.in_table))) == expected
    assert (built.n_in, built.n_out) == (listed.n_in, listed.n_out)


@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution_and_gradients_are_those_of_the_listed_map(geometry, backwards, device):
    listed, built = both_maps(geometry, device)
    if backwards:
        listed, built = listed.inverse(), built.inverse()
    feats = torch.randn(listed.n_in, 3, device=device, dtype=torch.float64)
    weight = torch.randn(listed.kernel_volume, 3, 4, device=device, dtype=torch.float64)
    grad = torch.randn(listed.n_out, 4, device=device, dtype=torch.float64)
    results = []
    for kmap in (listed, built):
        leaves = [feats.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = ops.sparse_conv(*leaves, kmap)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for got, expected in zip(results[1], results[0], strict=True):
        assert_close(got, expected)


def test_pooling_and_its_gradient_are_those_of_the_listed_map(device):
    listed, built = both_maps(GEOMETRIES[1].values[0], device)
    feats = torch.randn(listed.n_in, 3, device=device)
    for mode in ("max", "avg", "sum"):
        results = []
        for kmap in (listed, built):
            leaf = feats.clone().requires_grad_()
            out = ops.sparse_pool(leaf, kmap, mode)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaf)])
        for got, expected in zip(results[1], results[0], strict=True):
            assert_close(got, expected)


@pytest.mark.parametrize(
    ("in_rows", "out_rows", "tap_ptr", "message"),
    [
        ([0, 1], [0], [0, 2], r"must both be \[P\]"),
        ([0], [0], [0], r"tap_ptr must be \[V\+1\]"),
        ([0, 1], [0, 1], [0, 1], "must ascend from 0 to the 2 pairs"),
        ([0, 1], [0, 1], [0, 2, 1, 2], "1 descents"),
        ([0, -1], [0, 1], [0, 2], "1 of 2 pairs lie outside n_in=3"),
        ([0, 1], [0, 2], [0, 2], "n_out=2 rows"),
        ([0, 1], [1, 1], [0, 2], "every output row may occur once"),
        ([1, 1], [0, 1], [0, 2], "every input row"),
    ],
)
def test_wrong_pairs_are_named(in_rows, out_rows, tap_ptr, message):
    rows = [torch.tensor(values, dtype=torch.int32) for values in (in_rows, out_rows)]
    with pytest.raises(ValueError, match=message):
        map_from_pairs(*rows, torch.tensor(tap_ptr), 3, 2)


def test_it_is_a_name_of_the_package():
    import tritonspconv

    assert tritonspconv.map_from_pairs is map_from_pairs
