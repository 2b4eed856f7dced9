"""Maps on a CPU: numba's launchers return the same bits as the launchers in torch.

``tests/kernel_map`` compares the maps of both back ends with brute force.
"""

import importlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests._strategies import KINDS, a_few, problems
from tests.kernels.test_pair_panels import random_rows
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map.build import output_grid
from tritonspconv.kernels.eager import invert_table as eager_invert
from tritonspconv.kernels.eager import neighbor_table as eager_table
from tritonspconv.kernels.eager import scatter_table as eager_scatter
from tritonspconv.kernels.eager import sites as eager_sites
from tritonspconv.kernels.index import SiteIndex
from tritonspconv.kernels.table import held_bytes
from tritonspconv.kernels.window import Box
from tritonspconv.testing import random_sites, surface_sites

pytest.importorskip("numba", reason="numba is not installed")

from tritonspconv.kernels.numba import _reach, _row_search, _sorted_keys, _threads, invert_table
from tritonspconv.kernels.numba import neighbor_table as table
from tritonspconv.kernels.numba import scatter_table as scatter
from tritonspconv.kernels.numba import sites as sites_module

SUBM = ConvGeometry.submanifold((3, 3, 3), (1, 1, 1))
DOWN = ConvGeometry((3, 3, 3), (2, 3, 2), (1, 1, 1), (1, 1, 2))
SUBM_2D = ConvGeometry.submanifold((3, 3), (1, 1))
UP = ConvGeometry((3, 3, 3), (2, 3, 2), (1, 1, 1), (1, 1, 2), transposed=True)
HALVE = ConvGeometry((2,) * 3, (2,) * 3, (0,) * 3, (1,) * 3)
# Windows whose inputs feed one output at most.
ONE_OUTPUT = {
    "2^3/2": HALVE,
    "padded": ConvGeometry((2, 2, 2), (2, 2, 3), (1, 0, 1), (1,) * 3),
    "first-axis": ConvGeometry(
        (2, 3, 1), (2, 3, 2), (1, 0, 0), (1,) * 3, tap_order="first_axis_fastest"
    ),
    "cells": ConvGeometry((2,) * 3, (2,) * 3, (0,) * 3, (1,) * 3, sites="cells"),
    "stride-beyond-kernel": ConvGeometry((1, 2, 1), (3, 3, 2), (0, -1, 0), (1,) * 3),
    "1d": ConvGeometry((3,), (4,), (2,), (1,)),
    "one-tap-up": ConvGeometry((1,) * 3, (2,) * 3, (0,) * 3, (1,) * 3, transposed=True),
}
EVERY = {"subm": SUBM, "down": DOWN, "up": UP}


def check_index(sites: ActiveSites) -> SiteIndex:
    """Check the index of the sites, and return it."""
    index, expected = (
        module.build_index(sites.coords, sites.grid) for module in (sites_module, eager_sites)
    )
    outside = expected.table >= sites.grid.num_cells
    assert torch.equal(index.rows, expected.rows)
    assert torch.equal(index.table >= sites.grid.num_cells, outside)
    assert torch.equal(index.table[~outside], expected.table[~outside])
    assert index.table.dtype == index.rows.dtype == torch.int64
    return index


def check_reached(sites: ActiveSites, geometry: ConvGeometry, offsets=None) -> ActiveSites:
    """Check the sites that ``geometry`` reaches, and return them."""
    grid = output_grid(sites.grid, geometry)
    call = (
        sites.coords, offsets or geometry.offsets, geometry.stride, not geometry.transposed, grid,
        sites.grid,
    )  # fmt: skip
    made, expected = (module.reached_sites(*call) for module in (sites_module, eager_sites))
    assert made.coords.dtype == torch.int32
    assert torch.equal(made.coords, expected.coords)
    assert torch.equal(made.site_index.table, expected.site_index.table)
    assert torch.equal(made.site_index.rows, expected.site_index.rows)
    return ActiveSites(made.coords, grid)


