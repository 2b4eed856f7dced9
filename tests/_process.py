"""Run Python in a process of its own, for tests of its start-up."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*arguments: object, cwd: Path, status: int = 0, **environment: str):
    """Run Python in a process of its own and check its exit status."""
    inherited = {key: os.environ[key] for key in os.environ if not key.startswith("COMPAT_")}
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode == status, process.stdout + process.stderr
    return process


def write(folder: Path, name: str, text: str) -> Path:
    """Write a module or script and return its path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
