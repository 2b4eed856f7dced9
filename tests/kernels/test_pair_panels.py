"""The pairs of a table in panels of columns, and products made panel by panel (torch)."""

import pytest
import torch

from tests._back_end import send_cpu_to_torch
from tritonspconv import reference
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import kernel_map
from tritonspconv.kernels.eager import gather_gemm as kernels
from tritonspconv.kernels.eager import pairs
from tritonspconv.kernels.eager._stable_sort import distinct, stable_sort
from tritonspconv.kernels.eager.pairs import PairPanels, TapPairs, taps_of_table
from tritonspconv.ops import sparse_conv
from tritonspconv.testing import assert_close, random_sites


@pytest.fixture(autouse=True)
def _in_torch(monkeypatch):
    send_cpu_to_torch(monkeypatch)


@pytest.fixture
def small_panels(monkeypatch):
    """Make panels of some 16 to 27 pairs; some panels have no pair."""
    monkeypatch.setattr(pairs, "_pairs_per_tap", lambda channels: 1)


def random_rows(volume: int, n: int, n_in: int, share: float) -> torch.Tensor:
    rows = torch.randint(max(n_in, 1), (volume, n), dtype=torch.int32)
    rows[torch.rand(volume, n) >= share] = -1
    rows[:, n // 3 : n // 2] = -1
    return rows


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("volume", "n"), [(27, 0), (27, 1), (1, 63), (8, 200)])
def test_panels_hold_the_table(volume, n, share):
    rows = random_rows(volume, n, 50, share)
    columns = []
    for panel in PairPanels(rows).listed(8):
        assert panel.rows.dtype == panel.by_column.dtype == panel.ends.dtype == torch.int32
        assert sum(panel.counts) == len(panel.rows) == len(panel.by_column)
        taps = torch.repeat_interleave(torch.arange(volume), torch.tensor(panel.counts))
        for start, end in zip(panel.ends[:-1], panel.ends[1:], strict=True):
            places = panel.by_column[start:end].long()
            columns.append(
                list(zip(taps[places].tolist(), panel.rows[places].tolist(), strict=True))
            )
    expected = [[(v, int(row)) for v, row in enumerate(c) if row >= 0] for c in rows.T]
    assert columns == expected


