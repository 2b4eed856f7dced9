"""``compat.install``: import names, refusals, ``python -m compat``, worker processes."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import compat
from compat.__main__ import _interpreter_options
from compat._install import _withdraw, announce
from compat.cumm import tensorview
from compat.spconv.utils import Point2VoxelCPU3d
from tests._process import ROOT, run, write

SITE = str(ROOT / "compat" / "_site")
UNDER_COMPAT = ("-m", "compat", "--as", "spconv", "--")

TRAIN = """
import sys

import torch

import spconv
import spconv.pytorch
from spconv.core import ConvAlgo
from spconv.pytorch import SparseConvTensor, SparseSequential, SparseConv3d, SubMConv3d

assert spconv.__version__ == "2.3.8"
assert __name__ == "__main__", __name__
print(sys.argv[1:], sys.path[0])

torch.manual_seed(0)
sites = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 2, 3], [0, 3, 3, 3]], dtype=torch.int32)
x = SparseConvTensor(torch.randn(4, 2), sites, [4, 4, 4], batch_size=1)
net = SparseSequential(
    SubMConv3d(2, 5, 3, padding=1, indice_key="subm1", algo=ConvAlgo.Native),
    torch.nn.ReLU(),
    SparseConv3d(5, 3, 3, stride=2, padding=1),
)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
losses = []
for _ in range(2):
    loss = net(x).features.square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[1] < losses[0], losses
print("trained")
"""

FAKE = '__version__ = "1.0"\n'


def test_import_names_are_the_modules_of_the_adapter(tmp_path: Path):
    code = """
import importlib.util, sys
import compat
compat.install("spconv")
assert "torch" not in sys.modules, "the switch itself imports nothing"
assert importlib.util.find_spec("spconv") and "torch" not in sys.modules

import spconv.pytorch as sp
assert sys.modules["spconv.pytorch.conv"] is sys.modules["compat.spconv.pytorch.conv"]
import spconv
import spconv.constants
from spconv.core import ConvAlgo
from spconv.pytorch.utils import PointToVoxel
from spconv.utils import Point2VoxelCPU3d
import cumm.tensorview as tv

import compat.spconv.pytorch
assert spconv is compat.spconv and sp is compat.spconv.pytorch
assert isinstance(sp.SubMConv3d(1, 1, 3), compat.spconv.pytorch.conv.SparseConvolution)
assert spconv.constants is compat.spconv.constants and sys.modules["cumm"] is compat.cumm
for name in ("spconv", "spconv.pytorch", "spconv.pytorch.conv"):
    assert sys.modules[name].__spec__.name == sys.modules[name].__name__ == f"compat.{name}"

import importlib, pickle
assert importlib.reload(sp.identity) is sp.identity
assert pickle.loads(b"cspconv.pytorch.conv\\nSubMConv3d\\n.") is sp.SubMConv3d
"""
    run("-c", code, cwd=tmp_path)


def test_what_the_adapter_lacks_is_an_import_error_by_the_original_name(tmp_path: Path):
    code = """
import importlib.util
import compat
compat.install("spconv")
assert importlib.util.find_spec("spconv.absent") is None
try:
    import spconv.pytorch.absent
except ModuleNotFoundError as error:
    assert error.name == "spconv.pytorch.absent", error.name
else:
    raise AssertionError
"""
    run("-c", code, cwd=tmp_path)


def test_switch_is_idempotent_and_can_be_undone(tmp_path: Path):
    write(tmp_path, "spconv/__init__.py", FAKE)
    code = """
import os, sys
import compat
before = list(sys.meta_path), dict(os.environ)

with compat.install("spconv") as outer:
    once = list(sys.meta_path)
    assert "COMPAT_INSTALL" in os.environ
    with compat.install("spconv") as inner:
        assert (outer.fresh, inner.fresh) == (True, False)
        assert sys.meta_path == once
    import spconv.pytorch, cumm.tensorview
    assert spconv.__version__ == "2.3.8"

assert (list(sys.meta_path), dict(os.environ)) == before
assert [n for n in sys.modules if n.partition(".")[0] in ("spconv", "cumm")] == []
assert "compat.spconv.pytorch" in sys.modules
compat.uninstall("spconv")
import spconv
assert spconv.__version__ == "1.0", "the installed package is found again"
"""
    run("-c", code, cwd=tmp_path)


@pytest.mark.parametrize("imported", ["spconv", "cumm"])
def test_refuses_when_the_original_was_imported_before(tmp_path: Path, imported: str):
    path = write(tmp_path, f"{imported}/__init__.py", FAKE)
    code = f"""
import sys
import {imported}
import compat
before = list(sys.meta_path)
try:
    compat.install("spconv")
except RuntimeError as error:
    print(error)
