"""Every parity case: live beside the original where that is installed, else against goldens."""

import functools

import pytest

from tests.parity import golden, suite
from tests.parity.case import Case
from tests.parity.judge import Verdict, compare
from tests.parity.originals import ORIGINALS, Original
from tests.parity.side import jobs_of, run

pytestmark = [
    pytest.mark.parity,
    # An original may count on what it happens to get.
    pytest.mark.real_empty,
]

ALL = [(original, case) for original in ORIGINALS.values() for case in original.cases.values()]


def _parameters(target: str):
    return [
        pytest.param(original, case, id=f"{original.name}-{case.name}")
        for original, case in ALL
        if target in case.dtypes
    ]


def _check(original: Original, case: Case, target: str, recorded=None) -> None:
    """Compare in every dtype; ``recorded`` holds the original's results if it is not run."""
    for precision, roles in jobs_of(case, target, golden=recorded is not None).items():
        done = {
            job: recorded[job.case, precision] if recorded and job.original else None
            for job in roles.values()
        }
        for job, known in done.items():
            done[job] = known or run(original, case, target, job)
        result = compare(case, precision, target, suite.recordings(roles, done))
        assert result.verdict is not Verdict.DIFFERENT, f"{precision}: {result.problems}"


@pytest.mark.parametrize(("original", "case"), _parameters("cpu"))
def test_cpu(original, case):
    if not original.installed:
        pytest.skip(f"the original, {original.name}, is not installed")
    _check(original, case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("original", "case"), _parameters("cuda"))
def test_gpu(original, case):
    if not original.installed:
        pytest.skip(f"the original, {original.name}, is not installed")
    _check(original, case, "cuda")


@functools.cache
def _golden(name: str):
    return golden.load(golden.path_of(name))[1]


@pytest.mark.parametrize(
    ("original", "case"), [p for p in _parameters("cuda") if p.values[1].golden]
)
def test_golden(original, case):
    """The adapter on the CPU does what the original did on a GPU."""
    if not golden.path_of(original.name).exists():
        pytest.skip(f"no golden file of {original.name}")
    _check(original, case, "cuda", _golden(original.name))
