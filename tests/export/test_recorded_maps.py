"""Maps and operations of fixed shapes equal the brute-force reference, and read no padding.

Padding features are NaN, so a result shows if one is read.
"""

import pytest
import torch
from torch import Tensor

from tests._oracle import expected_out_coords, expected_triples
from tritonspconv import ops, reference
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.coords.row_tensor import RowBounds, plain
from tritonspconv.export._plan import RecordedPlan
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import kernel_map
from tritonspconv.kernel_map.build import output_grid

GEOMETRIES = {
    "subm": ConvGeometry.submanifold((3, 3, 3), (1, 1, 1)),
    "subm-even": ConvGeometry.submanifold((2, 4, 3), (1, 1, 1)),
    "subm-far": ConvGeometry.submanifold((3, 3), (1, 20)),
    "subm-4d": ConvGeometry.submanifold((3, 1, 3, 2), (1, 1, 1, 1)),
    "line": ConvGeometry((3,), (2,), (1,), (1,)),
    "down-3": ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "down-2": ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1)),
    "down-gaps": ConvGeometry((3, 1, 2), (2, 3, 1), (1, 0, 4), (2, 1, 3)),
    "up-3": ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), transposed=True),
    "up-2": ConvGeometry((2, 2), (2, 2), (0, 0), (1, 1), transposed=True),
    "cells": ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), sites="cells"),
}
SIZES = {"0": 0, "1": 1, "45": 45}


def bounded(coords: Tensor, grid: Grid, capacity: int, levels: list[int]) -> ActiveSites:
    """Return sites with room for ``capacity`` rows, in a recorded run."""
    padding = coords.new_full((capacity - len(coords), coords.shape[1]), -1)
    plan = RecordedPlan(levels, grid, coords.device)
    bounds = RowBounds(torch.tensor(len(coords), device=coords.device), plan)
    return ActiveSites(torch.cat([coords, padding]), grid, bounds=bounds)


def padded(feats: Tensor, capacity: int) -> Tensor:
    """Return ``feats`` with rows of NaN behind them."""
    return torch.cat([feats, feats.new_full((capacity - len(feats), feats.shape[1]), torch.nan)])


def scene(geometry: ConvGeometry, n: int, device: torch.device, *, bounded: bool = True):
    """Return distinct random coordinates of two samples and their grid."""
    ndim = geometry.ndim
    extent = {1: 60, 2: 25, 3: 7, 4: 5}[ndim]
    lower = (0,) * ndim if bounded else tuple(range(-9, -9 + ndim))
    grid = Grid(lower, (extent,) * ndim, 2, bounded)
    cells = torch.randperm(grid.num_cells, device=device)[:n]
    return grid.coords(cells), grid


def relation(exact: ActiveSites, geometry: ConvGeometry):
    """Return the reference's output coordinates, and its triples."""
    coords = expected_out_coords(exact, geometry)
    grid = exact.grid if geometry.sites == "same" else output_grid(exact.grid, geometry)
    out_sites = ActiveSites(coords.to(exact.device), grid)
    return coords, set(expected_triples(exact, out_sites, geometry))