def check_scattered(sites: ActiveSites, geometry: ConvGeometry) -> int:
    """Check the table that inputs write themselves; return the number of pairs."""
    grid = output_grid(sites.grid, geometry)
    window = geometry.offsets, geometry.stride, not geometry.transposed
    made = sites_module.reached_sites(sites.coords, *window, grid, sites.grid)
    assert made.reached.dtype == torch.int32
    call = (sites.coords, *window, made.site_index, sites.grid, grid, len(made.coords))
    table, repeats = scatter.scatter_table(*call, reached=made.reached)
    expected, also_repeats = eager_scatter.scatter_table(*call)
    assert torch.equal(table.rows, expected.rows)
    assert (repeats.dtype, repeats.tolist()) == (also_repeats.dtype, also_repeats.tolist())
    unknown, _ = scatter.scatter_table(*call)
    assert torch.equal(unknown.rows, expected.rows)
    return int((table.rows >= 0).sum())


def check_tables(sites: ActiveSites, out_sites: ActiveSites, geometry: ConvGeometry) -> int:
    """Check the tables from ``sites`` to ``out_sites`` and back; return the number of pairs."""
    in_index, out_index = check_index(sites), check_index(out_sites)
    if geometry.sites == "same" and geometry.has_center:
        call = (sites.coords, geometry.offsets, in_index, sites.grid)
        rows, expected = (
            module.lookup_table(*call, distinct=False).rows for module in (table, eager_table)
        )
        assert torch.equal(rows, expected)
    else:
        call = (
            out_sites.coords, geometry.offsets, geometry.stride, not geometry.transposed, in_index,
            sites.grid, out_sites.grid,
        )  # fmt: skip
        for own in (out_index, None):
            rows, expected = (
                module.reach_table(*call, own).rows for module in (table, eager_table)
            )
            assert torch.equal(rows, expected)
    reverse = invert_table.invert_table(rows, None, sites.num_rows, geometry.offsets).rows
    expected = eager_invert.invert_table(rows, None, sites.num_rows, geometry.offsets).rows
    assert torch.equal(reverse, expected)
    return int((rows >= 0).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_launchers_return_what_those_in_torch_return(kind):
    pairs = []

    @a_few(40)
    @given(problems((kind,)))
    def they_do(problem):
        sites, geometry = problem
        same = geometry.sites == "same"
        pairs.append(
            check_tables(sites, sites if same else check_reached(sites, geometry), geometry)
        )

    they_do()
    assert sum(n > 0 for n in pairs) > len(pairs) / 3


@pytest.mark.parametrize("is_map", [True, False], ids=["bitmap", "list"])
@pytest.mark.parametrize("geometry", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("lower", [0, -40])
def test_many_rows(geometry, lower, is_map, monkeypatch):
    """Rows of many blocks and passes, out of order, some repeated and some outside."""
    monkeypatch.setattr(_reach, "_WORDS_PER_CELL", 2**30 if is_map else 0)
    sites = random_sites(
        6000, extent=(30, 20, 50), batch_size=2, lower=lower, bounded=lower == 0, repeats=300,
        outside=200 * (lower == 0),
    )  # fmt: skip
    out_sites = sites if geometry is SUBM else check_reached(sites, geometry)
    assert check_tables(sites, out_sites, geometry) > 6000


@pytest.mark.parametrize("how", [{}, {"repeats": 30}, {"outside": 20}], ids=str)
@pytest.mark.parametrize("geometry", ONE_OUTPUT.values(), ids=ONE_OUTPUT)
def test_inputs_that_feed_one_output_write_themselves(geometry, how):
    assert geometry.feeds_one_output
    bounded = geometry.sites == "reached"
    lower, how = 0 if bounded else -40, how if bounded else {**how, "outside": 0}
    extent = 14 if geometry.ndim == 3 else 900
    sites = random_sites(600, geometry.ndim, extent=extent, lower=lower, bounded=bounded, **how)
    assert check_scattered(sites, geometry) > 10
    for few in (0, 1):
        check_scattered(random_sites(few, geometry.ndim, extent=6), geometry)


def test_inputs_in_the_order_of_their_outputs_are_not_sorted(monkeypatch):
    sorts, sort_words = [], _reach.sort_words
    monkeypatch.setattr(
        _reach, "sort_words", lambda words, *bits: sorts.append(words) or sort_words(words, *bits)
    )
    sites = random_sites(60, extent=9)
    single = ActiveSites(sites.coords * torch.tensor([1, 2, 2, 2], dtype=torch.int32), sites.grid)
    ascending = ActiveSites(single.coords[single.grid.keys(single.coords).argsort()], sites.grid)
    check_scattered(ascending, HALVE)
    assert not sorts
    check_scattered(single, HALVE)
    assert sorts


def test_rows_that_may_reach_several_sites_are_not_told():
    sites = random_sites(60, extent=9)
    for geometry in (DOWN, UP):
        window = geometry.offsets, geometry.stride, not geometry.transposed
        grid = output_grid(sites.grid, geometry)
        assert sites_module.reached_sites(sites.coords, *window, grid, sites.grid).reached is None


def test_rows_in_order_are_not_sorted(monkeypatch):
    monkeypatch.setattr(_sorted_keys, "sort_words", None)
    sites = surface_sites(20)
    assert (sites.grid.keys(sites.coords).diff() > 0).all()
    assert check_tables(sites, sites, SUBM) > 10 * sites.num_rows


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("geometry", EVERY.values(), ids=EVERY)
def test_any_number_of_threads(geometry, threads, monkeypatch):
    monkeypatch.setattr(_row_search, "_LEAST_ROWS", 1)
    ranges = []
    split = _threads.in_ranges

    def noted(work, n, least):
        split(lambda *ends: ranges.append(ends) or work(*ends), n, least)

    for module in (_row_search, invert_table):
        monkeypatch.setattr(module, "in_ranges", noted)
    torch.set_num_threads(threads)
    sites = random_sites(1000, extent=14, repeats=50, outside=40)
    check_tables(sites, sites if geometry is SUBM else check_reached(sites, geometry), geometry)
    assert len(ranges) > threads


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("geometry", EVERY.values(), ids=EVERY)
def test_few_rows(geometry, n):
    sites = random_sites(n, extent=6)
    check_tables(sites, sites if geometry is SUBM else check_reached(sites, geometry), geometry)


@pytest.mark.parametrize("extents", [(2**30, 2**31), (2**31, 2**31)], ids=["2**61", "2**62"])
def test_grids_with_more_cells_than_words_can_number(extents):
    """Torch makes the map if a key and a row, or keys of a larger grid, do not fit 64 bits."""
    coords = torch.randint(6, (60, 3), dtype=torch.int32)
    coords[:, 0] = 0
    grid = Grid((0, 0), extents, 1)
    assert _row_search.roomy_grid(grid, (1, 1), SUBM_2D.offsets, grid) is None
    sites = ActiveSites(coords, grid)
    assert check_tables(sites, sites, SUBM_2D) > 60
    wide = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1))
    assert check_tables(sites, check_reached(sites, wide), wide) > 60


