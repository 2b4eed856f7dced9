"""The code of the README runs without changes."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[str]:
    """Return the Python blocks after the heading Quickstart, which build on one another."""
    quickstart = README.read_text().split("## Quickstart")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", quickstart, flags=re.DOTALL)


def test_quickstart_runs(capsys: pytest.CaptureFixture[str]):
    found = blocks()
    assert len(found) == 2
    names: dict[str, object] = {}
    for block in found:
        exec(compile(block, str(README), "exec"), names)
    assert names["x"].features.shape[1] == 4
    assert "torch.Size([1, 16, 8, 80, 80])" in capsys.readouterr().out