assert sys.meta_path == before and {imported}.__version__ == "1.0"
"""
    message = run("-c", code, cwd=tmp_path).stdout
    assert f"{imported!r} must not be imported yet; got {imported!r} from {path}" in message
    assert "python -m compat --as spconv -- SCRIPT" in message


@pytest.mark.parametrize("function", [compat.install, compat.uninstall])
def test_unknown_libraries_are_refused(function):
    known = "must be one of: 'spconv', 'MinkowskiEngine'; got 'torchsparse'"
    with pytest.raises(ValueError, match=known):
        function("torchsparse")


def test_script_trains_without_edits(tmp_path: Path):
    script = write(tmp_path, "tools/train.py", TRAIN)
    # An installed original changes nothing, and a checkout needs no PYTHONPATH.
    write(tmp_path, "tools/spconv/__init__.py", FAKE)
    process = run(*UNDER_COMPAT, script, "--lr", "1", "--", "-x", cwd=ROOT, PYTHONPATH="")
    assert process.stdout == f"['--lr', '1', '--', '-x'] {script.parent}\ntrained\n"
    assert process.stderr == ""


def test_engine_is_the_one_beside_the_adapter(tmp_path: Path):
    # Another release may be installed where a checkout is run, or lie in the script's own folder.
    write(tmp_path, "tritonspconv/__init__.py", "raise ImportError('another release')\n")
    script = write(tmp_path, "train.py", TRAIN)
    process = run(*UNDER_COMPAT, script, cwd=ROOT, PYTHONPATH="")
    assert process.stdout == f"[] {tmp_path}\ntrained\n"


def test_module_trains_without_edits(tmp_path: Path):
    write(tmp_path, "package/train.py", TRAIN)
    process = run(*UNDER_COMPAT, "-m", "package.train", "--lr", "1", cwd=tmp_path)
    assert process.stdout == f"['--lr', '1'] {tmp_path}\ntrained\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [("raise SystemExit(3)", 3), ("def f():\n    raise ValueError('no')\nf()", 1), ("1 +", 1)],
    ids=["exit", "traceback", "syntax"],
)
def test_exit_status_and_traceback_are_those_of_python(tmp_path: Path, code: str, status: int):
    script = write(tmp_path, "script.py", code)
    own = run(script, cwd=tmp_path, status=status)
    ours = run(*UNDER_COMPAT, script, cwd=tmp_path, status=status)
    assert (ours.stdout, ours.stderr) == (own.stdout, own.stderr)


def test_interpreter_options_reach_the_program(tmp_path: Path):
    script = write(tmp_path, "script.py", "import sys; print(sys.flags.optimize, sys.warnoptions)")
    process = run("-O", "-W", "error", *UNDER_COMPAT, script, cwd=tmp_path)
    assert process.stdout == "1 ['error']\n"


@pytest.mark.parametrize(
    ("original", "options"),
    [
        (["python", "-m", "compat", "a"], []),
        (["python", "-mcompat", "a"], []),
        (["python", "-um", "compat", "a"], ["-u"]),
        (["python", "-X", "dev", "-umcompat", "a"], ["-X", "dev", "-u"]),
        (["python", "compat", "a"], []),
    ],
    ids=" ".join,
)
def test_interpreter_options(original: list[str], options: list[str]):
    assert _interpreter_options(original, 1) == options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "compat", "--", "x.py"], "arguments are required: --as"),
        (["-m", "compat", "--as", "ME", "--", "x.py"], "must be one of: 'spconv', 'Mink"),
        (["-m", "compat", "--as", "spconv", "--"], "must follow --: SCRIPT, -m MODULE or -c CODE"),
        ([*UNDER_COMPAT, "-E", "x.py"], "got '-E'. Put options of Python itself before"),
        (["-S", *UNDER_COMPAT, "x.py"], "must read PYTHONPATH and sitecustomize"),
    ],
    ids=["no library", "unknown", "no program", "option", "no site"],
)
def test_command_line_errors(tmp_path: Path, arguments: list[str], message: str):
    assert message in run(*arguments, cwd=tmp_path, status=2).stderr


def test_help(tmp_path: Path):
    text = run("-m", "compat", "--help", cwd=tmp_path).stdout
    assert "python -m compat --as spconv -- -m package.train" in text


LOADER = """
import torch
import spconv.pytorch as spconv

