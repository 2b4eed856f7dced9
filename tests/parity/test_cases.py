"""Every parity case as a test: live where the original is installed, and against golden files."""

import functools
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

from tests.parity import golden, suite
from tests.parity.case import Case, Recording
from tests.parity.judge import Verdict, compare
from tests.parity.originals import ORIGINALS, Original
from tests.parity.side import Job, jobs_of, run, run_processes

pytestmark = [
    pytest.mark.parity,
    # An original may rely on the contents of `torch.empty`.
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
    done: dict[Job, Recording] = {}
    for precision, roles in jobs_of(case, target, golden=recorded is not None).items():
        for job in roles.values():
            if job not in done:
                known = recorded[job.case, precision] if recorded and job.original else None
                done[job] = known or _run(original, case, target, job)
        result = compare(case, precision, target, suite.recordings(roles, done))
        assert result.verdict is not Verdict.DIFFERENT, f"{precision}: {result.problems}"


def _run(original: Original, case: Case, target: str, job: Job) -> Recording:
    if not (case.fatal and job.original):
        with warnings.catch_warnings():
            if job.original:
                # Warnings of an original are no errors of ours.
                warnings.simplefilter("ignore")
            return run(original, case, target, job)
    with tempfile.TemporaryDirectory() as folder:
        return run_processes(original, target, [job], Path(folder), sys.executable)[job]


def _skip_if_absent(original: Original, target: str) -> None:
    absence = original.absence(target)
    if absence:
        pytest.skip(absence)


@pytest.mark.parametrize(("original", "case"), _parameters("cpu"))
def test_cpu(original, case):
    _skip_if_absent(original, "cpu")
    _check(original, case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("original", "case"), _parameters("cuda"))
def test_gpu(original, case):
    _skip_if_absent(original, "cuda")
    _check(original, case, "cuda")


@functools.cache
def _golden(path: Path):
    return golden.load(path)[1]


@pytest.mark.parametrize(
    ("original", "case"),
    [
        parameter
        for target in ("cpu", "cuda")
        for parameter in _parameters(target)
        if parameter.values[0].golden_target == target
    ],
)
def test_golden(original, case):
    """The adapter on the CPU agrees with the original's golden file."""
    path = golden.path_of(original)
    if not path.exists():
        pytest.skip(f"no golden file of {original.name}")
    _check(original, case, original.golden_target, _golden(path))
