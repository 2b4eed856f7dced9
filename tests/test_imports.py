"""Imports of the packages have no side effects, and the packages contain all listed names."""

import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import compat
import tritonspconv

ROOT = Path(__file__).parents[1]

# This script runs in a process of its own. It imports torch first, so torch's side effects do not
# count.
PROBE = """
import importlib, json, os, sys

module, report = sys.argv[1:]
import torch

environment, written = [], []

def caller():
    frame = sys._getframe(2)
    while frame and frame.f_globals.get("__name__") in ("os", "_collections_abc"):
        frame = frame.f_back
    return frame.f_globals.get("__name__", "") if frame else ""

def spy(name):
    original = getattr(os._Environ, name)
    def wrapper(self, key, *rest):
        if caller().partition(".")[0] in ("tritonspconv", "compat"):
            environment.append(str(key))
        return original(self, key, *rest)
    setattr(os._Environ, name, wrapper)

for name in ("__getitem__", "__contains__", "__setitem__"):
    spy(name)

def audit(event, args):
    writing = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writing or event in ("os.mkdir", "os.rename"):
        written.append(str(args[0]))

sys.addaudithook(audit)
before = set(sys.modules)
importlib.import_module(module)
found = {
    "triton": sorted(n for n in set(sys.modules) - before if n.partition(".")[0] == "triton"),
    "cuda": torch.cuda.is_initialized(),
    "environment": list(environment),
    "written": list(written),
}
with open(report, "w") as file:
    json.dump(found, file)
"""


def modules() -> list[str]:
    """Every module of both packages, except those that need Triton where it is not installed."""
    names, failed = ["tritonspconv", "compat"], []
    for package in (tritonspconv, compat):
        found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.", failed.append)
        names += [info.name for info in found]
    if importlib.util.find_spec("triton") is None:
        names = [name for name in names if not name.startswith("tritonspconv.kernels.triton")]
    broken = sorted(set(failed) & set(names))
    assert not broken, f"packages that cannot be imported: {broken}"
    return names


def front_doors() -> list[str]:
    """The modules that users import first."""
    names = ["tritonspconv", "compat", "compat.spconv.pytorch"]
    # This package is optional; see the import contract in pyproject.toml.
    if importlib.util.find_spec("compat.minkowski") is not None:
        names.append("compat.minkowski")
    return names


@pytest.mark.parametrize("module", front_doors())
def test_import_has_no_side_effects(module: str, tmp_path: Path):
    report = tmp_path / "report.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE, module, str(report)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert json.loads(report.read_text()) == {
        "triton": [],
        "cuda": False,
        "environment": [],
        "written": [],
    }


def test_version_is_that_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r'^version = "(.+)"$', text, re.MULTILINE)
    assert tritonspconv.__version__ == version


# These modules of spconv describe its compiled code. The error of their import says what to use
# instead.
REFUSED = {
    f"compat.spconv.{name}"
    for name in ("algocore", "benchmark", "build", "core_cc", "csrc", "gencode")
} | {"compat.spconv.pytorch.quantization"}


@pytest.mark.parametrize("name", modules())
def test_every_name_in_all_exists(name: str):
    if any(name == refused or name.startswith(f"{refused}.") for refused in REFUSED):
        with pytest.raises(ImportError, match=r"^spconv\.\S+ is not provided\. .+\.$"):
            importlib.import_module(name)
        return
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    assert [item for item in exported if not hasattr(module, item)] == []


def test_public_packages_list_their_names():
    assert tritonspconv.__all__
