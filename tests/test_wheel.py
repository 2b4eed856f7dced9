"""The built wheel holds both packages and works away from the repository."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tritonspconv import __version__ as VERSION

ROOT = Path(__file__).parents[1]

# This script compares a submanifold convolution with a dense convolution at the same sites.
USE = """
import sys
from pathlib import Path

root, installed = map(Path, sys.argv[1:])
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != root]

import compat
import tritonspconv
for package in (compat, tritonspconv):
    assert installed in Path(package.__file__).parents, package.__file__

import torch
import compat.spconv.pytorch as spconv

torch.manual_seed(0)
sites = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 2, 3], [0, 3, 3, 3]], dtype=torch.int32)
feats = torch.randn(4, 2)
conv = spconv.SubMConv3d(2, 5, 3, bias=True)
out = conv(spconv.SparseConvTensor(feats, sites, [4, 4, 4], batch_size=1)).features

at = tuple(sites.long().t()[1:])
dense = torch.zeros(2, 4, 4, 4)
dense[:, at[0], at[1], at[2]] = feats.t()
weight = conv.weight.permute(0, 4, 1, 2, 3)
expected = torch.nn.functional.conv3d(dense[None], weight, conv.bias, padding=1)[0]
torch.testing.assert_close(out, expected[:, at[0], at[1], at[2]].t())
print("works")
"""


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command and return its output; on failure show all of it."""
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


@pytest.mark.slow
def test_wheel_works_away_from_the_repository(tmp_path: Path):
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path / "wheels", ROOT)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")

    names = zipfile.ZipFile(wheel).namelist()
    assert {"tritonspconv/py.typed", "compat/py.typed"} <= set(names)
    assert "tritonspconv/troubleshooting.md" in names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tritonspconv", "compat"}

    installed = tmp_path / "installed"
    run(*pip, "install", "--no-deps", "--target", installed, wheel)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = (sys.executable, "-c", USE, ROOT, installed)
    output = run(*command, cwd=elsewhere, PYTHONPATH=str(installed))
    assert output == "works\n"

    # The command is installed and works outside the repository.
    command = (sys.executable, "-m", "tritonspconv", "doctor")
    assert "All is well." in run(*command, cwd=elsewhere, PYTHONPATH=str(installed))
    weights = {"a.weight": torch.zeros(3, 3, 3, 16, 32), "a.bias": torch.zeros(32)}
    torch.save(weights, elsewhere / "a.pth")
    command = (installed / "bin" / "tritonspconv", "convert", "a.pth", "--dry-run")
    assert "1 of 2 entries change" in run(*command, cwd=elsewhere, PYTHONPATH=str(installed))

    metadata = zipfile.ZipFile(wheel).read(f"tritonspconv-{VERSION}.dist-info/METADATA").decode()
    links = re.findall(r"\]\(([^)]+)\)", metadata)
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert "docs/performance.md" in metadata
