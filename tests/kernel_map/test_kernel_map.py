"""The kernel map in all its forms, as a set of triples, against brute force."""

import gc
import importlib
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests._back_end import every_back_end, use, use_triton
from tests._oracle import (
    expected_out_coords,
    expected_triples,
    map_triples,
    pair_triples,
    swapped,
    table_triples,
)
from tests._strategies import KINDS, Share, a_few, problems, site_sets
from tritonspconv.coords import ActiveSites, Grid, active_sites
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import KernelMap, build, kernel_map, output_sites
from tritonspconv.testing import random_sites, surface_sites

# Each kind of window has its own examples, so that the draw leaves out none.
every_kind = pytest.mark.parametrize("kind", KINDS)

SUBM3 = ConvGeometry.submanifold((3, 3, 3), (1, 1, 1))
DOWN2 = ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))
HALVE = ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1))
UP2 = ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1), transposed=True)
MAP_KERNELS = "sites", "neighbor_table", "scatter_table", "invert_table"

# Windows that need more than one word of mask bits, and a window that fills one word.
LARGE_WINDOWS = [
    pytest.param(ConvGeometry.submanifold((5,) * 3, (1,) * 3), id="subm-5x5x5"),
    pytest.param(ConvGeometry.submanifold((7,) * 3, (1,) * 3), id="subm-7x7x7"),
    pytest.param(ConvGeometry.submanifold((3,) * 4, (1,) * 4), id="subm-3x3x3x3"),
    pytest.param(ConvGeometry.submanifold((3,) * 5, (1,) * 5), id="subm-5d"),
    pytest.param(ConvGeometry((4,) * 3, (2,) * 3, (1,) * 3, (1,) * 3), id="strided-4x4x4"),
    pytest.param(ConvGeometry((2,) * 5, (2,) * 5, (0,) * 5, (1,) * 5), id="strided-2-5d-32-taps"),
    pytest.param(
        ConvGeometry((5,) * 3, (2,) * 3, (2,) * 3, (1,) * 3, transposed=True), id="transposed-5x5x5"
    ),
]


def check_forms(kmap: KernelMap) -> None:
    """Every form of the map holds the expected triples, each exactly once."""
    expected = sorted(map_triples(kmap))
    assert sorted(table_triples(kmap.out_table, kmap.kernel_volume)) == expected
    assert sorted(swapped(table_triples(kmap.in_table, kmap.kernel_volume))) == expected
    assert sorted(pair_triples(*kmap.pairs())) == expected
    assert kmap.num_pairs() == len(expected)
    assert sorted(kernel_pair_triples(kmap)) == expected
    assert kmap.out_table.entries(kmap.kernel_volume).shape == (kmap.kernel_volume, kmap.n_out)
    assert kmap.in_table.entries(kmap.kernel_volume).shape == (kmap.kernel_volume, kmap.n_in)
    assert (kmap.n_in, kmap.n_out) == (kmap.in_sites.num_rows, kmap.out_sites.num_rows)


def kernel_pair_triples(kmap: KernelMap):
    """Return the pair lists that the weight gradient reads, with the mirrored half added."""
    pairs, tap_ptr, mirrored = kmap.pair_list
    triples = pair_triples(*pairs, tap_ptr)
    if mirrored:
        last = kmap.kernel_volume - 1
        triples += [(o, i, last - v) for i, o, v in triples if v != last - v]
    return swapped(triples) if kmap.is_inverse else triples


def counted_pairs(kmap: KernelMap) -> tuple[list, bool]:
    """Return the arguments of `Share.note`: the triples, and whether rows see themselves."""
    return map_triples(kmap), kmap.in_sites is kmap.out_sites


