"""Run many cases on both libraries, live or against a golden file."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.parity import golden
from tests.parity.case import Case, Recording
from tests.parity.judge import Recordings, Result, compare
from tests.parity.originals import Original
from tests.parity.side import ROOT, Job, environment, jobs_of, run_processes

Report = tuple[dict[str, str], list[Result]]

_DESCRIBE = "from tests.parity import originals as o; print(o.describe({!r}, {!r}))"


def live(
    original: Original, cases: Sequence[Case], target: str, python: str, processes: int = 1
) -> Report:
    """Compare with the original, each library in processes of its own.

    Args:
        original: The original, which must be importable by ``python``.
        cases: The cases to compare.
        target: ``"cpu"`` or ``"cuda"``.
        python: The interpreter for the original.
        processes: Number of processes for each library and device.
    """
    setting = describe(original, target, python)
    plans = [(case, jobs_of(case, target)) for case in cases]
    done = record(original, target, _jobs(plan for _, plan in plans), python, processes)
    return setting, [
        compare(case, precision, target, recordings(roles, done))
        for case, plan in plans
        for precision, roles in plan.items()
    ]


def against_golden(original: Original, cases: Sequence[Case], processes: int = 1) -> Report:
    """Compare the recordings in the original's golden file with the adapter on the CPU.

    Raises:
        RuntimeError: The golden file lacks a case.
    """
    setting, recorded = golden.load(golden.path_of(original))
    target = original.golden_target
    plans = [(case, jobs_of(case, target, golden=True)) for case in cases]
    done: dict[Job, Recording] = {}
    for case, plan in plans:
        for precision, roles in plan.items():
            if (case.name, precision) not in recorded:
                raise RuntimeError(
                    f"the golden file of {original.name} lacks {case.name} in {precision}: record "
                    "it anew with scripts/tools/make_golden.py."
                )
            done[roles["original"]] = recorded[case.name, precision]
    jobs = [job for job in _jobs(plan for _, plan in plans) if not job.original]
    done |= record(original, target, jobs, sys.executable, processes)
    return setting, [
        compare(case, precision, target, recordings(roles, done))
        for case, plan in plans
        for precision, roles in plan.items()
    ]


def record(
    original: Original, target: str, jobs: Iterable[Job], python: str, processes: int = 1
) -> dict[Job, Recording]:
    """Run jobs in processes side by side, each for one library and device.

    Args:
        original: The original.
        target: ``"cpu"`` or ``"cuda"``.
        jobs: Jobs of both libraries.
        python: The interpreter for the original.
        processes: Number of processes for each library and device.
    """
    groups: dict[tuple[bool, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.original, job.device), []).append(job)
    shares = [
        share
        for group in groups.values()
        for share in (group[first::processes] for first in range(processes))
        if share
    ]

    def run_share(number: int) -> dict[Job, Recording]:
        side = python if shares[number][0].original else sys.executable
        return run_processes(original, target, shares[number], Path(folder) / str(number), side)

    done: dict[Job, Recording] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(max_workers=len(shares)) as pool,
    ):
        for part in pool.map(run_share, range(len(shares))):
            done |= part
    return done


def record_golden(original: Original, path: Path, python: str, processes: int) -> int:
    """Run all cases on the original and write the golden file; return the number of runs.

    Args:
        original: The original, which must be importable by ``python``.
        path: The file.
        python: The interpreter for the original.
        processes: Number of processes.
    """
    target = original.golden_target
    jobs = [
        roles["original"]
        for case in original.cases.values()
        for roles in jobs_of(case, target).values()
    ]
    done = record(original, target, jobs, python, processes)
    golden.save(path, describe(original, target, python), done)
    return len(done)


def describe(original: Original, target: str, python: str) -> dict[str, str]:
    """Return versions and device, as the original's interpreter sees them.

    Raises:
        RuntimeError: The interpreter cannot run the original on ``target``.
    """
    command = [python, "-c", _DESCRIBE.format(original.name, target)]
    found = subprocess.run(
        command, cwd=ROOT, env=environment(), check=False, capture_output=True, text=True
    )
    if found.returncode:
        lines = found.stderr.strip().splitlines()
        raise RuntimeError(f"{python} cannot run {original.name} on {target}: {lines[-1]}")
    return json.loads(found.stdout.splitlines()[-1])


def _jobs(plans: Iterable[Mapping[str, Mapping[str, Job]]]) -> list[Job]:
    """Return every job once, in order."""
    return list(
        dict.fromkeys(job for plan in plans for roles in plan.values() for job in roles.values())
    )


def recordings(roles: Mapping[str, Job], done: Mapping[Job, Recording]) -> Recordings:
    """Return the recordings of a comparison."""
    found = {role: done[job] for role, job in roles.items()}
    plain = [recording for role, recording in found.items() if role.startswith("plain")]
    return Recordings(found["original"], found["adapter"], found.get("truth"), plain)
