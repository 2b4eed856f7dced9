"""A second spelling of the adapters: ``tritonspconv.compat.spconv`` is ``compat.spconv``.

``import tritonspconv.compat.spconv.pytorch as spconv`` gives the very module that
``import compat.spconv.pytorch as spconv`` gives: one object under two names, so code may mix the
two spellings. This spelling finds the adapters that belong to this engine even where another module
called ``compat`` is earlier on the path. The engine does not import this package.

The other module loses the name ``compat`` in a process that uses the adapters. A warning names the
file. If that module was imported before, the import of the adapters fails and says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from tritonspconv._compat_name import ADAPTERS, foreign_module
from tritonspconv.guide import more


def _claim_name() -> ModuleType:
    """Return the adapters' own top-level package, imported under the name ``compat``.

    Raises:
        ImportError: Another module called ``compat`` was imported before.
    """
    foreign = foreign_module()
    if "compat" in sys.modules:
        if foreign is not None:
            raise ImportError(
                f"tritonspconv.compat: the name 'compat' must mean the adapters; got {foreign}, "
                "imported earlier in this process. Rename that module, or import the adapters "
                "before it." + more("hidden-compat")
            )
        return sys.modules["compat"]
    if foreign is not None:
        warnings.warn(
            f"tritonspconv.compat: {foreign} is hidden by the adapters, which have the same name. "
            "If your program imports it, rename it." + more("hidden-compat"),
            RuntimeWarning,
            stacklevel=2,
        )
    file = ADAPTERS / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "compat", file, submodule_search_locations=[str(ADAPTERS)]
    )
    if spec is None or spec.loader is None or not file.is_file():
        raise ImportError(
            f"tritonspconv.compat: the adapters must be in {ADAPTERS}; there is no such package. "
            "Install tritonspconv again."
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules["compat"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["compat"]
        raise
    return module


class _SecondName(MetaPathFinder, Loader):
    """Finds ``tritonspconv.compat.X`` where ``compat.X`` is, and hands out that module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a module below this package; None for others."""
        if not fullname.startswith(f"{__name__}."):
            return None
        found = importlib.util.find_spec(_own_name(fullname))
        if found is None:
            return None
        spec = ModuleSpec(fullname, self, origin=found.origin)
        spec.submodule_search_locations = found.submodule_search_locations
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the module by its own name and return it."""
        module = importlib.import_module(_own_name(spec.name))
        # The import system puts the second name's spec on the module; exec_module undoes that.
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back; it has run already."""
        if module.__spec__ is not None:
            module.__spec__ = self._specs.pop(module.__spec__.name, module.__spec__)

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}


def _own_name(name: str) -> str:
    return name.removeprefix("tritonspconv.")


_package = _claim_name()
Installation, install, uninstall = _package.Installation, _package.install, _package.uninstall
# No file lies below this package: its modules are found by the finder alone.
__path__: list[str] = []
sys.meta_path.insert(0, _SecondName())

__all__ = ["Installation", "install", "uninstall"]
