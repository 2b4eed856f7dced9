"""A plan records sizes, recalls facts about the example, and reports runs that do not fit."""

import pytest
import torch

from tritonspconv.coords import Grid
from tritonspconv.coords.row_tensor import RowBounds, as_rows
from tritonspconv.coords.site_plan import Report, SitePlan


def test_later_runs_recall_what_the_example_answered() -> None:
    recorded = SitePlan()
    asked = [recorded.recall(lambda answer=answer: answer) for answer in ("first", "second")]
    plan = recorded.bounded([7])
    for _ in range(2):
        plan.start()
        assert plan.is_running
        assert [plan.recall(pytest.fail) for _ in asked] == asked
        with pytest.raises(RuntimeError, match="more than 2 tensors of coordinates"):
            plan.recall(pytest.fail)
        plan.finish()
        assert not plan.is_running


def test_reports_are_flags_of_one_run() -> None:
    plan = SitePlan([7])
    plan.start()
    plan.report(Report.OUTSIDE, torch.tensor([False]))
    plan.report(Report.OUTSIDE, torch.tensor(3))
    plan.finish()
    assert plan.flags.tolist() == [0, 1, 0, 0]
    plan.start()
    plan.finish()
    assert not plan.flags.any()


def test_constants_are_made_once() -> None:
    plan = SitePlan([7])
    rows = (0, -1), (2, 3)
    assert plan.constant(*rows).tolist() == [[0, -1], [2, 3]]
    assert plan.constant(*rows) is plan.constant(*rows)


@pytest.mark.parametrize(
    ("shape", "margin"),
    [((10, 1), (5, 1)), ((600, 600), (300, 300)), ((8000, 8000), (62, 62)), ((9000, 9000), (1, 1))],
)
def test_a_margin_fits_an_index_of_16_mib(shape: tuple[int, int], margin: tuple[int, int]) -> None:
    found = Grid((-3, 4), shape, 1, bounded=False).with_margin()
    assert found.lower == (-3 - margin[0], 4 - margin[1])
    assert found.shape == (shape[0] + 2 * margin[0], shape[1] + 2 * margin[1])
    assert not found.bounded


def test_a_margin_stays_within_int32() -> None:
    grid = Grid((-(2**31), 2**31 - 5), (4, 4), 1, bounded=False).with_margin()
    assert grid.lower == (-(2**31), 2**31 - 7)
    assert grid.upper == (-(2**31) + 5, 2**31 - 1)


def test_the_grid_of_padded_rows_reports_those_outside() -> None:
    coords = torch.tensor([[0, 0, 0], [0, 9, 9], [0, 99, 0], [-1, 0, 0]]).int()
    recorded = SitePlan()
    Grid.around(as_rows(coords[:2], RowBounds(None, recorded)))
    plan = recorded.bounded([])
    for count, outside in ((2, 0), (3, 1)):
        plan.start()
        grid = Grid.around(as_rows(coords, RowBounds(torch.tensor(count), plan)))
        plan.finish()
        assert (grid.lower, grid.upper) == ((-5, -5), (14, 14))
        assert plan.flags[Report.OUTSIDE] == outside
