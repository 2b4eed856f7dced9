"""Tables that layers of many channels put in order hold what they held."""

import importlib

import pytest
import torch

from tests._oracle import map_triples, pair_triples, swapped, table_triples
from tritonspconv import ops
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import kernel_map
from tritonspconv.kernels.eager.invert_table import mask_words
from tritonspconv.testing import random_sites

pytest.importorskip("triton", reason="Triton is not installed")

from tritonspconv.kernels.triton import order_columns

module = importlib.import_module("tritonspconv.kernel_map.kernel_map")

SUBM = ConvGeometry.submanifold((3, 3, 3), (1, 1, 1))
DOWN = ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))


def triton_kernels(op, device):
    return importlib.import_module(f"tritonspconv.kernels.triton.{op}")


@pytest.fixture
def made_map(triton_device, monkeypatch):
    """Make a map whose tables have masks, on every device, and no order."""
    monkeypatch.setattr(order_columns, "_MIN_WORK", 27 * 10)
    monkeypatch.setattr(module, "has_triton", lambda device: True)
    monkeypatch.setattr(module, "kernels_for", triton_kernels)

    def make(geometry):
        sites = random_sites(90, extent=7, repeats=5, device=triton_device)
        kmap = kernel_map(sites, geometry)
        relation = kmap._relation
        tables = relation.out_table, relation.in_table(sites, kmap.out_sites)
        relation.out_table, relation._in_table = (
            table if table.mask is not None else table._replace(mask=mask_words(table.rows))
            for table in tables
        )
        return kmap

    return make


@pytest.mark.parametrize("inverse", [False, True], ids=["map", "inverse"])
@pytest.mark.parametrize("geometry", [SUBM, DOWN], ids=["subm", "strided"])
def test_ordered_tables_hold_the_same_pairs(made_map, geometry, inverse):
    kmap = made_map(geometry)
    kmap = kmap.inverse() if inverse else kmap
    expected = sorted(map_triples(kmap))
    assert kmap.out_table_for(0, 1).order is None
    assert kmap.in_table_for(0, 1).order is None
    out_table = kmap.out_table_for(1, 1)
    assert out_table.order is not None
    assert kmap.out_table is out_table
    # One table from both sides.
    assert (kmap.in_table.order is not None) == kmap._relation.mirrored
    in_table = kmap.in_table_for(1, 1)
    assert in_table.order is not None
    assert kmap.out_table_for(5, 5) is out_table
    assert sorted(table_triples(out_table)) == expected
    assert sorted(swapped(table_triples(in_table))) == expected


def test_pairs_of_an_ordered_table(made_map):
    kmap = made_map(DOWN)
    kmap.out_table_for(1, 1)
    pairs, tap_ptr, _ = kmap.pair_list
    assert sorted(pair_triples(*pairs, tap_ptr)) == sorted(map_triples(kmap))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("geometry", [SUBM, DOWN], ids=["subm", "strided"])
def test_results_keep_their_bits(triton_device, geometry, dtype, monkeypatch):
    """But for the weight gradient, which adds its pairs in another order."""
    sites = random_sites(5000, extent=40, device=triton_device)
    results = []
    for least in (2**60, 0):
        monkeypatch.setattr(order_columns, "_MIN_WORK", least)
        torch.manual_seed(0)
        sites.map_cache.clear()
        kmap = kernel_map(sites, geometry)
        feats = torch.randn(kmap.n_in, 48, device=triton_device, dtype=dtype, requires_grad=True)
        weight = torch.randn(27, 48, 32, device=triton_device, dtype=dtype, requires_grad=True)
        out = ops.sparse_conv(feats, weight, kmap)
        out.backward(torch.randn_like(out))
        assert (kmap.out_table.order is None) == (least > 0)
        assert (kmap.in_table.order is None) == (least > 0)
        results.append((out.detach(), feats.grad, weight.grad))
    (out, feats_grad, weight_grad), (other_out, other_feats_grad, other_weight_grad) = results
    assert torch.equal(out, other_out)
    assert torch.equal(feats_grad, other_feats_grad)
    limit = {torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    assert (weight_grad - other_weight_grad).norm() < limit * weight_grad.norm()
