"""Sets of sites: accepted arguments, and the mistakes that `validate` finds."""

import importlib
import weakref
from types import SimpleNamespace

import pytest
import torch

from tests._back_end import use, use_triton
from tritonspconv.coords import ActiveSites, Grid, active_sites
from tritonspconv.kernels.index import SiteIndex
from tritonspconv.testing import random_sites

GRID = Grid((0, 0), (4, 5), 2)


def rows(*coords) -> torch.Tensor:
    return torch.tensor(coords, dtype=torch.int32).reshape(len(coords), 3)


def test_members(device):
    coords = rows((0, 1, 2), (1, 3, 4)).to(device)
    sites = ActiveSites(coords, GRID)
    assert sites.coords is coords
    assert sites.grid is GRID
    assert (sites.num_rows, sites.ndim, sites.device.type) == (2, 2, device.type)
    assert repr(sites).startswith("ActiveSites(2 rows, Grid(lower=(0, 0), shape=(4, 5)")


def test_strided_coords_are_copied(device):
    wide = torch.arange(20, dtype=torch.int32, device=device).reshape(4, 5) % 4
    sites = ActiveSites(wide[:, 1:4], GRID)
    assert sites.coords.is_contiguous()
    assert torch.equal(sites.coords, wide[:, 1:4])


def test_index_is_built_once(device):
    sites = random_sites(10, device=device)
    assert sites.index is sites.index


def test_sites_can_be_referred_to_weakly():
    sites = random_sites(3)
    assert weakref.ref(sites)() is sites


def test_valid_sites(device):
    ActiveSites(rows((1, 3, 4), (0, 0, 0), (0, 3, 4)).to(device), GRID).validate()
    ActiveSites(rows().to(device), GRID).validate()
    random_sites(50, extent=5, device=device).validate()


@pytest.mark.parametrize(
    ("stray", "rest"),
    [
        ((0, 4, 0), r"\[0, 4, 0\]"),
        ((0, 0, -1), r"\[0, 0, -1\]"),
        ((2, 0, 0), r"\[2, 0, 0\]"),
        ((-1, 0, 0), r"\[-1, 0, 0\]"),
    ],
    ids=["above", "below", "batch-above", "batch-below"],
)
def test_validate_names_rows_outside_the_grid(device, stray, rest):
    sites = ActiveSites(rows((0, 0, 0), stray, (9, 9, 9)).to(device), GRID)
    with pytest.raises(
        ValueError,
        match=r"2 of 3 coordinates lie outside the grid \(batch size 2, .*shape \(4, 5\)\); the "
        rf"first is row 1: {rest}",
    ):
        sites.validate()


def test_validate_names_repeated_rows(device):
    coords = rows((0, 1, 1), (1, 2, 2), (0, 3, 3), (1, 2, 2), (1, 2, 2)).to(device)
    with pytest.raises(
        ValueError,
        match=r"2 of 5 coordinates repeat an earlier row; rows 1 and 3 are both \[1, 2, 2\]",
    ):
        ActiveSites(coords, GRID).validate()


def test_errors():
    with pytest.raises(TypeError, match=r"coords must be int32; got torch.int64. Convert with"):
        ActiveSites(rows((0, 0, 0)).long(), GRID)
    with pytest.raises(TypeError, match=r"coords must be int32; got torch.float32"):
        ActiveSites(rows((0, 0, 0)).float(), GRID)
    with pytest.raises(ValueError, match=r"shape \[N, 3\] \(batch index, then 2 .*got \[1, 2\]"):
        ActiveSites(rows((0, 0, 0))[:, :2], GRID)
    with pytest.raises(ValueError, match=r"shape \[N, 3\].*got \[3\]"):
        ActiveSites(rows((0, 0, 0))[0], GRID)


@pytest.mark.parametrize("n", [0, 1, 50])
def test_has_repeats(device, n):
    assert not random_sites(n, extent=8, outside=min(n, 5), device=device).has_repeats()
    if n > 1:
        assert random_sites(n, extent=8, repeats=1, device=device).has_repeats()


