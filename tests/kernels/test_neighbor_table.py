"""Neighbour tables: Triton against brute force and against the torch launchers."""

import functools
import itertools
import operator
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

from tritonspconv.kernels.triton import _column_order
from tritonspconv.kernels.triton import neighbor_table as kernels
from tritonspconv.kernels.triton import sites as site_kernels
from tritonspconv.kernels.triton.invert_table import invert_table

KINDS = ["cells", "pages", "sorted", "generated"]
SUBM = {
    "1d-k3": ConvGeometry.submanifold((3,), (1,)),
    "2d-k3x5": ConvGeometry.submanifold((3, 5), (2, 1)),
    "2d-even": ConvGeometry.submanifold((2, 4), (1, 1)),
    "3d-k3": ConvGeometry.submanifold((3,) * 3, (1,) * 3),
    "3d-k5": ConvGeometry.submanifold((5,) * 3, (1,) * 3),
    "3d-k5-dilated": ConvGeometry.submanifold((5,) * 3, (2, 1, 3), "first_axis_fastest"),
    "3d-first-axis": ConvGeometry.submanifold((3, 2, 1), (1,) * 3, "first_axis_fastest"),
    "4d-k3": ConvGeometry.submanifold((3,) * 4, (1,) * 4),
    "2d-k13x5": ConvGeometry.submanifold((13, 5), (1, 1)),
    "2d-k2x37": ConvGeometry.submanifold((2, 37), (1, 1)),
    "pointwise": ConvGeometry.submanifold((1, 1, 1), (1, 1, 1)),
}
REACH = {
    "1d": ConvGeometry((4,), (3,), (2,), (1,)),
    "2d-k37x2": ConvGeometry((37, 2), (2, 1), (9, 0), (1, 1)),
    "2d-dilated": ConvGeometry((3, 2), (2, 1), (1, 0), (2, 3)),
    "3d-k3s2": ConvGeometry((3,) * 3, (2,) * 3, (1,) * 3, (1,) * 3),
    "3d-dilated": ConvGeometry((2, 3, 3), (2, 1, 2), (1, 2, 0), (3, 2, 1)),
    "3d-k4": ConvGeometry((4,) * 3, (2,) * 3, (1,) * 3, (1,) * 3),
    "3d-k5s2": ConvGeometry((5,) * 3, (2,) * 3, (2,) * 3, (1, 1, 2)),
    "3d-up": ConvGeometry((3,) * 3, (2,) * 3, (1,) * 3, (1,) * 3, transposed=True),
    "4d-up": ConvGeometry((2,) * 4, (2,) * 4, (0,) * 4, (1,) * 4, transposed=True),
    "stride-beyond-kernel": ConvGeometry((1, 2, 1), (3, 3, 2), (0, -1, 0), (1,) * 3),
}


def index_of(sites: ActiveSites, kind: str) -> SiteIndex:
    grid = sites.grid
    if kind == "generated":
        zero, unit = ((0,) * grid.ndim,), (1,) * grid.ndim
        coords, index, *_ = site_kernels.reached_sites(sites.coords, zero, unit, False, grid, grid)
        assert torch.equal(coords, sites.coords), "slots are rows where rows ascend"
        return index
    shift = {"cells": 0, "pages": 3, "sorted": None}[kind]
    with mock.patch.object(site_kernels, "_choose_shift", return_value=shift):
        return site_kernels.build_index(sites.coords, grid)


