"""The shipped helpers: random sites have the promised properties, and tolerances find errors."""

import pytest
import torch

from tritonspconv.testing import (
    assert_close,
    assert_matches,
    block_sites,
    random_sites,
    surface_sites,
    tolerance,
)
from tritonspconv.testing.lidar import simulate_sweep


@pytest.mark.parametrize("ndim", [1, 2, 3, 5])
@pytest.mark.parametrize("bounded", [True, False])
def test_random_sites_are_distinct_and_inside(ndim, bounded):
    sites = random_sites(20, ndim, extent=30, lower=-15, bounded=bounded)
    assert sites.num_rows == 20
    assert sites.ndim == ndim
    assert sites.grid.bounded == bounded
    sites.validate()


def test_random_sites_with_repeats_and_strays():
    sites = random_sites(40, extent=5, repeats=7, outside=9)
    keys = sites.grid.keys(sites.coords)
    assert (keys < 0).sum() == 9
    assert len(keys[keys >= 0].unique()) == 40 - 7 - 9


def test_random_sites_follow_the_generator():
    draws = [
        random_sites(30, repeats=3, generator=torch.Generator().manual_seed(s)).coords.tolist()
        for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_random_sites_ascending():
    coords = random_sites(30, ascending=True).coords.tolist()
    assert coords == sorted(coords)


def test_random_sites_of_a_huge_grid():
    random_sites(1000, extent=2**18).validate()


def test_random_sites_errors():
    with pytest.raises(ValueError, match=r"cannot draw 9 distinct and 0 repeated sites .* 8 cells"):
        random_sites(9, extent=2, batch_size=1)
    with pytest.raises(ValueError, match=r"nothing lies outside an unbounded grid"):
        random_sites(9, outside=1, bounded=False)


def test_surface_sites():
    sites = surface_sites(20, batch_size=2)
    sites.validate()
    assert sites.coords.tolist() == sorted(sites.coords.tolist())
    distance = (sites.coords[:, 1:] - 19.5).norm(dim=1)
    assert distance.max() <= 20
    assert distance.min() >= 18.75
    assert sites.grid.shape == (40, 40, 40)


@pytest.mark.parametrize("n", [0, 1, 27])
def test_random_sites_may_be_none_or_fill_their_grid(n):
    sites = random_sites(n, extent=3, batch_size=1)
    sites.validate()
    assert len(sites.coords.unique(dim=0)) == n


def test_block_sites():
    sites = block_sites((2, 3), 2)
    sites.validate()
    assert sites.num_rows == sites.grid.num_cells == 12


def test_the_noise_of_a_sweep_is_along_the_rays_and_has_the_given_spread():
    exact, noisy = (
        simulate_sweep(3, beams=32, azimuths=64, range_noise=noise).points[:, :3].double()
        for noise in (0.0, 0.05)
    )
    rays = exact / exact.norm(dim=1, keepdim=True)
    along = ((noisy - exact) * rays).sum(1)
    torch.testing.assert_close(noisy, exact + along[:, None] * rays, rtol=0, atol=1e-4)
    # Six standard errors of the mean and of the deviation.
    error = 6 * 0.05 / len(along) ** 0.5
    assert abs(along.mean()) < error
    assert abs(along.std() - 0.05) < error


def test_a_simulated_van_is_larger_than_every_car():
    boxes = torch.cat([simulate_sweep(seed, beams=2, azimuths=4).boxes for seed in range(3)])
    is_van = boxes[:, 3] > 4.85
    assert is_van.any()
    assert (boxes[is_van, 3:6].amin(0) > boxes[~is_van, 3:6].amax(0)).all()


def test_tolerance_is_twice_rounding_and_eager_error():
    reference = torch.tensor([1.0, -4.0], dtype=torch.float64)
    eps = torch.finfo(torch.float16).eps
    assert tolerance(reference, torch.float16) == 8 * eps
    eager = torch.tensor([1.5, -4.0], dtype=torch.float16)
    assert tolerance(reference, torch.float16, eager) == 1 + 8 * eps
    assert tolerance(torch.zeros(0), torch.float16) == 0


def test_assert_close_names_the_worst_entry():
    reference = torch.zeros(2, 3, dtype=torch.float64)
    reference[0, 0] = 1
    actual = reference.float()
    assert_close(actual, reference)
    actual[1, 2] = 0.5
    actual[0, 1] = 0.25
    with pytest.raises(
        AssertionError, match=r"dfeats\[1, 2\] must be 0 in float64; got 0.5: .*; 2 of 6 entries do"
    ):
        assert_close(actual, reference, name="dfeats")


def test_assert_close_refuses_nan_and_other_shapes():
    reference = torch.ones(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"result\[1\] must be 1 .* got nan"):
        assert_close(torch.tensor([1.0, float("nan")]), reference)
    with pytest.raises(AssertionError, match=r"must have shape \[2\]; got \[2, 1\]"):
        assert_close(torch.ones(2, 1), reference)
    assert_close(torch.ones(0), torch.ones(0, dtype=torch.float64))


def test_assert_matches_judges_by_the_dtype():
    a, b = torch.randn(30, 500), torch.randn(500, 30)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        low = [x.to(dtype) for x in (a, b)]
        assert_matches(torch.mm(*low), torch.mm, *low)
    with pytest.raises(AssertionError, match=r"torch\.float32"):
        assert_matches(torch.mm(a.half(), b.half()).float(), torch.mm, a, b)