@every_back_end
@every_kind
def test_map_is_the_relation(device, kind):
    share = Share()

    @a_few(30)
    @given(problems((kind,), device))
    def has_the_rows_and_pairs_of_brute_force(problem):
        sites, geometry = problem
        kmap = kernel_map(sites, geometry)
        out_coords = expected_out_coords(sites, geometry)
        assert kmap.out_sites.coords.cpu().tolist() == out_coords.tolist()
        assert kmap.out_sites.grid.contains(out_coords).all() or geometry.sites == "same"
        check_forms(kmap)
        share.note(*counted_pairs(kmap))

    has_the_rows_and_pairs_of_brute_force()
    share.check()


@every_back_end
@pytest.mark.parametrize("kind", ["reached", "transposed", "reached, taps", "transposed, taps"])
def test_map_to_given_sites_is_the_relation(device, kind):
    share = Share()

    @a_few(30)
    @given(data=st.data())
    def has_the_pairs_of_brute_force(data):
        sites, geometry = data.draw(problems((kind,), device))
        reached = expected_out_coords(sites, geometry).to(device)
        meets = len(reached) > 0 and data.draw(st.integers(0, 3)) > 0
        out_sites = data.draw(site_sets(geometry.ndim, not meets, device))
        if meets:
            some = data.draw(st.lists(st.integers(0, len(reached) - 1), min_size=1, max_size=9))
            coords = torch.cat([reached[some], out_sites.coords])
            out_sites = ActiveSites(coords, Grid.around(coords))
        kmap = kernel_map(sites, geometry, out_sites=out_sites)
        assert kmap.out_sites is out_sites
        check_forms(kmap)
        share.note(map_triples(kmap))

    has_the_pairs_of_brute_force()
    share.check()


@every_back_end
def test_output_sites_of_fewer_samples(device):
    """Rows whose sample is not in the output grid reach no site."""
    sites = random_sites(60, extent=6, batch_size=3, device=device)
    for geometry in (DOWN2, UP2):
        grid = Grid((0, 0, 0), geometry.output_shape(sites.grid.shape), 2)
        everywhere = expected_out_coords(sites, geometry)
        made = output_sites(sites, geometry, grid)
        assert made.coords.tolist() == everywhere[everywhere[:, 0] < 2].tolist()
        assert made.grid == grid
        assert 0 < made.num_rows < len(everywhere)
        check_forms(kernel_map(sites, geometry, out_sites=made))


@every_back_end
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("repeated", ["fine", "coarse"])
def test_repeats_on_one_side_only(device, transposed, repeated):
    """The lowest row of a cell takes part, for repeats on either side, found before or not."""
    geometry = ConvGeometry((3, 2), (2, 2), (1, 0), (1, 1), transposed=transposed)
    counts = {"fine": 7 * (repeated == "fine"), "coarse": 4 * (repeated == "coarse")}
    fine = random_sites(30, 2, extent=6, repeats=counts["fine"], device=device)
    coarse = random_sites(12, 2, extent=4, repeats=counts["coarse"], device=device)
    for looked_at in ((), (fine,), (coarse,), (fine, coarse)):
        sides = [ActiveSites(side.coords, side.grid) for side in (fine, coarse)]
        for made, side in zip(sides, (fine, coarse), strict=True):
            if side in looked_at:
                assert made.has_repeats() == (counts["fine" if side is fine else "coarse"] > 0)
        sites, out_sites = sides[::-1] if transposed else sides
        kmap = kernel_map(sites, geometry, out_sites=out_sites)
        assert kmap.num_pairs() >= 5
        check_forms(kmap)
        check_forms(kmap.inverse())


@every_back_end
@every_kind
def test_inverse_map_swaps_the_roles(device, kind):
    share = Share()

    @a_few(30)
    @given(problems((kind,), device))
    def has_the_pairs_swapped(problem):
        kmap = kernel_map(*problem)
        inverse = kmap.inverse()
        assert inverse.in_sites is kmap.out_sites
        assert inverse.out_sites is kmap.in_sites
        assert inverse.geometry == kmap.geometry
        check_forms(inverse)
        check_forms(inverse.inverse())
        share.note(*counted_pairs(kmap))

    has_the_pairs_swapped()
    share.check()


