"""The namespace as a whole: names, effects of the import, and the list of quirks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import compat.minkowski as ME
from compat.minkowski._backend import _C
from tests._process import ROOT, run
from tests.parity.cases import minkowski_surface as surface
from tests.parity.originals import ORIGINALS

HERE = Path(__file__).parent


@pytest.mark.parametrize("module", surface.MODULES)
def test_every_public_name_of_the_original_is_here(module: str):
    __import__(f"compat.minkowski.{module}".rstrip("."))
    found = sys.modules[f"compat.minkowski.{module}".rstrip(".")]
    missing = [name for name in surface.MODULES[module].split() if not hasattr(found, name)]
    assert missing == []


def test_all_lists_what_is_there():
    assert [name for name in ME.__all__ if not hasattr(ME, name)] == []
    assert ME.__version__ == "0.5.4"


def test_backend_names():
    assert _C.RegionType is ME.RegionType
    assert _C.CoordinateMapKey is ME.CoordinateMapKey
    assert ME.is_cuda_available() == (ME.get_gpu_memory_info() != (0, 0))
    assert isinstance(ME.cuda_version(), int)
    with pytest.raises(AttributeError, match=r"'ConvolutionForwardCPU': compiled operators"):
        _C.ConvolutionForwardCPU  # noqa: B018


def test_importing_prints_nothing_and_leaves_the_environment_alone(tmp_path: Path):
    code = """
import os, sys
before, path = dict(os.environ), list(sys.path)
import compat.minkowski
assert (dict(os.environ), sys.path) == (before, path)
assert "triton" not in sys.modules
"""
    process = run("-W", "error", "-c", code, cwd=tmp_path)
    assert (process.stdout, process.stderr) == ("", "")


def test_diagnostics_run_as_a_module():
    command = [sys.executable, "-m", "compat.minkowski.diagnostics"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "torch.cuda.is_available()" in text


def test_quirks_name_tests_and_cases_that_exist():
    text = (ROOT / "compat" / "minkowski" / "QUIRKS.md").read_text()
    for file, name in re.findall(r"(test_\w+\.py)::(test_\w+)", text):
        assert f"def {name}(" in (HERE / file).read_text(), (file, name)
    cases = re.findall(r"`tests/parity` `([^`]+)`", text)
    assert cases
    assert set(cases) <= ORIGINALS["MinkowskiEngine"].cases.keys()
