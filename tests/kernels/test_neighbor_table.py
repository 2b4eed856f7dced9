"""Neighbour tables: Triton against brute force and against the torch launchers."""

import itertools
from unittest import mock

import pytest
import torch

from tests._oracle import box_of, expected_triples, fields, swapped, table_triples
from tritonspconv import reference
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import NeighborTable
from tritonspconv.kernels.eager import neighbor_table as eager
from tritonspconv.kernels.index import SiteIndex
from tritonspconv.testing import random_sites

pytest.importorskip("triton", reason="Triton is not installed")

from tritonspconv.kernels.triton import neighbor_table as kernels
from tritonspconv.kernels.triton import sites as site_kernels

SUBM = {
    "1d-k3": ConvGeometry.submanifold((3,), (1,)),
    "2d-k3x5": ConvGeometry.submanifold((3, 5), (2, 1)),
    "2d-even": ConvGeometry.submanifold((2, 4), (1, 1)),
    "3d-k3": ConvGeometry.submanifold((3,) * 3, (1,) * 3),
    "3d-k5": ConvGeometry.submanifold((5,) * 3, (1,) * 3),
    "3d-first-axis": ConvGeometry.submanifold((3, 2, 1), (1,) * 3, "first_axis_fastest"),
    "4d-k3": ConvGeometry.submanifold((3,) * 4, (1,) * 4),
    "pointwise": ConvGeometry.submanifold((1, 1, 1), (1, 1, 1)),
}
REACH = {
    "1d": ConvGeometry((4,), (3,), (2,), (1,)),
    "2d-dilated": ConvGeometry((3, 2), (2, 1), (1, 0), (2, 3)),
    "3d-k3s2": ConvGeometry((3,) * 3, (2,) * 3, (1,) * 3, (1,) * 3),
    "3d-k4": ConvGeometry((4,) * 3, (2,) * 3, (1,) * 3, (1,) * 3),
    "3d-up": ConvGeometry((3,) * 3, (2,) * 3, (1,) * 3, (1,) * 3, transposed=True),
    "4d-up": ConvGeometry((2,) * 4, (2,) * 4, (0,) * 4, (1,) * 4, transposed=True),
    "stride-beyond-kernel": ConvGeometry((1, 2, 1), (3, 3, 2), (0, -1, 0), (1,) * 3),
}


def index_of(sites: ActiveSites, kind: str) -> SiteIndex:
    grid = sites.grid
    if kind != "bitmap":
        least = 0 if kind == "ranked" else 2**31
        with mock.patch.object(site_kernels, "_MIN_BITMAP_ROWS", least):
            return site_kernels.build_index(sites.coords, grid)
    zero = ((0,) * grid.ndim,)
    coords, index = site_kernels.reached_sites(sites.coords, zero, (1,) * grid.ndim, False, grid)
    assert torch.equal(coords, sites.coords), "a bitmap is for rows that ascend"
    return index