@pytest.mark.parametrize("rule", ["cells", "reached"])
def test_output_sites_are_those_of_the_map(device, rule):
    geometry = ConvGeometry((3, 3), (2, 2), (1, 1), (1, 1), sites=rule)
    sites = random_sites(30, 2, lower=-5, bounded=False, device=device)
    made = output_sites(sites, geometry)
    kmap = kernel_map(sites, geometry)
    assert made.grid == kmap.out_sites.grid
    assert made.coords.tolist() == kmap.out_sites.coords.tolist()


@pytest.mark.parametrize("geometry", LARGE_WINDOWS)
@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "unbounded"])
def test_large_windows(device, geometry, bounded):
    extent = 9 if geometry.ndim == 3 else 6
    sites = random_sites(
        40, geometry.ndim, extent=extent, lower=0 if bounded else -4, bounded=bounded, repeats=3,
        outside=4 if bounded else 0, device=device,
    )  # fmt: skip
    check_forms(kernel_map(sites, geometry))


@pytest.mark.parametrize(
    "geometry",
    [
        ConvGeometry.submanifold((301,), (1,)),
        ConvGeometry((301,), (3,), (7,), (1,)),
        ConvGeometry((301,), (3,), (7,), (1,), transposed=True),
    ],
    ids=["subm", "strided", "transposed"],
)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_windows_of_more_taps_than_pairs_of_sites(geometry, rows):
    """A row then visits the taps between existing sites only, not every tap."""
    sites = random_sites(rows, 1, extent=400, bounded=True)
    search = importlib.import_module("tritonspconv.kernels.eager._row_search")
    with pytest.MonkeyPatch.context() as monkeypatch:
        searches = count_calls(monkeypatch, search, "_search")
        kmap = kernel_map(sites, geometry)
    assert len(searches) <= rows * kmap.n_out
    check_forms(kmap)


def count_calls(monkeypatch: pytest.MonkeyPatch, module, name: str) -> list:
    """Replace a function of ``module`` by one that appends to the returned list at each call."""
    original, calls = getattr(module, name), []

    def counted(*args):
        calls.append(name)
        return original(*args)

    monkeypatch.setattr(module, name, counted)
    return calls


REPEATED = [(-1,), (1,), (1,), (0,), (-1,), (2,), (0,)]


@every_back_end
@pytest.mark.parametrize(
    "geometry",
    [
        ConvGeometry.of_taps(REPEATED, (1,), (1,), sites="same"),
        ConvGeometry.of_taps([(0,), (0,), (1,)], (1,), (1,), sites="same"),
        ConvGeometry.of_taps(REPEATED, (2,), (1,)),
        ConvGeometry.of_taps(REPEATED, (2,), (1,), transposed=True),
    ],
    ids=["same", "same, centre", "reached", "transposed"],
)
def test_windows_that_repeat_taps(device, geometry):
    sites = random_sites(9, 1, extent=14, lower=-3, bounded=False, device=device)
    check_forms(kernel_map(sites, geometry))


@pytest.mark.parametrize("geometry", [SUBM3, DOWN2, UP2], ids=["subm", "strided", "transposed"])
def test_many_rows(device, geometry, monkeypatch):
    """Many rows whose columns, on a GPU, are put in order of their masks."""
    if device.type == "cuda":
        order = "tritonspconv.kernels.triton._column_order"
        monkeypatch.setattr(f"{order}.MIN_ROWS_TO_ORDER", 1024)
    sites = surface_sites(36, device=device)
    assert sites.num_rows > 16384
    shuffled = ActiveSites(sites.coords[torch.randperm(sites.num_rows)], sites.grid)
    for given_sites in (sites, shuffled):
        check_forms(kernel_map(given_sites, geometry))


