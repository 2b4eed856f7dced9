"""The command `tritonspconv`: overview, errors in one line, reports as JSON."""

import base64
import json
import re
import sys
import warnings

import numpy as np
import pytest
import torch

from tests._process import run, write
from tritonspconv import __version__
from tritonspconv.cli import main
from tritonspconv.cli.main import COMMANDS
from tritonspconv.points import voxel_range


def test_the_overview_names_every_command(capsys):
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", overview, re.MULTILINE) for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tritonspconv {__version__}\n"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "run"])
def test_every_command_has_help_and_json(name, capsys):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: tritonspconv {name}")
    assert "--json FILE" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dokter"], "no command 'dokter'. Did you mean doctor?"),
        (["xyz"], "no command 'xyz'. There are doctor, demo,"),
        (["view", "none.bin"], "read_scan: no file none.bin"),
        (["demo", "none.ply"], "read_scan: no file none.ply"),
        (["verify", "scan.txt.gz"], "must end in one of .bin"),
        (["view", "--out", "scan.jpg"], "--out must end in .html or .png; got 'scan.jpg'"),
        (["view", "--json", "scan.npy"], "must be - or a name that ends in .json"),
        (["view", "--columns", "x,y"], "--columns must name x, y and z"),
        (
            ["train", "--data", "room"],
            "must be rooms, streets or a folder; there is no folder 'room'",
        ),
        (["demo", "--batch-size", "0"], "must be a whole number of at least 1; got '0'"),
        (["bench", "nothing"], "no section nothing; there are layers"),
        (["bench", "--device", "cuda:77"], "--device must be available; got cuda:77"),
        (["convert", "none.pth", "--dry-run"], "No such file"),
        (["tune", "x.json", "--channels", "a:b"], "must be IN:OUT, two whole numbers such as"),
        (["demo", "--device", "foo"], "--device must be cpu, cuda or cuda:N; got 'foo'"),
        (["profile", "second", "--device", "meta"], "--device must be cpu, cuda or cuda:N"),
        (["view", "."], "read_scan: . is a folder; it must be a file"),
        (
            ["tune", "x.json", "--channels", "3:5", "--device", "cpu"],
            "tiles are for the Triton kernels of a GPU",
        ),
        (["profile", "nothing", "none.bin"], "network must be second, unet, minkunet, module:fact"),
        (["profile", "os:getcwd"], "network must return a torch.nn.Module; os:getcwd returned str"),
    ],
)
def test_errors_are_one_line_and_status_two(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as left:
        status = left.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("tritonspconv")
    assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("original", "golden", "message"),
    [
        ("spconv", ["--golden"], "--golden needs --device cuda: spconv was recorded there"),
        ("spconv", [], "no case for cpu has 'nothing' in its name"),
        ("MinkowskiEngine", ["--golden"], "no case for cpu has 'nothing' in its name"),
    ],
)
def test_recorded_results_are_compared_on_the_device_of_the_record(
    original, golden, message, capsys
):
    arguments = ["--original", original, "--device", "cpu", "--only", "nothing"]
    assert main(["parity", *arguments, *golden]) == 2
    assert message in capsys.readouterr().err


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "scan.csv").write_text("x,y,z\n0,0,0\n1,2,0.5\n3,1,1\n")
    scan, picture = str(tmp_path / "scan.csv"), str(tmp_path / "scan.png")
    assert main(["view", scan, "--out", picture]) == 2
    message = "matplotlib is not installed. To install it: pip install 'tritonspconv[demo]'"
    assert capsys.readouterr().err == f"tritonspconv view: {message}\n"


def test_a_script_of_a_library_that_is_missing_is_run_by_the_adapter(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "spconv", None)
    script = write(tmp_path, "train.py", "import spconv.pytorch")
    assert main(["profile", str(script)]) == 2
    told = f"tritonspconv run --as spconv -- -m tritonspconv profile {script}"
    assert told in capsys.readouterr().err
    write(tmp_path, "train.py", "import nothing_of_this_name")
    assert main(["profile", str(script)]) == 2
    assert "No module named 'nothing_of_this_name'" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\x05\xfa noise"])
