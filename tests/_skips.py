"""What may be missing in CI, and how many tests may be skipped for it: a budget of skips.

A test that is skipped for want of Triton or of an original reads like one that passed. In CI, what
the tests need must be there, and each skip must have a reason that is listed here.
"""

import importlib
import os
import re
import sys
from collections import Counter
from pathlib import Path

# Import names. MinkowskiEngine has no wheels on an index: it is needed where one was given.
NEEDED = ("triton", "numba", "spconv")

# Reason of a skip, as a pattern -> the most tests that may have it.
ANY_NUMBER = sys.maxsize
BUDGET = {
    r"no GPU: torch\.cuda\.is_available\(\) is False": ANY_NUMBER,
    r"needs two GPUs": 2,
    r"capturable=True needs a GPU": 1,
    # Parameters that do not go together.
    r"only tiles of half operands are that large": 8,
    r"weight gradients do not depend on the number of rows": 80,
    r"compiles Triton kernels: needs TRITON_INTERPRET unset": ANY_NUMBER,
    r"launches Triton kernels: needs a GPU or TRITON_INTERPRET=1": ANY_NUMBER,
    r"no golden file of \w+": 0,
    r"the original, MinkowskiEngine, is not installed": ANY_NUMBER,
}


def missing(wheels: str | None = None) -> list[str]:
    """Return, for each package that the tests need in CI and cannot import, a line that says so.

    Args:
        wheels: Folder of wheels that CI was given; None: what ``MINKOWSKI_WHEELS`` names.
    """
    lines = [line for name in NEEDED if (line := _import_error(name))]
    if wheel := minkowski_wheel(wheels):
        line = _import_error("MinkowskiEngineBackend")
        lines += [f"{line} It was to come from {wheel}."] if line else []
    return lines


def minkowski_wheel(wheels: str | None = None) -> Path | None:
    """Return the wheel of MinkowskiEngine for this Python that CI was given, if there is one."""
    folder = wheels or os.environ.get("MINKOWSKI_WHEELS")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = sorted(Path(folder).glob(f"minkowskiengine-*-{tag}-*.whl")) if folder else []
    return found[0] if found else None


def _import_error(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"{name} cannot be imported ({error})."
    return None


def over_budget(reasons: list[str]) -> list[str]:
    """Return, for each reason that more tests were skipped for than may be, a line that says so."""
    lines = []
    for reason, count in sorted(Counter(reasons).items()):
        allowed = next((n for pattern, n in BUDGET.items() if re.search(pattern, reason)), 0)
        if count > allowed:
            lines.append(f"{count} skipped, {allowed} allowed: {reason}")
    return lines


def reason_of(report: object) -> str:
    """Return the reason of a skipped test's report."""
    longrepr = getattr(report, "longrepr", None)
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")
