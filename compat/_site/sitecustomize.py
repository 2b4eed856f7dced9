"""Make the switches named in ``COMPAT_INSTALL`` as Python starts.

``compat.install`` and ``python -m compat`` put this folder first in ``PYTHONPATH``. This file takes
the folder off the path again and runs the ``sitecustomize`` that it hid.
"""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path


def _install() -> None:
    libraries = [name for name in os.environ.get("COMPAT_INSTALL", "").split(",") if name]
    if not libraries:
        return
    # Another top-level ``compat`` may be on the path.
    root = str(Path(__file__).parents[2])
    sys.path.insert(0, root)
    try:
        import compat
    finally:
        sys.path.remove(root)
    for library in libraries:
        compat.install(library, workers=False)  # The variables are there already.


def _run_hidden() -> None:
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
try:
    _install()
finally:
    _run_hidden()