def draw(n: int, ndim: int, kind: str, device, **options) -> ActiveSites:
    options.setdefault("extent", {1: 300, 2: 20, 3: 7}.get(ndim, 4))
    if kind == "generated":
        options.setdefault("lower", -3)
        return random_sites(n, ndim, bounded=False, ascending=True, device=device, **options)
    return random_sites(n, ndim, repeats=n // 10, outside=n // 12, device=device, **options)


def lookup(sites: ActiveSites, geometry: ConvGeometry, kind: str) -> NeighborTable:
    index = index_of(sites, kind)
    return NeighborTable(
        *kernels.lookup_table(sites.coords, geometry.offsets, index, sites.grid)
    )  # fmt: skip


def reach(in_sites, out_sites, geometry: ConvGeometry, indices, module) -> NeighborTable:
    in_index, out_index = indices
    return NeighborTable(
        *module.reach_table(
            out_sites.coords, geometry.offsets, geometry.stride, not geometry.transposed,
            in_index, in_sites.grid, out_sites.grid, out_index,
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", SUBM.values(), ids=SUBM)
def test_lookup_table(triton_device, geometry, kind):
    sites = draw(100, geometry.ndim, kind, triton_device)
    table = lookup(sites, geometry, kind)
    assert sorted(table_triples(table)) == sorted(expected_triples(sites, sites, geometry))
    check_invert(table, sites.num_rows, geometry)


@pytest.mark.parametrize("kind", ["pages", "sorted"])
@pytest.mark.parametrize("n", [0, 1, 63, 65])
def test_lookup_table_of_few_rows(triton_device, n, kind):
    geometry = SUBM["3d-k3"]
    sites = draw(n, 3, kind, triton_device)
    table = lookup(sites, geometry, kind)
    assert sorted(table_triples(table)) == sorted(expected_triples(sites, sites, geometry))
    check_invert(table, n, geometry)


@pytest.mark.parametrize("kind", ["pages", "generated"])
def test_lookup_table_of_distinct_rows(triton_device, kind):
    """Rows outside the grid see themselves, with and without a search for repeats."""
    geometry = SUBM["3d-k3"]
    sites = random_sites(
        100, extent=7, outside=9 * (kind == "pages"), bounded=kind == "pages",
        ascending=kind == "generated", device=triton_device,
    )  # fmt: skip
    index = index_of(sites, kind)
    looked, told = (
        kernels.lookup_table(sites.coords, geometry.offsets, index, sites.grid, distinct=distinct)
        for distinct in (False, True)
    )
    pairs = zip(looked[:3], told[:3], strict=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in pairs)


def check_invert(table: NeighborTable, n_other: int, geometry: ConvGeometry) -> None:
    inverse = invert_table(table.rows, table.order, n_other, geometry.offsets)
    assert inverse[0].shape == (geometry.kernel_volume, n_other)
    assert sorted(swapped(table_triples(NeighborTable(*inverse)))) == sorted(table_triples(table))


def check_reverse(table, in_sites, out_sites, geometry, kind, expected) -> None:
    in_index, out_index = index_of(in_sites, kind), index_of(out_sites, kind)
    for own_index in (in_index, None) if kind == "generated" else (in_index,):
        reverse = kernels.reverse_table(
            table.rows, in_sites.coords, geometry.offsets, geometry.stride,
            not geometry.transposed, own_index, out_index, in_sites.grid, out_sites.grid,
            table.order,
        )  # fmt: skip
        assert sorted(swapped(table_triples(NeighborTable(*reverse)))) == expected


def some_outputs(sites: ActiveSites, geometry: ConvGeometry, kind: str) -> ActiveSites:
    """Return most reached sites; given sites also have repeats and rows outside the grid."""
    coords = reference.output_sites(
        sites.coords,
        *fields(geometry),
        transposed=geometry.transposed,
        in_box=box_of(sites.grid),
    )
    grid = Grid.around(coords)
    coords = coords[torch.rand(len(coords)) < 0.7]
    if kind != "generated":
        # The grid is smaller than the box around the rows.
        grid = Grid(grid.lower, tuple(max(n - 1, 1) for n in grid.shape), grid.batch_size)
        coords = torch.cat([coords, coords[:5]])[torch.randperm(len(coords) + len(coords[:5]))]
    return ActiveSites(coords.to(sites.device), grid)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", REACH.values(), ids=REACH)
def test_reach_table(triton_device, geometry, kind):
    n = 160 if geometry.kernel_volume < 4 else 80
    in_sites = draw(n, geometry.ndim, kind, triton_device)
    out_sites = some_outputs(in_sites, geometry, kind)
    out_index = None if kind == "generated" else index_of(out_sites, kind)
    indices = index_of(in_sites, kind), out_index
    table = reach(in_sites, out_sites, geometry, indices, kernels)
    expected = sorted(expected_triples(in_sites, out_sites, geometry))
    assert expected, "a test of nothing"
    assert sorted(table_triples(table)) == expected
    check_invert(table, in_sites.num_rows, geometry)
    check_reverse(table, in_sites, out_sites, geometry, kind, expected)

    on_cpu = ActiveSites(out_sites.coords.cpu(), out_sites.grid)
    in_on_cpu = ActiveSites(in_sites.coords.cpu(), in_sites.grid)
    also = reach(in_on_cpu, on_cpu, geometry, (in_on_cpu.index, on_cpu.index), eager)
    assert sorted(table_triples(also)) == expected


@pytest.mark.parametrize(("n_in", "n_out"), [(0, 9), (9, 0), (0, 0), (1, 1)])
def test_reach_table_of_few_rows(triton_device, n_in, n_out):
    geometry = REACH["3d-k3s2"]
    in_sites, out_sites = (draw(n, 3, "pages", triton_device) for n in (n_in, n_out))
    indices = index_of(in_sites, "pages"), index_of(out_sites, "pages")
    table = reach(in_sites, out_sites, geometry, indices, kernels)
    expected = sorted(expected_triples(in_sites, out_sites, geometry))
    assert sorted(table_triples(table)) == expected
    check_invert(table, n_in, geometry)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", [SUBM["2d-even"], SUBM["3d-k3"]], ids=["8-taps", "27-taps"])
def test_columns_in_order_of_masks(triton_device, geometry, kind, monkeypatch):
    """Ordering changes only the columns, and puts equal masks side by side."""
    sites = draw(150, geometry.ndim, kind, triton_device)
    plain = lookup(sites, geometry, kind)
    assert plain.order is None
    monkeypatch.setattr(_column_order, "MIN_ROWS_TO_ORDER", 1)
    ordered = lookup(sites, geometry, kind)
    assert sorted(table_triples(ordered)) == sorted(table_triples(plain))
    assert taps_of_tiles(ordered.mask[0]) < 0.9 * taps_of_tiles(plain.mask[0])
    if geometry.kernel_volume <= 16:
        masks = ordered.mask[0].tolist()
        runs = 1 + sum(a != b for a, b in itertools.pairwise(masks))
        assert runs == len(set(masks))
    check_invert(ordered, sites.num_rows, geometry)


def taps_of_tiles(masks: torch.Tensor, columns: int = 8) -> int:
    """Return the number of taps that occur in a tile of columns, summed over all tiles."""
    tiles = [masks[i : i + columns].tolist() for i in range(0, len(masks), columns)]
    return sum((functools.reduce(operator.or_, tile) & 2**32 - 1).bit_count() for tile in tiles)


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
        table = lookup(sites, geometry, "sorted")
        expected = sorted(expected_triples(sites, sites, geometry))
        assert len(expected) == len(coords) + 2
        assert sorted(table_triples(table)) == expected


def test_keys_are_not_cut_to_int32(triton_device):
    """Two sites whose keys differ by 2**32 are not taken for each other."""
    grid = Grid((0, 0), (2**17, 2**16), 1)
    coords = torch.tensor([[0, 0, 5], [0, 2**16, 6]], dtype=torch.int32)
    assert grid.keys(coords).diff() == 2**32 + 1
    coords = coords.to(triton_device)
    # The size of the blocks suits few sites; with smaller blocks the interpreter takes a minute.
    index = site_kernels.build_index(coords, grid)
    assert index.kind == "pages"
    offsets = ConvGeometry.submanifold((3, 3), (1, 1)).offsets
    table = NeighborTable(*kernels.lookup_table(coords, offsets, index, grid))
    assert sorted(table_triples(table)) == [(0, 0, 4), (1, 1, 4)]
