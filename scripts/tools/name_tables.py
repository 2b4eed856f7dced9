"""Write the tables of names in docs/from-spconv.md and docs/from-minkowski.md.

  python -m scripts.tools.name_tables

A row is a public name of the adapter and the first line of its docstring. A test compares the pages
with the code.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {"from-spconv.md": "compat.spconv.pytorch", "from-minkowski.md": "compat.minkowski"}
START, END = "<!-- names: start -->\n", "<!-- names: end -->"


def main() -> int:
    """Write the tables; return the exit status."""
    for page, module in PAGES.items():
        path = DOCS / page
        path.write_text(with_table(path.read_text(), table(module)))
    return 0


def table(name: str) -> str:
    """Return the Markdown table of a module's public classes and functions."""
    module = importlib.import_module(name)
    lines = ["| name | what it does here |", "| --- | --- |"]
    for public in sorted(module.__all__, key=str.lower):
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            first = (inspect.getdoc(value) or "").partition("\n")[0]
            lines.append(f"| `{public}` | {_markdown(first)} |")
    return "\n".join(lines) + "\n"


def with_table(page: str, rows: str) -> str:
    """Return the page with other rows between its markers."""
    before, _, rest = page.partition(START)
    return before + START + rows + END + rest.partition(END)[2]


def _markdown(line: str) -> str:
    line = re.sub(r":\w+:`([^`]+)`", r"`\1`", line).replace("``", "`")
    return line.replace("|", "\\|")


if __name__ == "__main__":
    raise SystemExit(main())
