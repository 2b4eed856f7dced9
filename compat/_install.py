"""Let an original's import names mean its adapter, so that code switches without edits."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType, TracebackType

# MinkowskiEngine puts its own folder on sys.path: its modules are top-level names as well.
_MINKOWSKI_MODULES = (
    "MinkowskiBroadcast",
    "MinkowskiChannelwiseConvolution",
    "MinkowskiCommon",
    "MinkowskiConvolution",
    "MinkowskiCoordinateManager",
    "MinkowskiFunctional",
    "MinkowskiInterpolation",
    "MinkowskiKernelGenerator",
    "MinkowskiNetwork",
    "MinkowskiNonlinearity",
    "MinkowskiNormalization",
    "MinkowskiOps",
    "MinkowskiPooling",
    "MinkowskiPruning",
    "MinkowskiSparseTensor",
    "MinkowskiTensor",
    "MinkowskiTensorField",
    "MinkowskiUnion",
)

# Library -> its top-level import names -> the modules that stand in for them. spconv's own data
# type lives in cumm, which downstream code imports beside it.
_ALIASES = {
    "spconv": {"spconv": "compat.spconv", "cumm": "compat.cumm"},
    "MinkowskiEngine": {
        "MinkowskiEngine": "compat.minkowski",
        "MinkowskiEngineBackend": "compat.minkowski._backend",
        **{name: f"compat.minkowski.{name}" for name in _MINKOWSKI_MODULES},
    },
}

# Library names, separated by commas; read by ``_site/sitecustomize.py`` as a process starts.
_VARIABLE = "COMPAT_INSTALL"
_PACKAGE = Path(__file__).parent
_SITE = str(_PACKAGE / "_site")


class Installation:
    """The result of ``install``, which also serves as a context manager.

    The end of the ``with`` block undoes the switch of this call. An earlier switch stays.

    Args:
        library: The original's name.
        fresh: True: this call made the switch, which was not in place before.
    """

    def __init__(self, library: str, fresh: bool) -> None:
        self.library = library
        self.fresh = fresh

    def __repr__(self) -> str:
        return f"Installation(library={self.library!r}, fresh={self.fresh})"

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.fresh:
            uninstall(self.library)


def install(library: str, *, workers: bool = True) -> Installation:
    """Make ``import <library>`` and imports below it mean the adapter.

    The modules are the adapter's own under a second name: ``spconv.pytorch.conv`` is
    ``compat.spconv.pytorch.conv``, and so are their classes. Nothing is imported before the first
    import by either name. Call it before anything that imports the original; a second call changes
    nothing.

    The switch holds in this process and in Python processes that it starts afterwards: workers that
    fork, are spawned or come from a fork server, and subprocesses. For processes that do not fork,
    the call sets ``COMPAT_INSTALL`` and ``PYTHONPATH`` in ``os.environ``. A process does not read
    them if it was started with ``-E``, ``-I`` or ``-S``, or with an environment of its own; nor
    does a fork server that was started before the call.

    Args:
        library: The original's name: ``"spconv"`` or ``"MinkowskiEngine"``.
        workers: False: do not change ``os.environ``. The switch then holds in this process and its
            forks.

    Returns:
        A context manager that undoes the switch; it need not be kept.

    Raises:
        ValueError: There is no such library.
        RuntimeError: The original was imported before.
    """
    aliases = aliases_of(library)
    fresh = _finder_of(library) is None
    if fresh:
        _refuse_imported(library, aliases)
        sys.meta_path.insert(0, _AliasFinder(library, aliases))
    if workers:
        announce(library, os.environ)
    return Installation(library, fresh)


def uninstall(library: str) -> None:
    """Undo ``install(library)``: later imports find the original again, or nothing.

    Names that are already bound to a module keep it. The variables that ``install`` put into
    ``os.environ`` are removed; processes that were started before keep the switch. Without an
    installation, nothing happens.

    Args:
        library: The original's name: ``"spconv"`` or ``"MinkowskiEngine"``.

    Raises:
        ValueError: There is no such library.
    """
    aliases = aliases_of(library)
    finder = _finder_of(library)
    if finder is not None:
        sys.meta_path.remove(finder)
        for alias, package in aliases.items():
            for name in _loaded(alias):
                if sys.modules[name] is sys.modules.get(_renamed(name, alias, package)):
                    del sys.modules[name]
    _withdraw(library, os.environ)


def aliases_of(library: str) -> Mapping[str, str]:
    """Return the import names of a library and the modules that stand in for them.

    Args:
        library: The original's name.

    Raises:
        ValueError: There is no such library.
    """
    known = ", ".join(repr(name) for name in _ALIASES)
    if library not in _ALIASES:
        raise ValueError(f"compat: library must be one of: {known}; got {library!r}.")
    return _ALIASES[library]


def announce(library: str, environment: MutableMapping[str, str]) -> None:
    """Set the variables that make Python processes switch at their start.

    Args:
        library: The original's name.
        environment: Variables of the processes to come; changed in place.
    """
    libraries = _entries(environment, _VARIABLE, ",")
    if library not in libraries:
        environment[_VARIABLE] = ",".join([*libraries, library])
    # An empty PYTHONPATH means no folder; an empty entry in a longer PYTHONPATH means the working
    # directory.
    paths = _entries(environment, "PYTHONPATH", os.pathsep)
    if _SITE not in paths:
        environment["PYTHONPATH"] = os.pathsep.join([_SITE, *paths])


def _withdraw(library: str, environment: MutableMapping[str, str]) -> None:
    libraries = _entries(environment, _VARIABLE, ",")
    if library not in libraries:
        return
    rest = [name for name in libraries if name != library]
    _set_entries(environment, _VARIABLE, rest, ",")
    if not rest:
        paths = [path for path in _entries(environment, "PYTHONPATH", os.pathsep) if path != _SITE]
        _set_entries(environment, "PYTHONPATH", paths, os.pathsep)


def _entries(environment: Mapping[str, str], variable: str, separator: str) -> list[str]:
    value = environment.get(variable)
    return value.split(separator) if value else []


def _set_entries(
    environment: MutableMapping[str, str], variable: str, entries: Sequence[str], separator: str
) -> None:
    if entries:
        environment[variable] = separator.join(entries)
    else:
        environment.pop(variable, None)


def _finder_of(library: str) -> _AliasFinder | None:
    for finder in sys.meta_path:
        if isinstance(finder, _AliasFinder) and finder.library == library:
            return finder
    return None


def _loaded(package: str) -> list[str]:
    """Return the names in ``sys.modules`` of a package and of its submodules."""
    return [name for name in list(sys.modules) if f"{name}.".startswith(f"{package}.")]


def _renamed(name: str, old: str, new: str) -> str:
    return new + name[len(old) :]


def _refuse_imported(library: str, aliases: Mapping[str, str]) -> None:
    for alias in aliases:
        found = _loaded(alias)
        if found:
            name = min(found)
            # The engine imports torch, which the start of a process does not need.
            from tritonspconv.guide import more

            origin = getattr(sys.modules[name], "__file__", None) or "no file"
            raise RuntimeError(
                f"compat.install: {alias!r} must not be imported yet; got {name!r} from "
                f"{origin}, imported earlier in this process. Call compat.install({library!r}) "
                f"before anything imports {alias}, or start the program by "
                f"python -m compat --as {library} -- SCRIPT." + more("late-install")
            )


class _AliasFinder(MetaPathFinder):
    """Finds ``spconv.X`` where ``compat.spconv.X`` is, and the engine beside this package.

    Args:
        library: The original's name.
        aliases: Top-level import names and the packages that stand in for them.
    """

    def __init__(self, library: str, aliases: Mapping[str, str]) -> None:
        self.library = library
        self._aliases = dict(aliases)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec whose loader hands out the adapter's module, or None."""
        if fullname == "tritonspconv":
            # A script's own path may lack the package, or find the package of another release.
            return PathFinder.find_spec(fullname, [str(_PACKAGE.parent)])
        alias = fullname.partition(".")[0]
        package = self._aliases.get(alias)
        if package is None:
            return None
        name = _renamed(fullname, alias, package)
        found = importlib.util.find_spec(name)
        if found is None:
            return None
        loader = _AliasLoader(name, alias, package)
        spec = ModuleSpec(fullname, loader, origin=found.origin)
        spec.submodule_search_locations = found.submodule_search_locations
        return spec


class _AliasLoader(Loader):
    """Hands out a module that is imported by its own name.

    Args:
        name: The module's own name.
        alias: The top-level name that it is imported by.
        package: The package that the alias means.
    """

    def __init__(self, name: str, alias: str, package: str) -> None:
        self._name = name
        self._alias = alias
        self._package = package
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the module by its own name and return it."""
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back, and second names to the modules that it imported."""
        # The import system has just put the alias's spec there.
        module.__spec__ = self._spec
        for name in _loaded(self._package):
            sys.modules.setdefault(_renamed(name, self._package, self._alias), sys.modules[name])
