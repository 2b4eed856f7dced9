"""Site index and generated sites: Triton against brute force and against the torch launchers."""

import pytest
import torch

from tests._oracle import box_of, fields
from tritonspconv import reference
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernels.eager import sites as eager
from tritonspconv.testing import random_sites

pytest.importorskip("triton", reason="Triton is not installed")

from tritonspconv.kernels.triton import sites as kernels

DOWN = ConvGeometry((3, 2), (2, 3), (1, 0), (1, 2))
UP = ConvGeometry((2, 3), (2, 1), (0, 1), (1, 1), transposed=True)


def launch(module, sites, geometry, grid, own_grid=None):
    return module.reached_sites(
        sites.coords, geometry.offsets, geometry.stride, not geometry.transposed,
        grid, own_grid,
    )  # fmt: skip


def unbounded_grid(sites, geometry):
    return sites.grid.with_box(*geometry.output_range(sites.grid.lower, sites.grid.upper))


@pytest.mark.parametrize("geometry", [DOWN, UP], ids=["divide", "multiply"])
@pytest.mark.parametrize("n", [0, 1, 63, 150])
@pytest.mark.parametrize("lower", [0, -7])
def test_reached_sites(triton_device, n, geometry, lower):
    sites = random_sites(
        n, 2, extent=(9, 20), lower=lower, bounded=False, repeats=n // 10, device=triton_device
    )
    grid = unbounded_grid(sites, geometry)
    coords, index = launch(kernels, sites, geometry, grid)
    expected = reference.output_sites(
        sites.coords, *fields(geometry), transposed=geometry.transposed
    )
    assert coords.dtype == torch.int32
    assert coords.cpu().tolist() == expected.tolist()
    assert torch.equal(coords.cpu(), launch(eager, sites, geometry, grid)[0].cpu())
    assert index.kind == ("bitmap" if n else "hash")


@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
def test_reached_sites_in_every_dimension(triton_device, ndim):
    sites = random_sites(
        40, ndim, extent=40 if ndim == 1 else 6, lower=-3, bounded=False, device=triton_device
    )
    geometry = ConvGeometry((3,) * ndim, (2,) * ndim, (1,) * ndim, (1,) * ndim)
    coords, _ = launch(kernels, sites, geometry, unbounded_grid(sites, geometry))
    assert coords.tolist() == reference.output_sites(sites.coords, *fields(geometry)).tolist()


def test_reached_sites_outside_the_target_are_left_out(triton_device):
    sites = random_sites(60, 2, extent=10, batch_size=4, device=triton_device)
    grid = random_sites(1, 2, extent=(2, 3), lower=(1, 2), batch_size=2).grid
    coords, _ = launch(kernels, sites, DOWN, grid)
    expected = reference.output_sites(sites.coords, *fields(DOWN), out_box=box_of(grid))
    assert coords.tolist() == expected.tolist()


@pytest.mark.parametrize("geometry", [DOWN, UP], ids=["divide", "multiply"])
def test_rows_outside_their_own_grid_reach_nothing(triton_device, geometry):
    sites = random_sites(60, 2, extent=6, outside=20, device=triton_device)
    grid = sites.grid.with_box((-9, -9), (30, 30))
    own_grid = sites.grid
    coords, _ = launch(kernels, sites, geometry, grid, own_grid)
    expected = reference.output_sites(
        sites.coords,
        *fields(geometry),
        transposed=geometry.transposed,
        in_box=box_of(sites.grid),
    )
    assert coords.tolist() == expected.tolist()
    assert launch(eager, sites, geometry, grid, own_grid)[0].tolist() == expected.tolist()


def test_reached_sites_of_a_grid_beyond_the_bitmap(triton_device, monkeypatch):
    sites = random_sites(60, 2, extent=10, bounded=False, device=triton_device)
    grid = unbounded_grid(sites, DOWN)
    small, _ = launch(kernels, sites, DOWN, grid)
    monkeypatch.setattr(kernels, "_MAX_BITMAP_CELLS", 8)
    large, index = launch(kernels, sites, DOWN, grid)
    assert torch.equal(large, small)
    assert index.kind == "hash"


def test_more_cells_than_one_block_of_words(triton_device):
    """Row numbers are carried from block to block: 64 cells a word, 2048 words a block."""
    sites = random_sites(200, 2, extent=(400, 500), batch_size=2, device=triton_device)
    same = ConvGeometry((1, 1), (1, 1), (0, 0), (1, 1))
    coords, index = launch(kernels, sites, same, sites.grid)
    assert coords.tolist() == sorted(sites.coords.tolist())
    assert len(index.table) > 2 * 2048


@pytest.mark.parametrize("n", [0, 1, 2, 64, 65, 200])
def test_hash_index_holds_the_lowest_row_of_each_site(triton_device, n):
    repeats, outside = n // 4, n // 8
    sites = random_sites(n, 3, extent=7, repeats=repeats, outside=outside, device=triton_device)
    grid = sites.grid
    index = kernels.build_index(sites.coords, grid)
    assert index.kind == "hash"
    slots = index.table.cpu()
    assert len(slots) >= 2 * n
    used = slots[slots[:, 0] >= 0]
    found = {int(key): ~int(not_row) for key, not_row in used}
    expected: dict[int, int] = {}
    for row, key in enumerate(grid.keys(sites.coords).tolist()):
        if key >= 0:
            expected.setdefault(key, row)
    assert found == expected
