"""Tables hold the same pairs after layers of many channels have ordered their columns."""

import pytest
import torch

from tests._back_end import use_triton
from tests._oracle import map_triples, swapped, table_triples
from tritonspconv import ops
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import kernel_map
from tritonspconv.testing import random_sites

pytest.importorskip("triton", reason="Triton is not installed")

from tritonspconv.kernels import order_columns

SUBM = ConvGeometry.submanifold((3, 3, 3), (1, 1, 1))
DOWN = ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))


@pytest.fixture
def made_map(triton_device, monkeypatch):
    """Make a map by the Triton kernels whose tables have no order."""
    monkeypatch.setattr(order_columns, "_MIN_WORK", 27 * 10)
    ops = "sites", "neighbor_table", "invert_table", "pairs", "order_columns"
    use_triton(monkeypatch, *ops)

    def make(geometry):
        sites = random_sites(90, extent=7, repeats=5, device=triton_device)
        return kernel_map(sites, geometry)

    return make


@pytest.mark.parametrize("inverse", [False, True], ids=["map", "inverse"])
@pytest.mark.parametrize("geometry", [SUBM, DOWN], ids=["subm", "strided"])
def test_ordered_tables_hold_the_same_pairs(made_map, geometry, inverse):
    kmap = made_map(geometry)
    kmap = kmap.inverse() if inverse else kmap
    expected = sorted(map_triples(kmap))
    plain = kmap.out_table, kmap.in_table
    assert kmap.out_table_for(0, 1) is plain[0]
    assert kmap.in_table_for(0, 1) is plain[1]
    ordered = kmap.out_table_for(1, 1), kmap.in_table_for(1, 1)
    assert all(table.order is not None for table in ordered)
    assert sorted(table_triples(ordered[0])) == expected
    assert sorted(swapped(table_triples(ordered[1]))) == expected
    assert kmap.out_table_for(5, 5) is ordered[0]
    assert kmap.in_table_for(5, 5) is ordered[1]


@pytest.mark.parametrize("geometry", [SUBM, DOWN], ids=["subm", "strided"])
def test_a_wide_layer_changes_nothing_that_others_read(made_map, geometry):
    """The order of the pairs stays too: it is the order of a weight gradient's sum."""
    seen = []
    for is_first in (True, False):
        torch.manual_seed(0)
        kmap = made_map(geometry)
        if is_first:
            kmap.out_table_for(1, 1), kmap.in_table_for(1, 1)
        pairs, tap_ptr, _ = kmap.pair_list
        listed = pairs[:, : int(tap_ptr[-1])]
        seen.append((kmap.out_table.rows, kmap.in_table.rows, listed, tap_ptr))
        assert kmap.out_table.order is None
        assert kmap.in_table.order is None
    for first, second in zip(*seen, strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("geometry", [SUBM, DOWN], ids=["subm", "strided"])
def test_results_keep_their_bits(triton_device, geometry, dtype, monkeypatch):
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
        assert (kmap.out_table_for(48, 32).order is None) == (least > 0)
        assert (kmap.in_table_for(48, 32).order is None) == (least > 0)
        results.append((out.detach(), feats.grad, weight.grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