@given(
    st.lists(st.tuples(*[st.integers(-9, 9)] * 2), min_size=1, max_size=12, unique=True).map(tuple)
)
def test_runs_hold_every_tap_once(offsets):
    """Taps in a line follow each other along the last axis; opposite taps share a place."""
    for runs, sides in (
        (_row_search.plain_runs(offsets, True), 1),
        (_row_search.plain_runs(offsets, False), 1),
        (_row_search.mirrored_runs(offsets), 2),
    ):
        seen = []
        for offset, (first, last) in zip(
            runs.offsets.tolist(), itertools.pairwise(runs.ends.tolist()), strict=True
        ):
            for place, (tap, opposite) in enumerate(runs.taps[first:last].tolist()):
                at = (offset[0], offset[1] + place)
                if tap >= 0:
                    seen.append((tap, at))
                if opposite >= 0:
                    seen.append((opposite, at if sides == 1 else (-at[0], -at[1])))
            assert (runs.taps[[first, last - 1]] >= 0).any(axis=1).all()
        expected = [(v, at) for v, at in enumerate(offsets) if sides == 1 or any(at)]
        assert sorted(seen) == expected


def test_the_corners_of_a_window_reach_what_its_taps_reach():
    sites = random_sites(150, 2, extent=(9, 20), lower=-7, bounded=False)
    for stride in ((2, 3), (1, 5), (8, 1)):
        cells = ConvGeometry(stride, stride, (0, 0), (1, 1))
        corners = Box((0, 0), tuple(step - 1 for step in stride))
        assert check_reached(sites, cells, corners).num_rows > 10


