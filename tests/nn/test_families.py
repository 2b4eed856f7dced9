"""Every layer that fusion could take up is named in the family of its library.

Fusion leaves a class that overrides ``forward`` alone until the family names that class: nothing
fuses then, and no error says so. So these tests look at every class that a library defines.
"""

import importlib
import pkgutil

import pytest
from torch import nn

import compat.minkowski as ME
from compat.minkowski._layer_family import LAYER_FAMILY as MINKOWSKI
from compat.spconv.pytorch._family import LAYER_FAMILY as SPCONV
from tritonspconv.nn._family import LAYER_FAMILY as ENGINE
from tritonspconv.nn.conv import SparseInverseConvNd
from tritonspconv.nn.fusable import LayerFamily

FAMILIES = {
    "tritonspconv.nn": ENGINE,
    "compat.spconv.pytorch": SPCONV,
    "compat.minkowski": MINKOWSKI,
}
# Nothing can import this module, on purpose.
REFUSED = "compat.spconv.pytorch.quantization"
# Layers that fusion must leave alone, although they derive from a layer that it takes up.
LEFT_ALONE = {
    # A container cannot give this layer its second tensor.
    SparseInverseConvNd.forward,
    # These containers give every child the same input.
    *(kind.forward for kind in (ME.MinkowskiStackCat, ME.MinkowskiStackMean)),
    *(kind.forward for kind in (ME.MinkowskiStackSum, ME.MinkowskiStackVar)),
}


def layers_of(package: str) -> set[type[nn.Module]]:
    """Return the modules that a package defines, private ones too."""
    root = importlib.import_module(package)
    found = pkgutil.walk_packages(root.__path__, f"{package}.")
    names = (info.name for info in found if info.name != REFUSED)
    files = [root, *(importlib.import_module(name) for name in names)]
    return {
        value
        for file in files
        for value in vars(file).values()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__module__.startswith(package)
    }


def unnamed(family: LayerFamily, kinds: set[type[nn.Module]]) -> set[str]:
    """Return the names of layers that fusion could take up and the family does not know."""
    norms = (nn.BatchNorm1d, nn.SyncBatchNorm, *family._norms)
    relus = (nn.ReLU, *family._relus)
    containers = (nn.Sequential, *(kind for kind in kinds if kind.forward in family._containers))
    found = set()
    for kind in kinds:
        if kind.forward is nn.Module.forward or kind.forward in LEFT_ALONE:
            continue
        known = (
            (hasattr(kind, "layer_family"), family.is_conv_class(kind)),
            (issubclass(kind, norms), kind in family._norms),
            (issubclass(kind, relus) or _wraps_relu(kind), kind in family._relus),
            (issubclass(kind, containers), kind.forward in family._containers),
        )
        if any(could_be and not is_named for could_be, is_named in known):
            found.add(kind.__qualname__)
    return found


def _wraps_relu(kind: type[nn.Module]) -> bool:
    """Return whether a layer of MinkowskiEngine wraps torch's ReLU."""
    return issubclass(getattr(kind, "MODULE", nn.Module), nn.ReLU)


@pytest.mark.parametrize("package", FAMILIES)
def test_every_layer_is_named(package):
    kinds = layers_of(package)
    assert any(hasattr(kind, "layer_family") for kind in kinds)
    assert unnamed(FAMILIES[package], kinds) == set()


def forgotten(base: type[nn.Module]) -> type[nn.Module]:
    """Return a layer that derives from ``base`` and has a ``forward`` of its own."""
    return type("Forgotten", (base,), {"forward": lambda self, input: input})


@pytest.mark.parametrize("package", FAMILIES)
def test_a_layer_that_is_not_named_is_noticed(package):
    """The check finds a class that derives from a layer and has a ``forward`` of its own."""
    family, kinds = FAMILIES[package], layers_of(package)
    named = {kind for kind in kinds if kind.forward in family._convs | family._containers}
    for base in {*named, *family._norms, *family._relus, nn.Sequential}:
        assert unnamed(family, {*kinds, forgotten(base)}) == {"Forgotten"}, base