class Grids(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        import spconv.pytorch.conv
        return int(spconv.pytorch.conv.__name__ == "compat.spconv.pytorch.conv")

if __name__ == "__main__":
    loader = torch.utils.data.DataLoader(Grids(), num_workers=1, multiprocessing_context="spawn")
    print([int(batch) for batch in loader])
"""


def test_spawned_workers_of_a_program_inherit_the_switch(tmp_path: Path):
    script = write(tmp_path, "script.py", LOADER)
    assert run(*UNDER_COMPAT, script, cwd=tmp_path).stdout == "[1, 1]\n"


SPAWNER = """
import multiprocessing, os, subprocess, sys
import compat

def import_in_a_subprocess():
    command = [sys.executable, "-c", "import spconv; print(spconv.__name__)"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()

def main(method):
    before = dict(os.environ)
    with compat.install("spconv"):
        import job
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(pool.apply(job.name_of, ("spconv.core",)))
        print(import_in_a_subprocess())
    assert dict(os.environ) == before
    print(import_in_a_subprocess())

if __name__ == "__main__":
    main(sys.argv[1])
"""

JOB = """
import sys
import spconv.core

def name_of(module):
    return sys.modules[module].__name__
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_workers_of_a_function_that_installs_have_the_switch(tmp_path: Path, method: str):
    """The script calls install below its top level, and an original is installed."""
    script = write(tmp_path, "script.py", SPAWNER)
    write(tmp_path, "job.py", JOB)
    write(tmp_path, "spconv/__init__.py", '__name__ = "the original"\n')
    found = run(script, method, cwd=tmp_path).stdout.splitlines()
    assert found == ["compat.spconv.core", "compat.spconv", "the original"]


def test_the_environment_is_left_alone_on_request(tmp_path: Path):
    code = """
import os
import compat
before = dict(os.environ)
with compat.install("spconv", workers=False):
    import spconv
    assert spconv.__name__ == "compat.spconv"
    assert dict(os.environ) == before
"""
    run("-c", code, cwd=tmp_path)


def test_hidden_sitecustomize_runs(tmp_path: Path):
    hidden = write(tmp_path, "site/sitecustomize.py", "import sys; sys.found_me = __file__")
    code = f"""
import sitecustomize, sys
print(sys.found_me, sitecustomize.__file__, {SITE!r} in sys.path)
"""
    path = os.pathsep.join([str(ROOT), str(hidden.parent)])
    process = run(*UNDER_COMPAT, "-c", code, cwd=tmp_path, PYTHONPATH=path)
    assert process.stdout == f"{hidden} {hidden} False\n"


@pytest.mark.parametrize("paths", [None, "here", f"here{os.pathsep}{os.pathsep}there"])
def test_variables_are_set_once_and_withdrawn(paths: str | None):
    before = {} if paths is None else {"PYTHONPATH": paths}
    environment = dict(before)
    announce("spconv", environment)
    expected = SITE if paths is None else SITE + os.pathsep + paths
    assert environment == {"COMPAT_INSTALL": "spconv", "PYTHONPATH": expected}
    announce("spconv", environment)
    assert environment["PYTHONPATH"] == expected
    _withdraw("spconv", environment)
    assert environment == before


def test_tensorview_carries_points_into_the_voxel_generator():
    generator = Point2VoxelCPU3d(
        vsize_xyz=[1.0, 1.0, 1.0],
        coors_range_xyz=[0.0, 0.0, 0.0, 4.0, 4.0, 4.0],
        num_point_features=3,
        max_num_voxels=10,
        max_num_points_per_voxel=2,
    )
    points = np.array([[0.5, 1.5, 2.5], [0.6, 1.6, 2.6], [3.5, 3.5, 3.5]], dtype=np.float32)
    results = generator.point_to_voxel(tensorview.from_numpy(points))
    voxels, indices, counts = (result.numpy_view() for result in results)
    assert indices.tolist() == [[2, 1, 0], [3, 3, 3]]
    assert counts.tolist() == [2, 1]
    np.testing.assert_array_equal(voxels[0], points[:2])


def test_tensorview_shares_memory_where_it_can():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = tensorview.from_numpy(array)
    array[0, 0] = 9
    assert tensor[0, 0] == 9
    np.testing.assert_array_equal(tensorview.from_numpy(array[::-1]).numpy(), array[::-1])
    array.flags.writeable = False
    assert torch.equal(tensorview.from_numpy(array), tensor)


def test_tensorview_tensors_show_arrays_and_compute_as_plain_ones():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = tensorview.from_numpy(array)
    view = tensor.numpy_view()
    array[0, 0] = 9
    assert view[0, 0] == 9
    assert type(tensor + 1) is type(tensor[0]) is torch.Tensor
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        copy = pickle.loads(pickle.dumps(tensor, protocol))
        assert type(copy) is torch.Tensor
        assert torch.equal(copy, tensor)
    torch.save(tensor, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), tensor)


def test_tensorview_errors():
    with pytest.raises(TypeError, match=r"must be a numpy\.ndarray; got list"):
        tensorview.from_numpy([1.0])  # pyright: ignore[reportArgumentType]
    with pytest.raises(AttributeError, match=r"'zeros': not provided\. Only from_numpy, Tensor"):
        tensorview.zeros  # noqa: B018


def test_uninstall_leaves_modules_that_are_not_the_adapters(tmp_path: Path):
    """A module that a user put below the original's name stays the user's."""
    code = """
import sys
import types

import compat

compat.install("spconv")
import spconv.pytorch

foreign = types.ModuleType("spconv.plugin")
sys.modules["spconv.plugin"] = foreign
replaced = types.ModuleType("spconv.tools")
sys.modules["spconv.tools"] = replaced
sys.modules["spconvlike"] = foreign
compat.uninstall("spconv")
assert sys.modules["spconv.plugin"] is foreign
assert sys.modules["spconv.tools"] is replaced
assert sys.modules["spconvlike"] is foreign
left = [name for name in sys.modules if name == "spconv" or name.startswith("spconv.")]
assert sorted(left) == ["spconv.plugin", "spconv.tools"], left
assert "compat.spconv.pytorch" in sys.modules
"""
    run(write(tmp_path, "leaves.py", code), cwd=tmp_path)
