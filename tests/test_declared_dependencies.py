"""Public modules import, and point helpers run, with the declared dependencies alone."""

import json
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests._process import ROOT, run

# This script runs in a process of its own. An import hook hides all packages that are not allowed.
PROBE = """
import importlib, json, pkgutil, sys

hidden, report = set(json.loads(sys.argv[1])), sys.argv[2]

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"{name} is no declared dependency", name=name)

sys.meta_path.insert(0, Hide())

import compat, tritonspconv

imported = []
for package in (tritonspconv, compat):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        parts = found.name.split(".")
        private = any(part.startswith("_") and part != "_C" for part in parts)
        # CPU builds of torch bring no Triton, and numba is an extra; only these modules need them.
        if private or parts[2:3] in (["triton"], ["numba"]):
            continue
        try:
            module = importlib.import_module(found.name)
        except ImportError as error:
            # Modules of an original that have no counterpart say what to use instead.
            if "is not provided. " not in str(error):
                raise
            continue
        for name in getattr(module, "__all__", ()):
            getattr(module, name)
        imported.append(found.name)

import torch
import compat.minkowski as ME

points = torch.tensor([[0.2, 0.1, 0.0], [0.4, 0.9, 0.5], [3.0, 3.1, 3.2]])
cells = ME.utils.sparse_quantize(points, quantization_size=0.5)
batch, feats = ME.utils.sparse_collate([cells], [torch.ones(len(cells), 2)])
layer = ME.MinkowskiConvolution(2, 3, kernel_size=3, dimension=3)
assert layer(ME.SparseTensor(feats, batch)).F.shape == (len(cells), 3)

with open(report, "w") as file:
    json.dump({"imported": imported, "numpy": "numpy" in sys.modules}, file)
"""


def declared() -> list[str]:
    """Return the names of the dependencies that the package declares."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    return [_name(entry) for entry in re.findall(r'"([^"]+)"', listed[1])]


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def allowed_distributions() -> set[str]:
    """Return the declared dependencies and everything that they require, without extras."""
    found, waiting = set(), declared()
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [_name(entry) for entry in required if "extra ==" not in entry]
    return found


def test_everything_public_imports_with_the_declared_dependencies_alone(tmp_path: Path):
    allowed = allowed_distributions()
    assert "torch" in allowed
    assert "numpy" not in allowed
    hidden = [
        module
        for module, owners in metadata.packages_distributions().items()
        if not any(_name(owner) in allowed for owner in owners)
        and module not in ("compat", "tritonspconv", "torch", *sys.stdlib_module_names)
    ]
    if "numpy" not in hidden:
        pytest.skip("numpy is not installed; the other tests show what this test would")
    report = tmp_path / "report.json"
    run("-c", PROBE, json.dumps(hidden), report, cwd=tmp_path)
    seen = json.loads(report.read_text())
    assert not seen["numpy"]
    assert {"compat.minkowski", "compat.spconv.pytorch", "tritonspconv.nn"} <= {*seen["imported"]}
