"""Run cases on one library, in this process or in a process of its own, and keep the recordings.

`tritonspconv parity` starts ``python -m tests.parity.side`` for each library. That process runs
the jobs listed in a file and writes a file for each recording, so a crash loses one job only.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from tests.parity.case import IN_THE_CASE, Case, Recording, Run
from tests.parity.originals import Original

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
JOBS = "jobs.pickle"
_FOLDERS = re.compile(r"(?<![^\s'\"])/\S*/")  # of absolute paths
SLOW = 5  # seconds; such jobs are named on stderr


@dataclass(frozen=True)
class Job:
    """One run: a case on the original or the adapter, in a dtype, on a device, inputs nudged."""

    case: str
    original: bool
    precision: str
    device: str
    nudge: int = 0


def jobs_of(case: Case, target: str, *, golden: bool = False) -> dict[str, dict[str, Job]]:
    """Return for each dtype the jobs of a comparison by their roles, see `judge.Recordings`.

    The roles of plain runs are ``"plain0"``, ``"plain1"`` and so on.

    Args:
        case: The case.
        target: ``"cpu"`` or ``"cuda"``, the device whose behaviour is compared.
        golden: Take the original's results from a file, and run the adapter on the CPU.
    """
    device = "cpu" if golden else target
    reference = target == "cpu" and not golden  # True: the original makes the reference runs.
    jobs = {}
    for precision in case.dtypes.get(target, ()):
        plain = "float32" if precision == "float64" else precision
        jobs[precision] = {
            "original": Job(case.name, True, precision, target),
            "adapter": Job(case.name, False, precision, device),
        }
        if not case.exact:
            jobs[precision]["truth"] = Job(case.name, reference, "float64", "cpu")
            for nudge in range(1 + case.nudges):
                job = Job(case.name, reference, plain, "cpu", nudge)
                jobs[precision][f"plain{nudge}"] = job
    return jobs


def run(original: Original, case: Case, target: str, job: Job) -> Recording:
    """Run a case in this process, and record its results or its error."""
    if job.original:
        original.prepare(target)
    root = original.name if job.original else original.adapter
    state = Run(
        case.name, root, job.original, target, torch.device(job.device), job.precision, job.nudge
    )
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    try:
        case.function(state)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(_FOLDERS.sub("", str(error)).split())[:200]
        file = Path(where.filename)
        place = f"{file.name}:{where.lineno}"
        if TESTS in file.parents:
            place += IN_THE_CASE
        return Recording(error=f"{type(error).__name__} at {place}: {text}")
    return state.recording


def run_processes(
    original: Original, target: str, jobs: Sequence[Job], folder: Path, python: str
) -> dict[Job, Recording]:
    """Run jobs of one library in a process; if a job ends the process, record that as its error.

    Args:
        original: The original.
        target: ``"cpu"`` or ``"cuda"``.
        jobs: All on the same library.
        folder: For the recordings; made if absent.
        python: The interpreter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[Job, Recording] = {}
    while len(done) < len(jobs):
        todo = [job for job in jobs if job not in done]
        # `replace` drops the cached cases; the process looks cases up by name.
        (folder / JOBS).write_bytes(pickle.dumps((replace(original), target, todo)))
        command = [python, "-m", "tests.parity.side", str(folder)]
        process = subprocess.run(command, cwd=ROOT, env=environment(), check=False)
        for number, job in enumerate(todo):
            file = folder / f"{number}.pt"
            if not file.exists():
                done[job] = Recording(error=f"the process died with status {process.returncode}")
                break
            done[job] = Recording(**torch.load(file, weights_only=True))
            file.unlink()
    return done


def environment() -> dict[str, str]:
    """Return the environment of a process of a side: one thread, this repository's modules."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def main() -> None:
    """Run the jobs listed in a folder, in order."""
    folder = Path(sys.argv[1])
    original, target, jobs = pickle.loads((folder / JOBS).read_bytes())
    torch.set_num_threads(1)
    for number, job in enumerate(jobs):
        start = time.perf_counter()
        recording = run(original, original.cases[job.case], target, job)
        unfinished = folder / "unfinished"
        torch.save(asdict(recording), unfinished)
        unfinished.rename(folder / f"{number}.pt")
        seconds = time.perf_counter() - start
        if seconds > SLOW:
            side = original.name if job.original else original.adapter
            sys.stderr.write(f"{side}, {job.case} {job.precision}: {seconds:.1f} s\n")


if __name__ == "__main__":
    main()
