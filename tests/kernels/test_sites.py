"""Site index and generated sites: Triton against brute force and against the torch launchers."""

import itertools
import math

import pytest
import torch

from tests._oracle import box_of, fields
from tritonspconv import reference
from tritonspconv.coords import Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernels.eager import sites as eager
from tritonspconv.kernels.window import Box, reach_steps
from tritonspconv.testing import random_sites

pytest.importorskip("triton", reason="Triton is not installed")

from tritonspconv.kernels.triton import sites as kernels

DOWN = ConvGeometry((3, 2), (2, 3), (1, 0), (1, 2))
UP = ConvGeometry((2, 3), (2, 1), (0, 1), (1, 1), transposed=True)


def launch(module, sites, geometry, grid, own_grid=None):
    return module.reached_sites(
        sites.coords, geometry.offsets, geometry.stride, not geometry.transposed,
        grid, own_grid or sites.grid,
    )[:2]  # fmt: skip


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
    assert index.kind == ("bitmap" if n else "sorted")


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


@pytest.mark.parametrize("value", [None, 0, 1, -3])
@pytest.mark.parametrize("n", [0, 60])
def test_a_flag_is_read_with_the_number_of_sites(triton_device, n, value):
    sites = random_sites(n, 2, extent=10, bounded=False, device=triton_device)
    grid = unbounded_grid(sites, DOWN)
    flag = None if value is None else torch.tensor(value, device=triton_device)
    for module in (kernels, eager):
        arguments = sites.coords, DOWN.offsets, DOWN.stride, True, grid, sites.grid
        found = module.reached_sites(*arguments, flag)
        assert torch.equal(found.coords, launch(module, sites, DOWN, grid)[0])
        assert found.flag == (None if value is None else value != 0)


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
    monkeypatch.setattr(kernels, "_is_affordable", lambda size, n: False)
    large, index = launch(kernels, sites, DOWN, grid)
    assert torch.equal(large, small)
    assert index.kind == "sorted"


def test_more_cells_than_one_block_of_words(triton_device):
    """Row numbers are carried from block to block: 32 cells a word, 2048 words a block."""
    sites = random_sites(200, 2, extent=(400, 700), batch_size=2, device=triton_device)
    same = ConvGeometry((1, 1), (1, 1), (0, 0), (1, 1))
    coords, index = launch(kernels, sites, same, sites.grid)
    assert coords.tolist() == sorted(sites.coords.tolist())
    assert len(index.table) > 2 * 2048


@pytest.mark.parametrize("shift", [0, 3, 9])
@pytest.mark.parametrize("n", [0, 1, 2, 64, 65, 200])
def test_index_holds_the_lowest_row_of_each_site(triton_device, n, shift, monkeypatch):
    repeats, outside = n // 4, n // 8
    sites = random_sites(n, 3, extent=7, repeats=repeats, outside=outside, device=triton_device)
    check_index_of_blocks(sites, shift, repeats > 0, monkeypatch)


def test_index_of_more_blocks_than_one_program_counts(triton_device, monkeypatch):
    """32 blocks a word, 1024 words a program: blocks of several programs share no slot."""
    sites = random_sites(200, 2, extent=(700, 800), batch_size=2, device=triton_device)
    assert sites.grid.num_cells > 32 * 32 * 1024
    check_index_of_blocks(sites, 0, False, monkeypatch)
    check_index_of_blocks(sites, 3, False, monkeypatch)