@pytest.mark.usefixtures("small_panels")
def test_panels_of_pairs_in_any_order():
    """The order of pairs within a tap is free; sums of columns still follow the order of taps."""
    rows = random_rows(8, 200, 50, 0.4)
    columns, entries, counts, _ = taps_of_table(rows)
    parts = zip(columns.split(counts), entries.split(counts), strict=True)
    shuffled = []
    for tap_columns, tap_entries in parts:
        order = torch.randperm(len(tap_columns))
        shuffled.append((tap_columns[order], tap_entries[order]))
    panels = PairPanels(rows, TapPairs.joined(shuffled))
    for ours, theirs in zip(panels.listed(8), PairPanels(rows).listed(8), strict=True):
        assert ours.counts == theirs.counts
        assert torch.equal(ours.ends, theirs.ends)
        assert torch.equal(ours.rows[ours.by_column.long()], theirs.rows[theirs.by_column.long()])


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize(("volume", "n"), [(27, 1), (1, 63), (8, 200), (27, 400)])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.4, 1.0])
def test_taps_whose_columns_ascend_are_cut(volume, n, share, monkeypatch):
    """Cutting gives the same panels as sorting, which works for taps in any order."""
    rows = random_rows(volume, n, 50, share)
    known = taps_of_table(rows)
    assert pairs._ascend(known.columns, known.counts)
    cut = PairPanels(rows, known).listed(8)
    monkeypatch.setattr(pairs, "_ascend", lambda columns, counts: False)
    for ours, theirs in zip(cut, PairPanels(rows, known).listed(8), strict=True):
        assert ours.counts == theirs.counts
        for name in ("rows", "columns", "by_column", "ends"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize(
    ("columns", "counts", "expected"),
    [
        ([], [0, 0], True),
        ([3, 4, 1, 2], [2, 2], True),
        ([3, 4, 1, 2], [0, 2, 0, 2], True),
        ([3, 1, 2, 4], [2, 2], False),
        ([4, 3, 2, 1], [2, 2], False),
        ([1, 2, 3, 0], [3, 1], True),
    ],
)
def test_columns_that_ascend(columns, counts, expected):
    assert pairs._ascend(torch.tensor(columns, dtype=torch.int32), counts) == expected


@pytest.mark.parametrize("n", [0, 1, 2**13 - 1, 2**13, 2**15 - 1, 2**15])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_stable_sort(n, dtype):
    keys = torch.randint(-50, 50, (n,), dtype=dtype)
    keys[n // 2 :: 7] = torch.iinfo(dtype).max
    ordered, places = stable_sort(keys)
    expected = torch.sort(keys, stable=True)
    assert torch.equal(ordered, expected.values)
    assert torch.equal(places, expected.indices)


@pytest.mark.parametrize("n", [0, 1, 100, 2**13, 2**15 + 1])
def test_distinct(n):
    keys = torch.randint(-50, 4000, (n,))
    for some in (keys, keys.int()):
        assert torch.equal(distinct(some), torch.unique(some))


def test_columns_of_one_pair_each(small_panels):
    """A transposed layer undoes a window without overlap, so products are stored without sums."""
    down = ConvGeometry((2,) * 3, (2,) * 3, (0,) * 3, (1,) * 3)
    kmap = kernel_map(random_sites(200, extent=8), down)
    panels = kmap.in_table.panels.listed(8)
    assert len(panels) > 2
    assert all(panel.is_one_each for panel in panels)
    assert not any(panel.is_one_each for panel in kmap.out_table.panels.listed(8))
    feats, weight = torch.randn(kmap.n_out, 5).double(), torch.randn(8, 5, 3).double()
    coarse, fine, tap_ptr = kmap.inverse().pairs()
    tap = torch.repeat_interleave(torch.arange(8), tap_ptr.diff())
    expected = torch.zeros(kmap.n_in, 3).double()
    expected[fine.long()] = torch.einsum("pi,pio->po", feats[coarse.long()], weight[tap])
    torch.testing.assert_close(sparse_conv(feats, weight, kmap.inverse()), expected)


def test_panels_are_listed_once():
    panels = PairPanels(random_rows(8, 200, 50, 0.5))
    assert panels.listed(64) is panels.listed(64) is panels.listed(128)


def test_few_channels_take_larger_panels():
    kmap = kernel_map(random_sites(20_000, extent=40), ConvGeometry.submanifold((3,) * 3, (1,) * 3))
    few, many = (kmap.out_table.panels.listed(channels) for channels in (16, 64))
    assert 1 < len(few) < len(many)
    for panels in (few, many):
        assert sum(len(panel.ends) - 1 for panel in panels) == kmap.n_out
        assert sum(len(panel.rows) for panel in panels) == kmap.num_pairs() - kmap.n_out
    for channels in (0, 1, 16, 17, 32, 64, 65, 1000):
        assert 512 <= pairs._pairs_per_tap(channels) <= 2048
    assert [pairs._pairs_per_tap(channels) for channels in (16, 17, 64, 65, 40_000)] == [
        2048, 1024, 512, 512, 512,
    ]  # fmt: skip


def test_a_map_and_its_mirror_share_their_panels():
    kmap = kernel_map(random_sites(30, extent=6), ConvGeometry.submanifold((3,) * 3, (1,) * 3))
    assert kmap.in_table.mirrored
    assert kmap.in_table.panels is kmap.out_table.panels


@pytest.mark.usefixtures("small_panels")
def test_the_centre_of_a_submanifold_map_is_not_listed():
    kmap = kernel_map(random_sites(60, 3, extent=5), ConvGeometry.submanifold((3,) * 3, (1,) * 3))
    table = kmap.out_table
    assert table.panels.identity == 13
    assert all(panel.counts[13] == 0 for panel in table.panels.listed(8))
    feats, weight = torch.randn(kmap.n_in, 7), torch.randn(27, 7, 5)
    listed = PairPanels(table.rows)
    for mirrored in (False, True):
        ours, theirs = (
            kernels.gather_gemm(
                feats, weight, None, table.rows, None, None, mirrored=mirrored, panels=panels
            )
            for panels in (table.panels, listed)
        )
        torch.testing.assert_close(ours, theirs)


def test_a_window_that_repeats_its_centre():
    geometry = ConvGeometry.of_taps([(0,), (0,), (1,)], (1,), (1,), sites="same")
    sites = random_sites(9, 1, extent=(40,))
    table = kernel_map(sites, geometry).out_table
    own = torch.arange(sites.num_rows, dtype=torch.int32)
    assert torch.equal(table.rows[:2], own.expand(2, -1))
    feats, weight = torch.randn(sites.num_rows, 4), torch.randn(3, 4, 4)
    ours, theirs = (
        kernels.gather_gemm(feats, weight, None, table.rows, None, None, mirrored=False, panels=b)
        for b in (table.panels, None)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("cached", [2**20, 1], ids=["taps together", "tap by tap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_products_over_many_panels(monkeypatch, dtype, cached):
    monkeypatch.setattr(kernels, "_CACHED_BYTES", cached)
    monkeypatch.setattr(kernels, "_FEWEST_ROWS", 3)
    rows = random_rows(8, 200, 50, 0.3)
    feats, weight = torch.randn(50, 7).to(dtype), torch.randn(8, 7, 5).to(dtype)
    order = torch.randperm(200).int()
    present = (rows >= 0).nonzero().tolist()
    triples = [(int(rows[v, c]), int(order[c]), v) for v, c in present]
    truth, plain = (
        reference.conv(feats.to(kind), weight.to(kind), triples, 200)
        for kind in (torch.float64, dtype)
    )
    mask = torch.empty(1, 200, dtype=torch.int32)
    out = kernels.gather_gemm(feats, weight, None, rows, mask, order, mirrored=False)
    assert_close(out, truth, eager=plain)
    kept = PairPanels(rows)
    for _ in range(2):
        again = kernels.gather_gemm(
            feats, weight, None, rows, mask, order, mirrored=False, panels=kept
        )
        assert torch.equal(again, out)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_maps_in_a_grid_without_room_for_more_keys(stride, transposed):
    """Neighbours have no keys of their own beside a grid of 2**62 cells."""
    sites = random_sites(60, 3, extent=5)
    geometry = ConvGeometry(
        (3,) * 3, (stride,) * 3, (1,) * 3, (1,) * 3, transposed=transposed, sites="reached"
    )
    huge = ActiveSites(sites.coords, Grid((0,) * 3, (2**20, 2**20, 2**21), 2, bounded=False))
    snug = ActiveSites(sites.coords, Grid.around(sites.coords))
    made = kernel_map(snug, geometry).out_sites
    ours, theirs = (kernel_map(part, geometry, out_sites=made) for part in (huge, snug))
    assert torch.equal(ours.out_table.rows, theirs.out_table.rows)
    assert torch.equal(ours.in_table.rows, theirs.in_table.rows)
