"""A check that the name ``compat`` means the adapters of this engine, not another module."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path

ADAPTERS = Path(__file__).parents[1] / "compat"


def foreign_module(first: str | None = None) -> str | None:
    """Return the file of another module called ``compat`` that Python would import; None: none.

    The function imports nothing. A module that is imported already counts before modules on the
    path.

    Args:
        first: A folder to look into before ``sys.path``.
    """
    module = sys.modules.get("compat")
    if module is not None:
        origin = getattr(module, "__file__", None) or repr(module)
        return None if _is_ours(origin) else origin
    path = sys.path if first is None else [first, *sys.path]
    spec = PathFinder.find_spec("compat", [entry or "." for entry in path])
    if spec is None:
        return None
    # A package without __init__.py has no origin.
    places = list(spec.submodule_search_locations or [])
    origin = spec.origin or (places[0] if places else repr(spec))
    return None if _is_ours(origin) else origin


def _is_ours(origin: str) -> bool:
    return Path(origin).resolve() == (ADAPTERS / "__init__.py").resolve()