def draw(n: int, ndim: int, kind: str, device, **options) -> ActiveSites:
    options.setdefault("extent", {1: 300, 2: 20, 3: 7}.get(ndim, 4))
    if kind == "bitmap":
        options.setdefault("lower", -3)
        return random_sites(
            n, ndim, bounded=False, ascending=True, device=device, **options
        )  # fmt: skip
    return random_sites(n, ndim, repeats=n // 10, outside=n // 12, device=device, **options)


def lookup(sites: ActiveSites, geometry: ConvGeometry, kind: str) -> NeighborTable:
    grid = sites.grid
    return NeighborTable(
        *kernels.lookup_table(
            sites.coords, geometry.offsets, index_of(sites, kind),
            grid,
        )
    )  # fmt: skip


def reach(in_sites, out_sites, geometry: ConvGeometry, index: SiteIndex, module) -> NeighborTable:
    grid = out_sites.grid
    own_grid = in_sites.grid if in_sites.grid.bounded else None
    return NeighborTable(
        *module.reach_table(
            in_sites.coords, out_sites.num_rows, geometry.offsets, geometry.stride,
            not geometry.transposed, index, grid, own_grid,
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["hash", "ranked", "bitmap"])
@pytest.mark.parametrize("geometry", SUBM.values(), ids=SUBM)
def test_lookup_table(triton_device, geometry, kind):
    sites = draw(100, geometry.ndim, kind, triton_device)
    table = lookup(sites, geometry, kind)
    assert sorted(table_triples(table)) == sorted(expected_triples(sites, sites, geometry))
    check_invert(table, sites.num_rows, geometry)


@pytest.mark.parametrize("n", [0, 1, 63, 65])
def test_lookup_table_of_few_rows(triton_device, n):
    geometry = SUBM["3d-k3"]
    sites = draw(n, 3, "hash", triton_device)
    table = lookup(sites, geometry, "hash")
    assert sorted(table_triples(table)) == sorted(expected_triples(sites, sites, geometry))
    check_invert(table, n, geometry)


def check_invert(table: NeighborTable, n_other: int, geometry: ConvGeometry) -> None:
    inverse = kernels.invert_table(table.rows, table.order, n_other, geometry.offsets)
    assert inverse[0].shape == (geometry.kernel_volume, n_other)
    assert sorted(swapped(table_triples(NeighborTable(*inverse)))) == sorted(table_triples(table))


def some_outputs(sites: ActiveSites, geometry: ConvGeometry, kind: str) -> ActiveSites:
    """Most of the sites that are reached; for a hash also repeats and rows outside the grid."""
    coords = reference.output_sites(
        sites.coords,
        *fields(geometry),
        transposed=geometry.transposed,
        in_box=box_of(sites.grid),
    )
    grid = Grid.around(coords)
    coords = coords[torch.rand(len(coords)) < 0.7]
    if kind != "bitmap":
        # Smaller than the box around the rows.
        grid = Grid(grid.lower, tuple(max(n - 1, 1) for n in grid.shape), grid.batch_size)
        coords = torch.cat([coords, coords[:5]])[torch.randperm(len(coords) + len(coords[:5]))]
    return ActiveSites(coords.to(sites.device), grid)


@pytest.mark.parametrize("kind", ["hash", "ranked", "bitmap"])
@pytest.mark.parametrize("geometry", REACH.values(), ids=REACH)
def test_reach_table(triton_device, geometry, kind):
    in_sites = draw(80, geometry.ndim, kind, triton_device)
    out_sites = some_outputs(in_sites, geometry, kind)
    table = reach(in_sites, out_sites, geometry, index_of(out_sites, kind), kernels)
    expected = sorted(expected_triples(in_sites, out_sites, geometry))
    assert expected, "a test of nothing"
    assert sorted(table_triples(table)) == expected
    check_invert(table, in_sites.num_rows, geometry)

    on_cpu = ActiveSites(out_sites.coords.cpu(), out_sites.grid)
    in_on_cpu = ActiveSites(in_sites.coords.cpu(), in_sites.grid)
    also = reach(in_on_cpu, on_cpu, geometry, on_cpu.index, eager)
    assert sorted(table_triples(also)) == expected


@pytest.mark.parametrize(("n_in", "n_out"), [(0, 9), (9, 0), (0, 0), (1, 1)])
def test_reach_table_of_few_rows(triton_device, n_in, n_out):
    geometry = REACH["3d-k3s2"]
    in_sites, out_sites = (draw(n, 3, "hash", triton_device) for n in (n_in, n_out))
    table = reach(in_sites, out_sites, geometry, index_of(out_sites, "hash"), kernels)
    expected = sorted(expected_triples(in_sites, out_sites, geometry))
    assert sorted(table_triples(table)) == expected
    check_invert(table, n_in, geometry)


@pytest.mark.parametrize("geometry", [SUBM["3d-k3"], SUBM["2d-even"]], ids=["3x3x3", "even"])
def test_columns_in_order_of_masks(triton_device, geometry, monkeypatch):
    """Ordering changes nothing but the columns, and puts equal masks side by side."""
    sites = draw(150, geometry.ndim, "hash", triton_device)
    plain = lookup(sites, geometry, "hash")
    assert plain.order is None
    monkeypatch.setattr(kernels, "_MIN_ROWS_TO_ORDER", 1)
    ordered = lookup(sites, geometry, "hash")
    assert sorted(table_triples(ordered)) == sorted(table_triples(plain))
    masks = ordered.mask[0].tolist()
    runs = 1 + sum(a != b for a, b in itertools.pairwise(masks))
    assert runs == len(set(masks))
    check_invert(ordered, sites.num_rows, geometry)


def test_keys_beyond_int32(triton_device):
    """A grid of 2**60 cells, and coordinates at both ends of int32."""
    ends = torch.iinfo(torch.int32)
    far = torch.tensor([[0, ends.min], [0, ends.max], [0, ends.max - 2]], dtype=torch.int32)
    wide = torch.tensor(
        [[0, -(2**19), 2**19, 7], [0, -(2**19), 2**19 - 1, 8], [1, 2**19, -(2**19), 2**19]],
        dtype=torch.int32,
    )
    for coords, geometry in (
        (far, ConvGeometry.submanifold((5,), (1,))),
        (wide, ConvGeometry.submanifold((3,) * 3, (1,) * 3)),
    ):
        sites = ActiveSites(coords.to(triton_device), Grid.around(coords))
        table = lookup(sites, geometry, "hash")
        expected = sorted(expected_triples(sites, sites, geometry))
        assert len(expected) == len(coords) + 2
        assert sorted(table_triples(table)) == expected


def test_keys_are_not_cut_to_int32(triton_device):
    """Two sites whose keys differ by 2**32 are not one another's stand-ins."""
    grid = Grid((0, 0), (2**17, 2**16), 1)
    coords = torch.tensor([[0, 0, 5], [0, 2**16, 6]], dtype=torch.int32)
    assert grid.keys(coords).diff() == 2**32 + 1
    sites = ActiveSites(coords.to(triton_device), grid)
    table = lookup(sites, ConvGeometry.submanifold((3, 3), (1, 1)), "hash")
    assert sorted(table_triples(table)) == [(0, 0, 4), (1, 1, 4)]
