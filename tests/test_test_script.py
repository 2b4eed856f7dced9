"""The exit status of scripts/test.sh, with a script in place of Python."""

import os
import re
import subprocess

import pytest

from tests import _process

# Each call of pytest ends with the next status; all checks before the tests pass.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    "-m pytest "*) line=$(head -n 1 statuses); sed -i 1d statuses; exit "$line" ;;
    *executable*) echo "$(dirname "$0")/python" ;;
    *cuda*) exit 1 ;;
esac
"""


def run_script(folder, statuses: list[int], *arguments: str) -> subprocess.CompletedProcess:
    """Run a copy of the script whose runs of pytest end with ``statuses``."""
    script = _process.write(
        folder, "scripts/test.sh", (_process.ROOT / "scripts/test.sh").read_text()
    )
    _process.write(folder, "statuses", "".join(f"{status}\n" for status in statuses))
    for name in ("python", "lint-imports"):
        _process.write(folder, f"bin/{name}", PYTHON).chmod(0o755)
    return subprocess.run(
        ["bash", str(script), *arguments],
        env={**os.environ, "SKIP_INSTALL": "1", "PYTHON": str(folder / "bin/python")},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("statuses", "arguments", "expected"),
    [
        pytest.param([0, 0], [], 0, id="passed"),
        pytest.param([1, 0], [], 1, id="failed"),
        pytest.param([0, 1], [], 1, id="failed-last"),
        pytest.param([5, 0], [], 5, id="empty-suite"),
        pytest.param([5, 0], ["-k", "conv"], 0, id="selected-in-one-run"),
        pytest.param([0, 5], ["-k", "conv"], 0, id="selected-in-the-other"),
        pytest.param([5, 5], ["-k", "typo"], 5, id="selected-in-none"),
    ],
)
def test_status(tmp_path, statuses, arguments, expected):
    process = run_script(tmp_path, statuses, *arguments)
    assert process.returncode == expected, process.stdout + process.stderr
    assert ("all checks passed" in process.stdout) == (expected == 0)
    if arguments == ["-k", "typo"]:
        assert "no test was run: none is selected by -k typo" in process.stdout


def test_hooks_are_the_checks_of_the_script():
    """Pyright uses the Python in which it runs; the script may run with another Python."""
    script = (_process.ROOT / "scripts/test.sh").read_text()
    commands = re.findall(r'^(?:PYTHONPATH=\. )?"\$(?:python"|bin/)(.*)$', script, re.MULTILINE)
    checks = [
        command.replace('"', "").replace(" --pythonpath $python", "").strip()
        for command in commands
    ]
    hooks = (_process.ROOT / ".pre-commit-config.yaml").read_text()
    entries = re.findall(r"entry: (?:python|env PYTHONPATH=\.) (.*)$", hooks, re.MULTILINE)
    assert len(entries) == hooks.count("- id:") == 4
    assert entries == checks