@pytest.mark.parametrize("n", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("bounded_grid", [True, False], ids=["box", "unbounded"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_map_and_its_inverse_are_the_relation(
    geometry: ConvGeometry, bounded_grid: bool, n: int, device: torch.device
) -> None:
    coords, grid = scene(geometry, n, device, bounded=bounded_grid)
    exact = ActiveSites(coords, grid)
    sites = bounded(coords, grid, n + 7, [2000])
    found = kernel_map(sites, geometry)
    expected, triples = relation(exact, geometry)
    count = int(found.out_count)
    assert torch.equal(found.out_sites.coords[:count].cpu(), expected.cpu())
    assert bool((found.out_sites.coords[count:, 0] == -1).all())
    assert triples_of(found.out_table) == triples
    inverse = {(i, o, v) for o, i, v in triples_of(found.inverse().out_table)}
    assert inverse == triples
    assert not any(int(fault) for fault in sites.bounds.plan.faults())


def triples_of(table) -> set[tuple[int, int, int]]:
    """Return (input, output, tap) of each entry."""
    tap, column = torch.nonzero(table.rows >= 0, as_tuple=True)
    rows, volume = table.rows[tap, column], len(table.rows)
    tap = volume - 1 - tap if table.mirrored else tap
    return set(zip(rows.tolist(), column.tolist(), tap.tolist(), strict=True))


@pytest.mark.parametrize("n", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_convolution_is_that_of_the_reference(
    geometry: ConvGeometry, inverse: bool, n: int, device: torch.device
) -> None:
    coords, grid = scene(geometry, n, device)
    exact = ActiveSites(coords, grid)
    expected_sites, triples = relation(exact, geometry)
    sites = bounded(coords, grid, n + 7, [2000])
    found = kernel_map(sites, geometry)
    n_in, n_out = n, len(expected_sites)
    if inverse:
        found, n_in, n_out = found.inverse(), n_out, n
        triples = {(o, i, v) for i, o, v in triples}
    weight = torch.randn(geometry.kernel_volume, 3, 5, dtype=torch.float64, device=device)
    bias = torch.randn(5, dtype=torch.float64, device=device)
    feats = torch.randn(n_in, 3, dtype=torch.float64, device=device)
    rows = found.in_sites.as_rows(padded(feats, found.n_in))
    with torch.no_grad():
        out = ops.sparse_conv(rows, weight, found, bias)
    expected = reference.conv(feats.cpu(), weight.cpu(), triples, n_out, bias.cpu())
    torch.testing.assert_close(plain(out)[:n_out].cpu(), expected)


@pytest.mark.parametrize("mode", ["max", "avg", "sum"])
@pytest.mark.parametrize("name", ["subm", "down-3", "down-2"])
def test_a_pool_is_that_of_the_reference(name: str, mode: str, device: torch.device) -> None:
    geometry = GEOMETRIES[name]
    coords, grid = scene(geometry, 45, device)
    exact = ActiveSites(coords, grid)
    expected_sites, triples = relation(exact, geometry)
    found = kernel_map(bounded(coords, grid, 60, [2000]), geometry)
    feats = torch.randn(45, 3, dtype=torch.float64, device=device)
    rows = found.in_sites.as_rows(padded(feats, 60))
    for floor in (None, 0.25) if mode == "max" else (None,):
        out = ops.sparse_pool(rows, found, mode, floor=floor)
        expected = reference.pool(feats.cpu(), triples, len(expected_sites), mode, floor=floor)
        found_rows = plain(out)[: len(expected_sites)].cpu()
        torch.testing.assert_close(found_rows, expected)


def test_nan_wins_a_maximum(device: torch.device) -> None:
    geometry = GEOMETRIES["down-3"]
    coords, grid = scene(geometry, 45, device)
    feats = torch.randn(45, 3, device=device)
    feats[3, 1] = torch.nan
    exact = kernel_map(ActiveSites(coords, grid), geometry)
    found = kernel_map(bounded(coords, grid, 60, [2000]), geometry)
    out = plain(ops.sparse_pool(found.in_sites.as_rows(padded(feats, 60)), found, floor=0.0))
    expected = ops.sparse_pool(feats, exact, floor=0.0)
    assert expected.isnan().any()
    assert torch.equal(out[: exact.n_out].nan_to_num(9.0), expected.nan_to_num(9.0))


@pytest.mark.parametrize("mode", ["max", "avg", "sum"])
def test_a_global_pool_is_that_of_the_reference(mode: str, device: torch.device) -> None:
    coords, grid = scene(GEOMETRIES["subm"], 45, device)
    coords = coords[coords[:, 0] == 1]
    sites = bounded(coords, grid, 60, [])
    feats = torch.randn(len(coords), 3, dtype=torch.float64, device=device)
    rows, batch = sites.as_rows(padded(feats, 60)), sites.as_rows(sites.coords)[:, 0]
    out = ops.global_pool(rows, batch, 2, mode)
    expected = reference.global_pool(feats.cpu(), coords[:, 0].cpu(), 2, mode)
    torch.testing.assert_close(out.cpu(), expected)
    back = plain(ops.global_broadcast(out, batch))[: len(coords)]
    assert torch.equal(back, out[1].expand_as(back))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_sums_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    geometry = GEOMETRIES["subm"]
    coords, grid = scene(geometry, 45, device)
    weight = torch.randn(27, 16, 8, device=device).to(dtype)
    feats = torch.randn(45, 16, device=device).to(dtype)
    sites = bounded(coords, grid, 60, [])
    out = plain(
        ops.sparse_conv(sites.as_rows(padded(feats, 60)), weight, kernel_map(sites, geometry))
    )
    expected = ops.sparse_conv(
        feats.float(), weight.float(), kernel_map(ActiveSites(coords, grid), geometry)
    )
    assert out.dtype == dtype
    torch.testing.assert_close(out[:45], expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_what_does_not_fit_is_counted(device: torch.device) -> None:
    geometry = GEOMETRIES["down-3"]
    coords, grid = scene(geometry, 45, device)
    full = len(expected_out_coords(ActiveSites(coords, grid), geometry))
    coords = torch.cat([coords, coords[5:8], coords[:1] + 100])
    sites = bounded(coords, grid, 60, [full - 4])
    found = kernel_map(sites, geometry)
    assert [int(fault) for fault in sites.bounds.plan.faults()] == [1, 3, 4]
    assert found.n_out == full - 4


def test_a_grid_beyond_int64_is_refused(device: torch.device) -> None:
    grid = Grid((0, 0, 0), (2**20, 2**20, 2**20), 2)
    coords = torch.zeros(1, 4, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="int64"):
        kernel_map(bounded(coords, grid, 2, []), GEOMETRIES["subm"])