def test_has_repeats_finds_rows_far_apart_and_leaves_out_what_lies_outside(device):
    coords = random_sites(70_000, extent=64, device=device).coords
    grid = Grid((0, 0, 0), (64, 64, 64), 2)
    assert not ActiveSites(coords, grid).has_repeats()
    assert ActiveSites(torch.cat([coords, coords[:1]]), grid).has_repeats()
    outside = coords[:1] + torch.tensor([0, 64, 0, 0], dtype=torch.int32, device=device)
    assert not ActiveSites(torch.cat([coords, outside, outside]), grid).has_repeats()


def test_has_repeats_by_the_index_of_a_gpu(triton_device, monkeypatch):
    use_triton(monkeypatch, "sites")
    sites = random_sites(60, extent=8, outside=9, device=triton_device)
    assert sites.index.kind == "pages"
    assert sites.may_repeat
    assert not sites.has_repeats()
    assert not sites.may_repeat
    repeated = random_sites(60, extent=8, repeats=1, outside=9, device=triton_device)
    assert repeated.has_repeats()
    assert repeated.may_repeat


def test_a_large_index_of_a_gpu_is_not_kept(triton_device, monkeypatch):
    use_triton(monkeypatch, "sites")
    small, large = (random_sites(60, extent=8, device=triton_device) for _ in range(2))
    size = small.index.num_bytes
    assert size > 4 * small.num_rows
    assert small.index is small.index
    monkeypatch.setattr(active_sites, "_MAX_KEPT_BYTES", size - 1)
    first, second = large.index, large.index
    assert first is not second
    assert all(torch.equal(a, b) for a, b in zip(first[1:3], second[1:3], strict=True))
    assert ActiveSites(large.coords, large.grid, first).index is not first


def test_a_look_for_repeats_leaves_a_large_index_to_one_map(triton_device, monkeypatch):
    built = []
    kernels = importlib.import_module("tritonspconv.kernels.triton.sites")

    def build_index(coords, grid):
        built.append(kernels.build_index(coords, grid))
        return built[-1]

    use(monkeypatch, "sites", SimpleNamespace(build_index=build_index))
    monkeypatch.setattr(active_sites, "_MAX_KEPT_BYTES", 0)
    sites = random_sites(60, extent=8, device=triton_device)
    assert not sites.has_repeats()
    assert sites.index is built[0]
    assert sites.index is built[1]
    assert len(built) == 2


@pytest.mark.parametrize("repeats", [0, 1])
def test_whether_rows_repeat_is_known_when_a_large_index_is_gone(
    triton_device, monkeypatch, repeats
):
    use_triton(monkeypatch, "sites")
    monkeypatch.setattr(active_sites, "_MAX_KEPT_BYTES", 0)
    sites = random_sites(60, extent=8, repeats=repeats, device=triton_device)
    assert sites.index is not sites.index
    use(monkeypatch, "sites", None)
    assert sites.has_repeats() == sites.may_repeat == bool(repeats)
    assert sites.has_repeats() == bool(repeats)


def test_sites_with_a_bitmap_do_not_repeat(triton_device):
    index = SiteIndex("bitmap", torch.zeros(4, dtype=torch.int64, device=triton_device), None)
    given = random_sites(3, device=triton_device)
    sites = ActiveSites(given.coords, given.grid, index)
    assert not sites.may_repeat
    assert not sites.has_repeats()


def test_sorted_keys_are_looked_at_always():
    sites = random_sites(10)
    assert not sites.has_repeats()
    assert sites.may_repeat


def test_sorted_keys_are_kept_whatever_their_size(monkeypatch):
    monkeypatch.setattr(active_sites, "_MAX_KEPT_BYTES", 0)
    sites = random_sites(10)
    assert sites.index is sites.index
