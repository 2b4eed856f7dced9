"""Write docs/errors.md: the error messages of each public call for invalid arguments.

    python scripts/tools/error_page.py

The page comes from running the mistakes of tests/_hostile.py; tests/test_error_page.py compares.
"""

from __future__ import annotations

import linecache
import re
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from tests import _hostile  # noqa: E402
from tritonspconv import guide  # noqa: E402

PAGE = ROOT / "docs" / "errors.md"
HEAD = """\
# Errors

A call with an invalid argument raises an error at once. The message names the expected value, the
value received, and a way to fix the call. `TypeError` means a wrong type. `ValueError` means a
wrong shape, value or device. `NotImplementedError` means a valid request that is not supported.
`RuntimeError` means a problem of the environment. The adapters raise `SpconvError` and
`MinkowskiError`. These classes derive from `AssertionError`, `ValueError` and `RuntimeError`,
because programs catch these errors of the originals. After every error the next valid call works:
`scripts/tools/fuzz.py` makes thousands of mistakes and checks a valid call after each one.

This page lists the errors of the mistakes in `tests/_hostile.py`. Each kind of error has one line,
with the first value that causes it. A message that names an entry of
[troubleshooting](troubleshooting.md) ends with a link to that entry.
`scripts/tools/error_page.py` writes this page.
"""


def page() -> str:
    """Return the page."""
    lines = [HEAD]
    for name, call in _hostile.calls().items():
        rows = []
        for argument in call.arguments():
            known = set()
            for value, make in _hostile.VALUES.items():
                if (argument, value) in _hostile.LEGAL_BUT_LARGE:
                    continue
                error = _hostile.outcome(call, argument, make)
                if error is None or not _is_ours(error):
                    continue
                kind = type(error).__name__, re.sub(r"got .*", "", str(error), flags=re.DOTALL)
                if kind not in known:
                    known.add(kind)
                    rows.append(f"| `{argument}` | {value} | {kind[0]} | {_cell(str(error))} |")
        if rows:
            lines += [f"\n## `{name}`\n", "| argument | value | error | words |"]
            lines += ["| --- | --- | --- | --- |", *rows]
    return "\n".join([*lines, ""])


def _is_ours(error: BaseException) -> bool:
    """Return whether the package raises it in so many words: others' change with their versions."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    assert traceback is not None
    path = Path(traceback.tb_frame.f_code.co_filename)
    ours = any(folder in path.parents for folder in (ROOT / "tritonspconv", ROOT / "compat"))
    is_raised = linecache.getline(str(path), traceback.tb_lineno).strip().startswith("raise ")
    return ours and is_raised and " at 0x" not in str(error)


def _cell(message: str) -> str:
    """Return a message in a line; the link to its entry, if it has one, leads into the page."""
    text = " ".join(guide.without_more(message).split()).replace("|", "\\|")
    text = text if len(text) <= 300 else f"{text[:297]}..."
    entry = guide.entry_of(message)
    return f"{text} [More](troubleshooting.md#{entry})" if entry else text


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    PAGE.write_text(page())
