"""The adapter has every name of spconv's modules, or refuses it and lists it in QUIRKS.md."""

import fnmatch
import importlib
import inspect
import pkgutil
import re
import types
import warnings
from pathlib import Path

import pytest

pytest.importorskip("spconv", reason="the original, spconv 2.3.8, is not installed")

import spconv

import compat.spconv
import compat.spconv.pytorch as ours

pytestmark = pytest.mark.parity

# Private names that downstream code imports.
PRIVATE = {
    "spconv.pytorch.conv": {"_apply_act", "_MAX_NUM_VOXELS_DURING_TRAINING"},
    "spconv.pytorch.pool": {"_MAX_NUM_VOXELS_DURING_TRAINING"},
    "spconv.pytorch.cppcore": {"_TORCH_DTYPE_TO_TV"},
    "spconv.pytorch.ops": {"_TORCH_DTYPE_TO_TV"},
    "spconv.pytorch.functional": {"_indice_to_scalar"},
}
# Variables that a loop or a with statement of the original leaves behind.
LEFTOVERS = {"spconv.pytorch.constants": {"remove_plus", "remove_dotdev"}}
QUIRKS = (Path(compat.spconv.__file__).parent / "QUIRKS.md").read_text()
# The first column of the table.
ROWS = re.findall(r"^\| (.*?) \|", QUIRKS[QUIRKS.index("## Absent") :], re.MULTILINE)
ABSENT = re.findall(r"`([^` ]+)`", " ".join(ROWS))


def is_listed(name):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in ABSENT)


def modules():
    """Return the names of all modules, but for those that QUIRKS.md lists and their submodules."""
    found = ["spconv"]
    for module in pkgutil.walk_packages(spconv.__path__, "spconv.", onerror=lambda name: None):
        parent = module.name.rpartition(".")[0]
        # `__main__` is for "python -m"; `__version__` is also an attribute of the package.
        skipped = module.name.endswith((".__main__", ".__version__"))
        if parent in found and not skipped and not is_listed(parent):
            found.append(module.name)
    return found


def imported(name):
    """Return the original's module, or None where its CPU build cannot import it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


def own_names(module):
    """Yield the public names that spconv or cumm define, not those of torch, NumPy or typing."""
    for name, value in vars(module).items():
        if name.startswith("_") and name not in PRIVATE.get(module.__name__, ()):
            continue
        is_module = isinstance(value, types.ModuleType)
        if is_module and value.__name__ == f"{module.__name__}.{name}":
            continue  # `modules` lists submodules by themselves.
        source = value.__name__ if is_module else getattr(value, "__module__", None)
        if isinstance(source, str) and source.partition(".")[0] not in ("spconv", "cumm", "pccm"):
            continue
        if name not in LEFTOVERS.get(module.__name__, ()) and name != "pccm":
            yield name


MODULES = modules()


def test_the_walk_sees_the_whole_of_spconv():
    expected = {"conv", "core", "cppcore", "functional", "interpreter", "modules", "ops", "pool"}
    assert {f"spconv.pytorch.{name}" for name in expected} < set(MODULES)
    assert {"spconv.algocore", "spconv.test_utils", "spconv.pytorch.quantization"} < set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_every_name_is_there_or_refused_with_a_sentence(name):
    original = imported(name)
    if is_listed(name):
        with pytest.raises(ImportError, match=rf"^{re.escape(name)} is not provided\. [A-Z].*\.$"):
            importlib.import_module(f"compat.{name}")
        return
    adapter = importlib.import_module(f"compat.{name}")
    silent = []
    for attribute in () if original is None else own_names(original):
        if hasattr(adapter, attribute):
            continue
        listed = is_listed(attribute) or is_listed(f"{name}.{attribute}")
        with pytest.raises(AttributeError) as refusal:
            getattr(adapter, attribute)
        if not listed or not re.search(r": not provided\. .*[.)]$", str(refusal.value)):
            silent.append(attribute)
    assert silent == []


def classes():
    """Yield the classes that spconv.pytorch defines and the adapter has."""
    for name in MODULES:
        original = imported(name) if name.startswith("spconv.pytorch") else None
        for value in vars(original).values() if original else ():
            if inspect.isclass(value) and value.__module__ == name:
                mine = getattr(importlib.import_module(f"compat.{name}"), value.__name__, None)
                if mine is not None:
                    yield pytest.param(value, mine, id=value.__name__)


def parameters(function):
    return [
        (parameter.name, parameter.kind, parameter.default is parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize(("original", "mine"), list(classes()))
def test_every_method_is_there_with_the_originals_parameters(original, mine):
    """A subclass can override or call any method, so private ones count too."""
    different = {}
    for name, value in vars(original).items():
        dunder = name.startswith("__") and name not in ("__init__", "__call__", "__getitem__")
        if dunder or not callable(getattr(original, name)) or inspect.isclass(value):
            continue
        theirs, got = getattr(original, name), getattr(mine, name, None)
        if got is None or parameters(got) != parameters(theirs):
            different[name] = (got and parameters(got), parameters(theirs))
    assert different == {}


def test_members_of_alloc_keys():
    theirs, mine = (
        {name: value for name, value in vars(module.constants.AllocKeys).items() if name[0] != "_"}
        for module in (spconv, compat.spconv)
    )
    assert mine == theirs


def test_types_of_entries_have_cumms_numbers():
    theirs = importlib.import_module("cumm.tensorview")
    mine = importlib.import_module("compat.cumm.tensorview")
    numbers = {name for name in mine.__all__ if isinstance(getattr(mine, name), int)}
    assert {"float32", "uint32", "bfloat16"} < numbers
    for name in numbers:
        assert getattr(mine, name) == getattr(theirs, name)
    dtypes = importlib.import_module("spconv.pytorch.cppcore")._TORCH_DTYPE_TO_TV
    mine = importlib.import_module("compat.spconv.pytorch.cppcore")._TORCH_DTYPE_TO_TV
    assert dtypes.items() <= mine.items()


@pytest.mark.parametrize("name", ["ConvMode", "ConvOpType", "ConvLayoutType", "ConvIterAlgo"])
def test_members_of_cumms_enums(name):
    theirs = getattr(importlib.import_module("cumm.conv.bases"), name)
    mine = getattr(importlib.import_module("compat.cumm.conv.bases"), name)
    assert [(m.name, m.value) for m in mine] == [(m.name, m.value) for m in theirs]
    assert getattr(compat.spconv.core, name) is mine


def test_pools_and_settings_are_the_originals():
    theirs = importlib.import_module("spconv.pytorch.pool").ALL_POOL_LAYERS
    assert {kind.__name__ for kind in ours.pool.ALL_POOL_LAYERS} == {k.__name__ for k in theirs}
    original = importlib.import_module("spconv.pytorch.constants")
    assert original.PYTORCH_VERSION == ours.constants.PYTORCH_VERSION