@pytest.mark.parametrize("capacity", [3, 400])
def test_a_capacity(capacity):
    sites = random_sites(150, extent=9)
    overflows = [torch.tensor(5, dtype=torch.int32) for _ in range(2)]
    made, expected = (
        module.reached_sites(
            sites.coords, DOWN.offsets, DOWN.stride, True, output_grid(sites.grid, DOWN),
            sites.grid, torch.tensor(1), capacity, overflow,
        )
        for module, overflow in zip((sites_module, eager_sites), overflows, strict=True)
    )  # fmt: skip
    assert made.coords.shape == (capacity, 4)
    assert torch.equal(made.coords, expected.coords)
    assert torch.equal(made.num_sites, expected.num_sites)
    assert torch.equal(made.site_index.table, expected.site_index.table)
    assert torch.equal(*overflows)
    assert made.flag is expected.flag is True


def test_padding_sees_nothing():
    sites = random_sites(40, extent=5)
    coords = torch.cat([sites.coords, torch.full((9, 4), -1, dtype=torch.int32)])
    index = sites_module.build_index(coords, sites.grid)
    call = (coords, SUBM.offsets, index, sites.grid)
    rows, expected = (
        module.lookup_table(*call, count=torch.tensor(40)) for module in (table, eager_table)
    )
    assert torch.equal(rows.rows, expected.rows)
    assert int(rows.real_columns) == 40
    assert (rows.rows[:, 40:] == -1).all()


def test_columns_in_another_order():
    rows = torch.tensor([[0, -1, 2], [-1, 0, 1]], dtype=torch.int32)
    order = torch.tensor([2, 0, 1], dtype=torch.int32)
    inverse = invert_table.invert_table(rows, order, 4, ((0,), (1,))).rows
    assert inverse.tolist() == [[2, -1, 1, -1], [0, 1, -1, -1]]


def test_faces_hand_calls_to_numba():
    cpu = torch.device("cpu")
    for name in ("sites", "neighbor_table", "invert_table", "scatter_table"):
        face = importlib.import_module(f"tritonspconv.kernels.{name}")
        back_end = face._back_end.__wrapped__(cpu, 3)
        assert back_end.__name__ == f"tritonspconv.kernels.numba.{name}"


@pytest.mark.parametrize("count", [None, 0, 700])
@pytest.mark.parametrize("n", [0, 1, 512, 1100])
def test_a_table_comes_back_from_its_pairs(n, count):
    rows = random_rows(27, n, 300, 0.3)
    real = None if count is None else torch.tensor(min(count, n))
    if real is not None:
        rows[:, int(real) :] = -1
    table = invert_table.table_of(rows.clone(), real)
    assert torch.equal(table.rows, rows)
    before = held_bytes([table])
    assert table.panels is not None
    pairs = table.panels.listed()
    assert torch.equal(table.rows, rows)
    assert held_bytes([table]) == sum(array.nbytes for array in pairs[:4])
    assert before == rows.nbytes
    assert table.panels.listed() is pairs
