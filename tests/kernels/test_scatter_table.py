"""Tables of maps whose inputs feed one output at most: Triton against brute force and torch."""

import itertools

import pytest
import torch

from tests._oracle import expected_triples, table_triples
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import NeighborTable
from tritonspconv.kernels.eager import scatter_table as eager
from tritonspconv.testing import random_sites

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.test_neighbor_table import KINDS, check_invert, draw, index_of, some_outputs
from tritonspconv.kernels.triton import _column_order
from tritonspconv.kernels.triton import scatter_table as kernels

HALVE = ConvGeometry((2,) * 3, (2,) * 3, (0,) * 3, (1,) * 3)
GEOMETRIES = {
    "1d-k3s4": ConvGeometry((3,), (4,), (2,), (1,)),
    "2d-k4x9": ConvGeometry((4, 9), (4, 9), (1, 3), (1, 1)),
    "3d-k2s2": HALVE,
    "3d-first-axis": ConvGeometry(
        (2, 3, 1), (2, 3, 2), (1, 0, 0), (1,) * 3, tap_order="first_axis_fastest"
    ),
    "3d-cells": ConvGeometry((2,) * 3, (2,) * 3, (0,) * 3, (1,) * 3, sites="cells"),
    "4d-k2s3": ConvGeometry((2,) * 4, (3,) * 4, (0,) * 4, (1,) * 4),
    "stride-beyond-kernel": ConvGeometry((1, 2, 1), (3, 3, 2), (0, -1, 0), (1,) * 3),
    "one-tap": ConvGeometry((1,) * 3, (2,) * 3, (1, 0, 0), (3, 1, 1)),
    "one-tap-up": ConvGeometry((1,) * 3, (2,) * 3, (0,) * 3, (1,) * 3, transposed=True),
}


def scatter(in_sites, out_sites, geometry: ConvGeometry, out_index, module):
    table, repeats = module.scatter_table(
        in_sites.coords, geometry.offsets, geometry.stride, not geometry.transposed,
        out_index, in_sites.grid, out_sites.grid, out_sites.num_rows,
    )  # fmt: skip
    return NeighborTable(*table), bool(repeats)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_scatter_table(triton_device, geometry, kind):
    assert geometry.max_outputs_per_input == 1
    in_sites = draw(250, geometry.ndim, kind, triton_device)
    out_sites = some_outputs(in_sites, geometry, kind)
    table, repeats = scatter(in_sites, out_sites, geometry, index_of(out_sites, kind), kernels)
    assert repeats == (len(reaching(in_sites, table)) > (table.rows >= 0).sum())
    expected = sorted(expected_triples(in_sites, out_sites, geometry))
    assert expected, "a test of nothing"
    assert sorted(table_triples(table)) == expected
    check_invert(table, in_sites.num_rows, geometry)

    on_cpu = ActiveSites(out_sites.coords.cpu(), out_sites.grid)
    in_on_cpu = ActiveSites(in_sites.coords.cpu(), in_sites.grid)
    also, also_repeats = scatter(in_on_cpu, on_cpu, geometry, on_cpu.index, eager)
    assert torch.equal(also.rows, table.rows.cpu())
    assert also_repeats == repeats


def reaching(sites: ActiveSites, table: NeighborTable) -> torch.Tensor:
    """Return the rows whose cell is in the table."""
    keys = sites.grid.keys(sites.coords)
    return torch.nonzero(torch.isin(keys, keys[table.rows[table.rows >= 0].long()]))


@pytest.mark.parametrize(("n_in", "n_out"), [(0, 9), (9, 0), (0, 0), (1, 1)])
def test_scatter_table_of_few_rows(triton_device, n_in, n_out):
    in_sites, out_sites = (draw(n, 3, "pages", triton_device) for n in (n_in, n_out))
    table, _ = scatter(in_sites, out_sites, HALVE, index_of(out_sites, "pages"), kernels)
    assert table.rows.shape == (8, n_out)
    expected = sorted(expected_triples(in_sites, out_sites, HALVE))
    assert sorted(table_triples(table)) == expected
    check_invert(table, n_in, HALVE)


def test_repeats_that_reach_nothing_are_not_told(triton_device):
    """The last cell of an odd extent is in no window."""
    coords = torch.tensor([[0, 0], [0, 4], [0, 4], [0, 2]], dtype=torch.int32, device=triton_device)
    geometry = ConvGeometry((2,), (2,), (0,), (1,))
    in_sites = ActiveSites(coords, Grid((0,), (5,), 1))
    out_sites = ActiveSites(coords[:1], Grid((0,), (2,), 1))
    index = index_of(out_sites, "pages")
    assert not scatter(in_sites, out_sites, geometry, index, kernels)[1]
    in_sites = ActiveSites(coords[[0, 3, 0]], in_sites.grid)
    assert scatter(in_sites, out_sites, geometry, index, kernels)[1]


def test_columns_in_order_of_masks(triton_device, monkeypatch):
    in_sites = draw(150, 3, "pages", triton_device)
    out_sites = some_outputs(in_sites, HALVE, "pages")
    index = index_of(out_sites, "pages")
    plain, _ = scatter(in_sites, out_sites, HALVE, index, kernels)
    monkeypatch.setattr(_column_order, "MIN_ROWS_TO_ORDER", 1)
    ordered, _ = scatter(in_sites, out_sites, HALVE, index, kernels)
    assert sorted(table_triples(ordered)) == sorted(table_triples(plain))
    masks = ordered.mask[0].tolist()
    assert 1 + sum(a != b for a, b in itertools.pairwise(masks)) == len(set(masks))
    check_invert(ordered, in_sites.num_rows, HALVE)


def test_keys_beyond_int32(triton_device):
    rows = [[0, 0, -(2**30)], [0, 3, 4 - 2**30], [1, 2**28, 2**30 - 3]]
    coords = torch.tensor(rows, dtype=torch.int32)
    geometry = ConvGeometry((2, 2), (2, 4), (0, 0), (1, 1))
    in_sites = ActiveSites(coords.to(triton_device), Grid.around(coords))
    outs = torch.div(coords[1:], torch.tensor([1, 2, 4]), rounding_mode="floor").int()
    out_sites = ActiveSites(outs.to(triton_device), Grid.around(outs))
    table, _ = scatter(in_sites, out_sites, geometry, index_of(out_sites, "sorted"), kernels)
    expected = sorted(expected_triples(in_sites, out_sites, geometry))
    assert len(expected) == 2
    assert sorted(table_triples(table)) == expected


def test_windows_that_overlap_are_refused(triton_device):
    sites = random_sites(9, device=triton_device)
    geometry = ConvGeometry((3,) * 3, (2,) * 3, (1,) * 3, (1,) * 3)
    with pytest.raises(ValueError, match="up to 8 outputs"):
        scatter(sites, sites, geometry, sites.index, kernels)