@every_back_end
@pytest.mark.parametrize(
    "geometry",
    [
        SUBM3,
        DOWN2,
        UP2,
        ConvGeometry((2,) * 3, (2,) * 3, (0,) * 3, (1,) * 3, sites="cells"),
        ConvGeometry.submanifold((1, 1, 1), (1, 1, 1)),
    ],
    ids=["subm", "strided", "transposed", "cells", "pointwise"],
)
@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "unbounded"])
@pytest.mark.parametrize("n", [0, 1])
def test_no_rows_and_one_row(device, n, bounded, geometry):
    sites = random_sites(n, extent=7, bounded=bounded, device=device)
    check_forms(kernel_map(sites, geometry))


@every_back_end
@pytest.mark.parametrize("geometry", [SUBM3, DOWN2, UP2], ids=["subm", "strided", "transposed"])
def test_only_rows_outside_the_grid(device, geometry):
    sites = random_sites(6, extent=7, outside=6, device=device)
    kmap = kernel_map(sites, geometry)
    check_forms(kmap)
    assert kmap.num_pairs() == (6 if geometry is SUBM3 else 0)


@every_back_end
def test_input_rows_of_samples_beyond_their_grid(device):
    """Also where the outputs have more samples than the inputs."""
    coords = torch.tensor([[0, 1], [1, 1]], dtype=torch.int32, device=device)
    sites = ActiveSites(coords, Grid((0,), (4,), 1))
    more = Grid((0,), (4,), 2)
    geometry = ConvGeometry((1,), (1,), (0,), (1,))
    check_forms(kernel_map(sites, geometry, out_sites=ActiveSites(coords, more)))
    with pytest.raises(
        ValueError, match="out_grid must have the batch size of the sites, 1; got 2"
    ):
        kernel_map(sites, geometry, out_grid=more)


def test_far_apart_sites(device):
    """A grid of nearly 2**62 cells, far beyond any table over cells."""
    corner = 2**19
    coords = torch.tensor(
        [[0, -corner, -corner, 5], [3, corner, corner, -corner], [3, corner, corner, 1 - corner]],
        dtype=torch.int32,
        device=device,
    )
    sites = ActiveSites(coords, Grid.around(coords))
    assert sites.grid.num_cells > 2**60
    for geometry in (SUBM3, DOWN2):
        kmap = kernel_map(sites, geometry)
        assert kmap.out_sites.coords.tolist() == expected_out_coords(sites, geometry).tolist()
        check_forms(kmap)


def test_coordinates_at_the_ends_of_int32(device):
    ends = torch.iinfo(torch.int32)
    coords = torch.tensor([[0, ends.min], [0, ends.max], [0, ends.max - 1]], dtype=torch.int32)
    sites = ActiveSites(coords.to(device), Grid.around(coords))
    check_forms(kernel_map(sites, ConvGeometry.submanifold((5,), (3,))))
    check_forms(kernel_map(sites, ConvGeometry((2,), (2,), (0,), (1,), sites="cells")))


def test_generated_rows_ascend(device):
    sites = random_sites(200, extent=16, lower=-8, bounded=False, device=device)
    for geometry in (DOWN2, UP2):
        coords = kernel_map(sites, geometry).out_sites.coords.tolist()
        assert coords == sorted(coords)


def test_out_grid_cuts_the_outputs(device):
    sites = random_sites(60, extent=10, device=device)
    small = Grid((1, 0, 2), (2, 4, 3), 2)
    kmap = kernel_map(sites, DOWN2, out_grid=small)
    everywhere = kernel_map(sites, DOWN2).out_sites.coords
    assert kmap.out_sites.grid == small
    assert torch.equal(kmap.out_sites.coords, everywhere[small.contains(everywhere)])
    check_forms(kmap)


