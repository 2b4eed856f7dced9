"""The adapter has every public name of MinkowskiEngine's modules, or refuses it in words."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import compat.minkowski
from tests.parity.originals import ORIGINALS

ORIGINAL = ORIGINALS["MinkowskiEngine"]
if absence := ORIGINAL.absence("cpu"):
    pytest.skip(absence, allow_module_level=True)
ORIGINAL.prepare("cpu")
import MinkowskiEngine  # noqa: E402

pytestmark = pytest.mark.parity

QUIRKS = (Path(compat.minkowski.__file__).parent / "QUIRKS.md").read_text()
ABSENT = set(re.findall(r"`([^` ]+)`", QUIRKS[QUIRKS.index("## Absent") :]))
# A private name that downstream code imports.
PRIVATE = "_get_coordinate_map_key"
# The original cannot import its own.
BROKEN = "MinkowskiEngine.utils.gradcheck"


def modules() -> list[str]:
    walk = pkgutil.walk_packages(MinkowskiEngine.__path__, "MinkowskiEngine.")
    return [module.name for module in walk if module.name != BROKEN]


def own_names(module):
    """Yield the public names that MinkowskiEngine defines, not those of torch or NumPy."""
    for name, value in vars(module).items():
        source = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", "")
        is_own = isinstance(source, str) and source.startswith("Minkowski")
        is_submodule = inspect.ismodule(value) and source == f"{module.__name__}.{name}"
        if is_own and not is_submodule and (name == PRIVATE or not name.startswith("_")):
            yield name


@pytest.fixture
def original_names():
    """Undo what the import of a submodule does: it takes the name of the class of the same name."""
    names = dict(vars(MinkowskiEngine))
    yield
    vars(MinkowskiEngine).update(names)


@pytest.mark.usefixtures("original_names")
@pytest.mark.parametrize("name", ["MinkowskiEngine", *modules()])
def test_every_name_is_there_or_refused_with_a_sentence(name):
    original = importlib.import_module(name)
    mine = name.replace("MinkowskiEngine", "compat.minkowski", 1)
    if name == "MinkowskiEngine.utils.torchsummary":
        with pytest.raises(ImportError):
            importlib.import_module(mine)
        return
    adapter = importlib.import_module(mine)
    silent = []
    for attribute in own_names(original):
        if hasattr(adapter, attribute):
            continue
        with pytest.raises(AttributeError) as refusal:
            getattr(adapter, attribute)
        says = re.search(r": not provided\. [A-Z].*\.$", str(refusal.value))
        if attribute not in ABSENT or not says:
            silent.append(attribute)
    assert silent == []


def test_names_of_other_modules_are_the_same_objects():
    sparse = importlib.import_module("compat.minkowski.MinkowskiSparseTensor")
    functional = importlib.import_module("compat.minkowski.MinkowskiFunctional")
    assert functional.SparseTensor is compat.minkowski.SparseTensor
    assert sparse.CoordinateMapType is compat.minkowski.CoordinateMapType
    assert sparse.global_coordinate_manager is compat.minkowski.global_coordinate_manager
    with pytest.raises(
        AttributeError, match=r"^module 'MinkowskiEngine\.\w+' has no .* 'nothing'$"
    ):
        functional.nothing  # noqa: B018
