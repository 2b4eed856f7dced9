"""Names of spconv's modules that live elsewhere here, and names that are not provided."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn


def module_getattr(
    module: str,
    *,
    modules: Mapping[str, str] | None = None,
    elsewhere: Mapping[str, str] | None = None,
    refused: Mapping[str, str] | None = None,
    otherwise: str | None = None,
) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module whose original re-exports names of others.

    A name is looked up on first access, so that modules need not import one another.

    Args:
        module: The module's name in messages.
        modules: Names that mean modules, with these modules: ``{"tv": "compat.cumm.tensorview"}``.
        elsewhere: Modules, each with the names of its own that this module shows, separated by
            spaces.
        refused: Names that are not provided, separated by spaces, each with advice.
        otherwise: The advice for every other public name.
    """
    targets: dict[str, tuple[str, str | None]] = {
        name: (target, None) for name, target in (modules or {}).items()
    }
    for target, names in (elsewhere or {}).items():
        targets.update({name: (target, name) for name in names.split()})
    hints = {name: hint for names, hint in (refused or {}).items() for name in names.split()}

    def getattr_(name: str) -> Any:
        if name in targets:
            target, attribute = targets[name]
            found = importlib.import_module(target)
            return found if attribute is None else getattr(found, attribute)
        text = f"module {module!r} has no attribute {name!r}"
        hint = hints.get(name, None if name.startswith("_") else otherwise)
        if hint is not None:
            text += f": not provided. {hint}"
        raise AttributeError(text)

    return getattr_


def refuse_module(module: str, hint: str) -> NoReturn:
    """Refuse to import a module of spconv that is not provided.

    Args:
        module: Its name.
        hint: The name's meaning, and what to use instead.

    Raises:
        ImportError: Always.
    """
    raise ImportError(f"{module} is not provided. {hint}", name=module)