@every_back_end
def test_given_sites_under_a_submanifold_geometry(device):
    """A submanifold geometry chooses the outputs; if they are given, only its window counts."""
    sites = random_sites(30, extent=6, device=device)
    for out_sites in (random_sites(20, extent=6, device=device), sites):
        kmap = kernel_map(sites, SUBM3, out_sites=out_sites)
        expected = sorted(expected_triples(sites, out_sites, SUBM3))
        assert sorted(table_triples(kmap.out_table)) == expected
        assert sorted(swapped(table_triples(kmap.in_table, kmap.kernel_volume))) == expected
        assert sorted(kernel_pair_triples(kmap)) == expected


def test_equal_arguments_share_a_map(device):
    sites = random_sites(30, extent=6, device=device)
    again = ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))
    assert again is not DOWN2
    assert kernel_map(sites, again) is kernel_map(sites, DOWN2)


@pytest.mark.parametrize(
    "change",
    [
        {"kernel_size": (2, 3, 3)},
        {"stride": (2, 2, 1)},
        {"padding": (0, 1, 1)},
        {"dilation": (1, 2, 1)},
        {"transposed": True},
        {"sites": "cells"},
        {"tap_order": "first_axis_fastest"},
        {"output_padding": (0, 0, 1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_of_the_geometry_makes_another_map(change):
    sites = random_sites(30, extent=6)
    other = ConvGeometry(**{**vars_of(DOWN2), **change})
    kmap, changed = kernel_map(sites, DOWN2), kernel_map(sites, other)
    assert changed is not kmap
    assert changed.geometry == other
    check_forms(changed)


def vars_of(geometry: ConvGeometry) -> dict:
    return {name: getattr(geometry, name) for name in geometry.__dataclass_fields__}


def test_other_sites_or_grids_make_another_map():
    sites = random_sites(30, extent=6)
    out_sites = random_sites(30, extent=3)
    maps = [
        kernel_map(sites, DOWN2),
        kernel_map(sites, DOWN2, out_sites=out_sites),
        kernel_map(sites, DOWN2, out_sites=ActiveSites(out_sites.coords, out_sites.grid)),
        kernel_map(sites, DOWN2, out_grid=Grid((0, 0, 0), (2, 2, 2), 2)),
        kernel_map(ActiveSites(sites.coords, sites.grid), DOWN2),
    ]
    assert len(set(map(id, maps))) == 5
    assert kernel_map(sites, DOWN2, out_sites=out_sites) is maps[1]


@pytest.mark.parametrize("geometry", [SUBM3, DOWN2], ids=["subm", "strided"])
def test_tables_live_as_long_as_their_sites(geometry):
    sites = random_sites(30, extent=6)
    kmap = kernel_map(sites, geometry)
    tables = [weakref.ref(t.rows) for t in (kmap.out_table, kmap.in_table)]
    tables.append(weakref.ref(kmap.pair_list.pairs))
    made_sites = weakref.ref(kmap.out_sites)
    del kmap
    again = kernel_map(sites, geometry)
    assert again.out_table.rows is tables[0]()
    assert again.in_table.rows is tables[1]()
    assert again.pair_list.pairs is tables[2]()
    assert again.out_sites is made_sites()

    # Reference counts must free the sites: memory on a GPU cannot wait for the cycle collector.
    gc.collect()
    gc.disable()
    try:
        del sites, again
        assert [table() for table in tables] == [None, None, None]
        assert made_sites() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("owner", ["sites", "out_sites"])
def test_given_sites_are_not_kept_alive(owner):
    both = {"sites": random_sites(30, extent=6), "out_sites": random_sites(30, extent=3)}
    kernel_map(both["sites"], DOWN2, out_sites=both["out_sites"])
    freed = weakref.ref(both[owner])
    gc.collect()
    gc.disable()
    try:
        del both[owner]
        assert freed() is None
    finally:
        gc.enable()
    # A new object may get the address of the freed one, but must not get its map.
    strangers = [random_sites(10, extent=3) for _ in range(5)]
    if owner == "out_sites":
        for stranger in strangers:
            check_forms(kernel_map(both["sites"], DOWN2, out_sites=stranger))


def test_a_map_outlives_its_sites():
    kmap = kernel_map(random_sites(30, extent=6), DOWN2)
    check_forms(kmap)


def test_maps_are_deterministic(device):
    coords = random_sites(300, extent=9, repeats=20, device=device).coords
    grid = Grid((0, 0, 0), (9, 9, 9), 2)
    for geometry in (SUBM3, DOWN2, UP2):
        first, second = (kernel_map(ActiveSites(coords, grid), geometry) for _ in range(2))
        assert torch.equal(first.out_sites.coords, second.out_sites.coords)
        for name in ("out_table", "in_table"):
            tables = getattr(first, name), getattr(second, name)
            # The panels hold the same pairs as the rows, in other objects.
            for ours, theirs in zip(
                *(table._replace(panels=None) for table in tables), strict=True
            ):
                assert ours is theirs or ours is False or torch.equal(ours, theirs)
        for ours, theirs in zip(first.pairs(), second.pairs(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("geometry", [DOWN2, HALVE, UP2], ids=["strided", "halved", "transposed"])
@pytest.mark.parametrize("edited", [(), ("in",), ("out",), ("in", "out")])
@pytest.mark.parametrize("limit", [0, 2**24], ids=["index-made-again", "index-kept"])
def test_tables_do_not_follow_coordinates_that_are_edited(
    triton_device, geometry, edited, limit, monkeypatch
):
    """The backward pass builds the table of the inputs, when users may have edited coordinates."""
    use_triton(monkeypatch, *MAP_KERNELS)
    monkeypatch.setattr(build, "scatters", lambda device: True)
    monkeypatch.setattr(active_sites, "_MAX_KEPT_BYTES", limit)
    sites = random_sites(60, extent=8, device=triton_device)
    kmap = kernel_map(sites, geometry)
    expected = sorted(map_triples(kmap))
    for side in edited:
        written = sites if side == "in" else kmap.out_sites
        written.coords[:, 1:] *= 2
    assert sorted(swapped(table_triples(kmap.in_table, kmap.kernel_volume))) == expected
    assert sorted(table_triples(kmap.inverse().out_table, kmap.kernel_volume)) == sorted(
        swapped(expected)
    )
    assert sorted(kernel_pair_triples(kmap)) == expected


@pytest.mark.parametrize("geometry", [DOWN2, UP2], ids=["strided", "transposed"])
def test_a_map_is_made_again_after_its_output_sites_are_edited(device, geometry):
    sites = random_sites(60, extent=8, device=device)
    kmap = kernel_map(sites, geometry)
    expected = sorted(map_triples(kmap))
    assert kernel_map(sites, geometry) is kmap
    kmap.out_sites.coords[:, 1:] *= 2
    again = kernel_map(sites, geometry)
    assert again is not kmap
    assert sorted(map_triples(again)) == expected
    assert kernel_map(sites, geometry) is again


@pytest.mark.parametrize("geometry", [DOWN2, HALVE], ids=["strided", "halved"])
@pytest.mark.parametrize("repeats", [0, 3])
def test_a_strided_map_on_a_large_scene_makes_one_index(
    triton_device, geometry, repeats, monkeypatch
):
    """The host reads the repeat flag with the number of sites; if rows repeat, it reads twice."""
    built = []
    use_triton(monkeypatch, *MAP_KERNELS)
    module = importlib.import_module("tritonspconv.kernels.triton.sites")
    counted = SimpleNamespace(
        reached_sites=module.reached_sites,
        build_index=lambda *call: built.append(1) or module.build_index(*call),
    )
    use(monkeypatch, "sites", counted)
    monkeypatch.setattr(build, "scatters", lambda device: True)
    monkeypatch.setattr(active_sites, "_MAX_KEPT_BYTES", 2**8)
    sites = random_sites(60, extent=12, repeats=repeats, device=triton_device)
    kmap = kernel_map(sites, geometry)
    check_forms(kmap)
    assert len(built) == (0 if geometry is HALVE else 2 if repeats else 1)


@pytest.mark.parametrize("repeats", [0, 3])
def test_a_cpu_takes_the_index_that_came_with_the_outputs(repeats, monkeypatch):
    numba_table = pytest.importorskip("tritonspconv.kernels.numba.neighbor_table")
    built = count_calls(monkeypatch, numba_table, "build_index")
    check_forms(kernel_map(random_sites(60, extent=12, repeats=repeats), DOWN2))
    assert not built


@pytest.mark.parametrize(
    ("geometry", "most_pairs"),
    [
        pytest.param(SUBM3, lambda n_in, n_out: 14 * n_in, id="half of the taps of a mirrored map"),
        pytest.param(DOWN2, lambda n_in, n_out: 8 * n_in, id="eight outputs an input"),
        pytest.param(HALVE, lambda n_in, n_out: n_in, id="one output an input"),
        pytest.param(UP2, lambda n_in, n_out: n_out, id="one input an output"),
    ],
)
def test_the_list_of_pairs_has_no_more_room_than_there_can_be_pairs(
    geometry, most_pairs, monkeypatch
):
    module = importlib.import_module("tritonspconv.kernel_map.kernel_map")
    rooms, pair_lists = [], module.pair_lists
    monkeypatch.setattr(
        module, "pair_lists", lambda *call: rooms.append(call[2]) or pair_lists(*call)
    )
    kmap = kernel_map(random_sites(60, extent=12), geometry)
    check_forms(kmap)
    assert rooms == [most_pairs(kmap.n_in, kmap.n_out)]


@pytest.mark.gpu
@pytest.mark.parametrize("geometry", [SUBM3, DOWN2, UP2], ids=["subm", "strided", "transposed"])
def test_devices_agree_on_rows(geometry):
    sites = random_sites(500, extent=12, repeats=10, outside=5)
    on_gpu = ActiveSites(sites.coords.cuda(), sites.grid)
    ours, theirs = kernel_map(on_gpu, geometry), kernel_map(sites, geometry)
    assert torch.equal(ours.out_sites.coords.cpu(), theirs.out_sites.coords)
    assert ours.out_sites.grid == theirs.out_sites.grid


def test_error_dimensions():
    with pytest.raises(ValueError, match=r"geometry has 3 axes but the sites have 2"):
        kernel_map(random_sites(5, 2), SUBM3)


def test_error_out_sites_and_out_grid():
    sites = random_sites(5)
    with pytest.raises(ValueError, match=r"out_sites or out_grid, not both"):
        kernel_map(sites, DOWN2, out_sites=sites, out_grid=sites.grid)


def test_error_out_sites_of_another_dimension():
    with pytest.raises(ValueError, match=r"out_sites must have 3 axes on cpu; got 2 axes"):
        kernel_map(random_sites(5), DOWN2, out_sites=random_sites(5, 2))


def test_error_out_grid_of_a_submanifold_geometry():
    sites = random_sites(5)
    with pytest.raises(ValueError, match=r"submanifold geometry keeps its input grid"):
        kernel_map(sites, SUBM3, out_grid=sites.grid)


def test_error_grid_too_small():
    sites = random_sites(5, extent=(8, 2, 8))
    with pytest.raises(ValueError, match=r"spatial shape \(6, 0, 6\): input shape \(8, 2, 8\)"):
        kernel_map(sites, ConvGeometry((3,) * 3, (1,) * 3, (0,) * 3, (1,) * 3))


def test_repr():
    sites = random_sites(5)
    kmap = kernel_map(sites, SUBM3)
    assert repr(kmap).startswith("KernelMap(5 -> 5 rows, ConvGeometry(kernel_size=(3, 3, 3)")
    assert "inverse of" in repr(kmap.inverse())
