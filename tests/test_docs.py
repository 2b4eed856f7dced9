"""The Python blocks of pages in docs/ that promise to run do run, on a CPU."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["capture.md"])
def test_blocks_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    assert found
    names: dict[str, object] = {}
    for block in found:
        exec(compile(block, page, "exec"), names)
    assert "torch.Size([1, 160, 20, 20])" in capsys.readouterr().out
