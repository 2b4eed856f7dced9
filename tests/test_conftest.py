"""Conditions on which every test may rely, and tests that CI may not skip."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import _process, _skips


@pytest.mark.parametrize("turn", [1, 2])
def test_a_test_starts_on_one_thread_whatever_the_last_one_set(turn):
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)


def test_unwritten_memory_holds_no_number_that_passes_for_a_result():
    assert torch.empty(3).isnan().all()
    assert (torch.empty(3, dtype=torch.int32).abs() > 2**30).all()


@pytest.mark.parametrize("reason", ["no golden file of spconv", "no network today"])
def test_a_skip_that_is_not_listed_is_over_budget(reason):
    assert _skips.over_budget([reason]) == [f"1 skipped, 0 allowed: {reason}"]


def test_skips_within_the_budget_are_passed_over():
    reasons = ["no GPU: torch.cuda.is_available() is False"] * 5000 + ["needs two GPUs"] * 2
    assert not _skips.over_budget(reasons)
    assert _skips.over_budget([*reasons, "needs two GPUs"]) == [
        "3 skipped, 2 allowed: needs two GPUs"
    ]


def test_a_wheel_that_was_given_has_to_be_importable(tmp_path, monkeypatch):
    monkeypatch.setattr(_skips, "NEEDED", ("no_such_package",))
    monkeypatch.setitem(sys.modules, "MinkowskiEngineBackend", None)
    (without,) = _skips.missing(str(tmp_path))
    assert without.startswith("no_such_package cannot be imported")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheel = _process.write(tmp_path, f"minkowskiengine-0.5.4-{tag}-{tag}-linux_x86_64.whl", "")
    assert f"It was to come from {wheel}." in _skips.missing(str(tmp_path))[1]


def _pytest(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run pytest on a single new file, under the rules of this suite."""
    test = "import pytest\n\ndef test_it():\n    pytest.skip('no network today')\n"
    path = _process.write(folder, "test_skipped.py", test)
    return subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider",
            "--rootdir", str(folder), *arguments, str(path),
        ],
        cwd=_process.ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("workers", ["0", "1"])
def test_ci_fails_where_a_test_is_skipped_for_a_reason_that_is_not_listed(tmp_path, workers):
    process = _pytest(tmp_path, "-n", workers, CI="1")
    assert process.returncode == 1, process.stdout + process.stderr
    assert "1 skipped, 0 allowed: no network today" in process.stdout
    assert "examples of properties: --hypothesis-seed=20" in process.stdout


def test_anywhere_else_the_run_passes_and_says_what_ci_would_refuse(tmp_path):
    process = _pytest(tmp_path, CI="")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "CI allows fewer skips" in process.stdout
    assert "1 skipped, 0 allowed: no network today" in process.stdout
    assert "examples of properties: at random" in process.stdout
