"""Sets of sites made from others, against plain Python."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests._back_end import every_back_end
from tests._strategies import site_sets
from tritonspconv.coords import (
    ActiveSites,
    Grid,
    select_sites,
    union_sites,
    unique_rows,
    unique_sites,
)
from tritonspconv.testing import random_sites

per_device = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@every_back_end
@per_device
@given(keys=st.lists(st.integers(-3, 3) | st.sampled_from([2**62, -(2**62)])))
def test_unique_rows_are_the_first_of_each_key_in_order(device, keys):
    rows, position = unique_rows(torch.tensor(keys, dtype=torch.int64, device=device))
    firsts = [row for row, key in enumerate(keys) if key not in keys[:row]]
    assert rows.tolist() == firsts
    assert position.tolist() == [firsts.index(keys.index(key)) for key in keys]


@every_back_end
@pytest.mark.parametrize("repeats", [0, 1, 20])
@pytest.mark.parametrize("n", [0, 1, 40])
def test_unique_sites_are_the_first_of_each_coordinate(device, n, repeats):
    given = random_sites(n, extent=9, lower=-4, repeats=min(repeats, n // 2), device=device)
    sites, rows, position = unique_sites(given.coords, given.grid)
    expected = unique_rows(given.grid.keys(given.coords))
    assert torch.equal(rows, expected[0])
    assert torch.equal(position, expected[1])
    assert torch.equal(sites.coords, given.coords[rows])
    assert not sites.has_repeats()
    kept = sites.coords.clone()
    given.coords.fill_(7)
    assert torch.equal(sites.coords, kept)


@per_device
@given(data=st.data())
def test_rows_of_finds_the_lowest_row_of_a_site(device, data):
    ndim = data.draw(st.integers(1, 5))
    sites = data.draw(site_sets(ndim, device=device))
    asked = data.draw(site_sets(ndim, bounded=True, device=device)).coords
    inside = sites.grid.contains(sites.coords).tolist()
    known = [tuple(c) if ok else None for c, ok in zip(sites.coords.tolist(), inside, strict=True)]
    expected = [known.index(tuple(c)) if tuple(c) in known else -1 for c in asked.tolist()]
    assert sites.rows_of(asked).tolist() == expected
    sites.index  # noqa: B018 - an index of the map kernels changes nothing
    assert sites.rows_of(asked).tolist() == expected


def test_select_keeps_order_and_grid(device):
    sites = random_sites(20, 2, device=device)
    rows = torch.tensor([7, 3, 11], device=device)
    chosen = select_sites(sites, rows)
    assert chosen.coords.tolist() == [sites.coords.tolist()[row] for row in (7, 3, 11)]
    assert chosen.grid == sites.grid


@per_device
@given(data=st.data())
def test_union_holds_every_site_once_and_says_where(device, data):
    ndim = data.draw(st.integers(1, 4))
    parts = [
        data.draw(site_sets(ndim, bounded=False, device=device))
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    union, rows = union_sites(parts)
    everything = sorted({tuple(c) for part in parts for c in part.coords.tolist()})
    assert [tuple(c) for c in union.coords.tolist()] == everything
    assert union.grid.contains(union.coords).all()
    assert not union.grid.bounded
    for part, at in zip(parts, rows, strict=True):
        assert union.coords[at].tolist() == part.coords.tolist()


def test_union_of_nothing_is_empty(device):
    empty = torch.empty(0, 3, dtype=torch.int32, device=device)
    sites = ActiveSites(empty, Grid.around(empty))
    union, (first, second) = union_sites([sites, sites])
    assert union.num_rows == first.shape[0] == second.shape[0] == 0