def test_a_file_that_torch_did_not_write_is_no_checkpoint(content, tmp_path, capsys):
    (tmp_path / "a.pth").write_bytes(content)
    assert main(["convert", str(tmp_path / "a.pth"), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "that torch.save wrote" in error
    assert "trust" not in error


def test_the_demo_runs_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    rows = np.random.default_rng(0).uniform(size=(300, 3)) * [20, 20, 2]
    (tmp_path / "scan.csv").write_text("\n".join(["x,y,z", *(",".join(map(str, r)) for r in rows)]))
    out, report = tmp_path / "out", tmp_path / "report.json"
    arguments = ["demo", tmp_path / "scan.csv", "--device", "cpu", "--out", out, "--json", report]
    assert main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    assert "no picture: matplotlib is not installed (pip install 'tritonspconv[demo]')" in printed
    assert "sparse U-Net" in printed
    assert json.loads(report.read_text())["picture"] is None
    assert not out.exists()


def test_view_writes_a_page_with_the_points(tmp_path, capsys):
    points = np.random.default_rng(0).uniform(size=(500, 3)).astype(np.float32) * [40, 30, 3]
    np.save(tmp_path / "scan.npy", points)
    page, report = tmp_path / "scan.html", tmp_path / "report.json"
    arguments = ["view", tmp_path / "scan.npy", "--out", page, "--voxel", "0.5", "--json", report]
    assert main([str(argument) for argument in arguments]) == 0
    found = json.loads(report.read_text())
    assert found["points"] == 500
    lower = np.array(voxel_range(torch.from_numpy(points)).point_range[:3])
    assert found["voxels"][0] == len(np.unique(np.floor((points - lower) / 0.5), axis=0))
    assert found["voxels"] == sorted(found["voxels"], reverse=True)
    text = page.read_text()
    assert "src=" not in text
    assert "http" not in text
    data = json.loads(re.search(r"const data = (.*);\n", text).group(1))
    places = np.frombuffer(base64.b64decode(data["clouds"][0]["places"]), "<u2").reshape(-1, 3)
    assert len(places) == 500
    assert len(data["clouds"]) == 5
    # Coordinates are fractions of the box around all clouds.
    spans = np.ptp(places, axis=0) / 65535 * data["metres"]
    assert np.allclose(spans, np.ptp(points, axis=0), atol=2e-3)
    heights = np.sort(points[:, 2])
    assert np.allclose(data["clouds"][0]["heights"], [heights[10], heights[-11]])
    assert "rgb(39, 64, 139), " in text  # the first colour of the legend


def test_a_scan_with_colours_of_its_own_has_no_legend_of_heights(tmp_path):
    rows = [(0, 0, 0, 255, 0, 0), (1, 0, 0, 0, 255, 0), (0, 1, 1, 0, 0, 128)]
    lines = ["x,y,z,red,green,blue", *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "scan.csv").write_text("\n".join(lines))
    page = tmp_path / "scan.html"
    columns = ["--columns", "x,y,z,red,green,blue"]
    assert main(["view", str(tmp_path / "scan.csv"), "--out", str(page), *columns]) == 0
    data = json.loads(re.search(r"const data = (.*);\n", page.read_text()).group(1))
    points, *levels = data["clouds"]
    assert base64.b64decode(points["colors"]) == bytes([255, 0, 0, 0, 255, 0, 0, 0, 128])
    assert points["heights"] is None
    assert all(level["heights"] for level in levels)


def test_json_on_standard_output_is_all_there_is(tmp_path):
    points = np.random.default_rng(0).uniform(size=(50, 4)).astype(np.float32)
    np.save(tmp_path / "scan.npy", points)
    process = run("-m", "tritonspconv", "view", "scan.npy", "--json", "-", cwd=tmp_path)
    assert json.loads(process.stdout)["columns"] == ["x", "y", "z", "intensity"]
    assert "wrote view.html" in process.stderr


FOREIGN = "print('foreign', flush=True)\n"
TRAIN = """
import spconv.pytorch as spconv
import tritonspconv.compat.spconv.pytorch as second
assert spconv is second
print(spconv.SubMConv3d.__module__)
"""


@pytest.mark.parametrize("name", ["compat.py", "compat/__init__.py"])
def test_run_is_not_shadowed_by_a_module_of_the_same_name(name, tmp_path):
    write(tmp_path, name, FOREIGN)
    write(tmp_path, "train.py", TRAIN)
    command = ("-m", "tritonspconv", "run", "--as", "spconv", "--", "train.py")
    process = run(*command, cwd=tmp_path)
    assert process.stdout == "compat.spconv.pytorch.conv\n"


def test_run_names_itself_in_its_errors(tmp_path):
    process = run("-m", "tritonspconv", "run", "--as", "spconv", cwd=tmp_path, status=2)
    assert "tritonspconv run: error: a program must follow --" in process.stderr
    command = ("-X", "utf8", "-m", "tritonspconv", "run", "--as", "spconv", "--", "-c")
    code = "import sys; print(sys.flags.utf8_mode, sys._xoptions)"
    assert run(*command, code, cwd=tmp_path).stdout == "1 {'utf8': True}\n"


def test_the_second_spelling_is_the_same_modules():
    import tritonspconv.compat.spconv.pytorch.ops  # pyright: ignore[reportMissingImports]

    import compat.minkowski
    import compat.spconv.pytorch.ops
    import tritonspconv.compat as second
    import tritonspconv.compat.minkowski

    assert second.spconv.pytorch.ops is compat.spconv.pytorch.ops
    assert second.minkowski is compat.minkowski
    assert second.install is compat.install
    assert compat.spconv.pytorch.ops.__spec__.name == "compat.spconv.pytorch.ops"
    with pytest.raises(ModuleNotFoundError, match=r"tritonspconv\.compat\.spconv\.nothing"):
        import tritonspconv.compat.spconv.nothing  # noqa: F401 # pyright: ignore[reportMissingImports]


def test_a_foreign_compat_is_told(tmp_path):
    write(tmp_path, "compat.py", FOREIGN)
    code = "import tritonspconv.compat.spconv.pytorch as s; print(s.__name__)"
    process = run("-c", code, cwd=tmp_path)
    assert process.stdout == "compat.spconv.pytorch\n"
    assert re.search(r"RuntimeWarning: .*compat\.py is hidden by the adapters", process.stderr)
    process = run("-c", f"import compat; {code}", cwd=tmp_path, status=1)
    assert re.search(r"ImportError: .*compat\.py, imported earlier .* Rename", process.stderr)
    lines = run("-m", "tritonspconv", "doctor", cwd=tmp_path).stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("! ")]
    assert re.fullmatch(r"! another module is called compat: .*compat\.py", line)


def test_a_checkout_is_no_foreign_compat(tmp_path):
    write(tmp_path, "compat/__init__.py", "")
    write(tmp_path, "tritonspconv/_compat_name.py", "")
    code = (
        "import sys; sys.path.remove(''); from tritonspconv.cli import doctor; "
        "print([finding.what for finding in doctor.examine([]) if 'compat' in finding.what])"
    )
    assert run("-c", code, cwd=tmp_path).stdout == "[]\n"


def test_the_engine_does_not_import_the_adapters(tmp_path):
    code = "import sys, tritonspconv; print([n for n in sys.modules if 'compat.' in n])"
    found = run("-c", code, cwd=tmp_path).stdout
    assert "spconv" not in found.replace("tritonspconv", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import tritonspconv.compat  # noqa: F401
