"""The packages that CI may lack, and how many tests may be skipped for each reason.

A test that is skipped because Triton or an original is missing looks like a test that passed. In
CI, all packages that the tests need must be there, and each skip needs a reason of this list.
"""

import importlib
import os
import re
import sys
from collections import Counter
from pathlib import Path

# Import names. MinkowskiEngine has no wheel on an index, so CI needs it only if a wheel was given.
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
    """Return a line for each package that the tests need in CI and that cannot be imported.

    Args:
        wheels: Folder of wheels; None: the folder that ``MINKOWSKI_WHEELS`` names.
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
    """Return a line for each reason for which too many tests were skipped."""
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
