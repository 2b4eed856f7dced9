"""Grids: the bijection between coordinates and ascending keys, and its limits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests._oracle import box_of
from tests._strategies import site_sets
from tritonspconv.coords import Grid
from tritonspconv.testing import block_sites


@st.composite
def sites_of_any_dimension(draw):
    return draw(site_sets(draw(st.integers(1, 5))))


@given(sites_of_any_dimension())
def test_keys_and_coords_are_inverse(sites):
    grid, coords = sites.grid, sites.coords
    box = box_of(grid)
    inside = [box.holds(tuple(row)) for row in coords.tolist()]
    keys = grid.keys(coords)
    assert keys.dtype == torch.int64
    assert grid.contains(coords).tolist() == inside
    assert (keys >= 0).tolist() == inside
    assert (keys < max(grid.num_cells, 1)).all()
    back = grid.coords(keys[keys >= 0])
    assert back.dtype == torch.int32
    assert torch.equal(back, coords[keys >= 0])


@given(sites_of_any_dimension())
def test_keys_ascend_with_batch_and_coordinates(sites):
    rows = sorted(sites.coords[sites.grid.contains(sites.coords)].tolist())
    if rows:
        ordered = torch.tensor(rows, dtype=torch.int32)
        keys = sites.grid.keys(ordered)
        assert (keys.diff() >= 0).all()
        assert len(keys.unique()) == len(ordered.unique(dim=0))


def test_every_cell_has_a_key():
    sites = block_sites((3, 1, 4), 2)
    assert sites.grid.keys(sites.coords).tolist() == list(range(24))
    assert sites.grid.num_cells == 24


@given(sites_of_any_dimension())
def test_around_is_the_tightest_box(sites):
    coords = sites.coords[sites.coords[:, 0] >= 0]
    grid = Grid.around(coords)
    assert not grid.bounded
    if not len(coords):
        assert grid.num_cells == 0
        return
    assert grid.contains(coords).all()
    assert grid.lower == tuple(coords[:, 1:].amin(0).tolist())
    assert grid.upper == tuple(coords[:, 1:].amax(0).tolist())
    assert grid.batch_size == coords[:, 0].max() + 1


def test_with_box():
    grid = Grid((0, 0), (5, 5), 3, bounded=False)
    box = grid.with_box((-2, 1), (4, 1))
    assert box == Grid((-2, 1), (7, 1), 3, bounded=False)
    assert box.upper == (4, 1)
    assert grid.with_box((3, 0), (1, 0)).shape == (0, 1)


def test_largest_grid():
    """2**62 cells, with coordinates from one end of int32 to the other."""
    ends = torch.iinfo(torch.int32)
    grid = Grid((ends.min, 0), (2**32, 2**30), 1)
    assert grid.num_cells == 2**62
    coords = torch.tensor(
        [[0, ends.min, 0], [0, ends.max, 2**30 - 1], [0, -1, 5]], dtype=torch.int32
    )
    keys = grid.keys(coords)
    assert keys.tolist() == [0, 2**62 - 1, (2**31 - 1) * 2**30 + 5]
    assert torch.equal(grid.coords(keys), coords)


def test_errors():
    with pytest.raises(ValueError, match=r"lower \(0,\) and shape \(3, 3\) differ in length"):
        Grid((0,), (3, 3), 1)
    with pytest.raises(
        ValueError, match=r"must not be negative; got shape \(3, -1\), batch size 1"
    ):
        Grid((0, 0), (3, -1), 1)
    with pytest.raises(ValueError, match=r"must not be negative; got shape \(3,\), batch size -2"):
        Grid((0,), (3,), -2)
    with pytest.raises(ValueError, match=r"at most 2\*\*62 cells; got shape .* Use larger voxels"):
        Grid((0, 0), (2**31, 2**31), 2)
    with pytest.raises(ValueError, match=r"batch indices must not be negative; got -1"):
        Grid.around(torch.tensor([[0, 3], [-1, 2]], dtype=torch.int32))


def test_the_key_of_a_row_outside_the_grid_is_minus_one():
    grid = Grid((-1, 2), (3, 4), 2)
    beside = [[-1, 0, 3], [2, 0, 3], [0, -2, 3], [0, 2, 3], [0, 0, 1], [0, 0, 6]]
    assert grid.keys(torch.tensor(beside, dtype=torch.int32)).tolist() == [-1] * 6