def check_index_of_blocks(sites, shift, repeats, monkeypatch):
    monkeypatch.setattr(kernels, "_choose_shift", lambda n, cells: shift)
    index = kernels.build_index(sites.coords, sites.grid)
    assert (index.kind, index.shift) == ("pages", shift)
    expected: dict[int, int] = {}
    for row, key in enumerate(sites.grid.keys(sites.coords).tolist()):
        if key >= 0:
            expected.setdefault(key, row)
    *_, repeated = index.table.tolist()
    assert bool(repeated) == repeats
    words = index.table.tolist()[: -(-sites.grid.num_cells // (32 << shift))]
    slots = {
        32 * w + bit: (word >> 32) + (word & (1 << bit) - 1).bit_count()
        for w, word in enumerate(words)
        for bit in range(32)
        if word >> bit & 1
    }
    assert set(slots) == {key >> shift for key in expected}
    # In any order.
    assert sorted(slots.values()) == list(range(len(slots)))
    held = {(slots[key >> shift] << shift) + key % 2**shift: row for key, row in expected.items()}
    stored = index.rows.tolist()
    assert {at: 2**31 - 1 - value for at, value in enumerate(stored) if value} == held


@pytest.mark.parametrize(
    ("n", "cells"),
    [(0, 0), (1, 2**20), (13_000, 41 * 1600 * 1408), (10**6, 2**31), (10**7, 2**31)],
)
def test_index_takes_little_memory(n, cells):
    shift = kernels._choose_shift(n, cells)
    assert shift is not None
    taken = [(cells >> s) // 4 + (4 * n << s) for s in range(64)]
    assert taken[shift] <= 1.5 * min(taken) + 64
    assert taken[shift] <= 2**28 + 256 * n


def test_index_of_a_grid_with_too_many_blocks(triton_device):
    assert kernels._choose_shift(10**6, 2**50) is None
    coords = torch.tensor([[0, 2**24, 0], [0, 0, 2**24], [0, 0, 0], [0, 0, 0]], dtype=torch.int32)
    grid = Grid((0, 0), (2**25, 2**36), 1)
    index = kernels.build_index(coords.to(triton_device), grid)
    assert index.kind == "sorted"
    assert index.table.tolist() == [0, 0, 2**24, 2**60]
    assert index.rows.tolist() == [2, 3, 1, 0]


@pytest.mark.parametrize("ndim", [1, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_steps_reach_what_taps_reach(ndim, dilation):
    for size, step in itertools.product(range(1, 6), range(1, 4)):
        window = ConvGeometry((size,) * ndim, (step,) * ndim, (1,) * ndim, (dilation,) * ndim)
        steps = reach_steps(window.offsets, window.stride, True)
        by_tap, by_step = (
            [
                {(x - o[0]) // step for o, limit in some if (x - o[0]) % step < limit[0]}
                for x in range(-20, 20)
            ]
            for some in ([(o, (1,)) for o in window.offsets], steps)
        )
        assert by_step == by_tap
        if dilation == 1:
            assert len(steps) == math.ceil(size / step) ** ndim


@pytest.mark.parametrize("stride", [(2, 3), (1, 5), (7, 1)], ids=str)
@pytest.mark.parametrize("n", [0, 1, 150])
def test_corners_of_a_window_reach_what_its_taps_reach(triton_device, n, stride):
    sites = random_sites(n, 2, extent=(9, 20), lower=-7, bounded=False, device=triton_device)
    cells = ConvGeometry(stride, stride, (0, 0), (1, 1), sites="cells")
    corners = Box((0, 0), tuple(step - 1 for step in stride))
    grid = unbounded_grid(sites, cells)
    for module in (kernels, eager):
        expected = launch(module, sites, cells, grid)[0]
        found = module.reached_sites(sites.coords, corners, stride, True, grid, sites.grid)[0]
        assert torch.equal(found, expected)


@pytest.mark.parametrize("step", [2, 100, 1000, 2**30])
def test_a_cell_is_one_step_whatever_its_extent(step):
    corners = Box((0,) * 3, (step - 1,) * 3)
    assert reach_steps(corners, (step,) * 3, True) == (((0, 0, 0), (step,) * 3),)
    # A box is not a list of two taps, also where caches compare the two.
    assert corners != ((0,) * 3, (step - 1,) * 3)


@pytest.mark.parametrize("capacity", [0, 1, 130, 131, 400, 5000])
def test_ranks_up_to_a_capacity_write_nothing_else(triton_device, capacity):
    """There are four blocks of words, the last is half empty, and the memory behind is guarded."""
    block, n_words, blocks, guard = 16, 56, 4, 64
    generator = torch.Generator().manual_seed(3)
    cells = torch.rand(n_words, 32, generator=generator) < 0.2
    words = (cells.long() << torch.arange(32)).sum(1)
    memory = torch.zeros(n_words + blocks + 2 + guard, dtype=torch.int64)
    memory[:n_words], memory[-guard:] = words, 7
    memory = memory.to(triton_device)
    count = torch.full((), -1, dtype=torch.int64, device=triton_device)
    overflow = torch.full((), -1, dtype=torch.int32, device=triton_device)
    kernels.bind(kernels.rank_kernel, BLOCK=block, num_warps=4)(
        (blocks,), triton_device, memory, None, count, overflow, n_words, capacity
    )
    upto = cells.sum(1).cumsum(0)
    total = int(upto[-1])
    assert 130 < total < 5000
    expected = torch.where(upto <= capacity, words | ((upto - cells.sum(1)) << 32), 0)
    expected[cells.sum(1) == 0] = 0
    found = memory.cpu()
    assert torch.equal(found[:n_words], expected)
    assert (int(count), int(overflow)) == (min(total, capacity), int(total > capacity))
    sums = torch.stack([part.sum() for part in cells.sum(1).split(block)])
    assert torch.equal(found[n_words : n_words + blocks], sums + 1)
    assert found[n_words + blocks : n_words + blocks + 2].tolist() == [blocks, total]
    assert (found[-guard:] == 7).all()


def test_grids_too_large_for_a_capacity_are_refused(triton_device):
    """Torch sorts the sites of such grids, and the host reads the sizes of torch's results."""
    sites = random_sites(5, 2, extent=9, device=triton_device)
    grid = Grid((0, 0), (2**20, 2**20), 1)
    flag = torch.zeros((), dtype=torch.int32, device=triton_device)
    with pytest.raises(RuntimeError, match="too large for rows that are padded"):
        kernels.reached_sites(
            sites.coords, DOWN.offsets, DOWN.stride, True, grid, sites.grid, None, 4, flag
        )
