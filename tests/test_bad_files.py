"""Every bad file ends a command with one line and exit status 2."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tritonspconv.cli import main

POINTS = np.random.default_rng(0).uniform(size=(40, 4)).astype(np.float32)
COMMANDS = {
    "view": ["view", "{}", "--out", "page.html"],
    "view with columns": ["view", "{}", "--columns", "x,y,z,_"],
    "convert": ["convert", "{}", "--dry-run"],
    "train on it": ["train", "--data", "{}"],
    "train on its boxes": ["train", "--network", "second", "--data", "{}"],
    "profile it": ["profile", "second", "{}"],
}


def whole_files(folder: Path) -> dict[str, bytes]:
    """Return a good file for each suffix."""
    np.save(folder / "a.npy", POINTS)
    np.savez(folder / "a.npz", points=POINTS)
    torch.save({"a.weight": torch.zeros(3, 3)}, folder / "a.pt")
    text = "\n".join(",".join(map(str, row)) for row in POINTS.tolist()).encode()
    pcd = (
        b"VERSION 0.7\nFIELDS x y z intensity\nSIZE 4 4 4 4\nTYPE F F F F\nCOUNT 1 1 1 1\n"
        b"WIDTH 40\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS 40\nDATA binary\n"
    )
    ply = b"ply\nformat binary_little_endian 1.0\nelement vertex 40\n"
    ply += b"".join(b"property float %s\n" % name for name in (b"x", b"y", b"z", b"i"))
    files = {suffix: (folder / f"a{suffix}").read_bytes() for suffix in (".npy", ".npz", ".pt")}
    values = POINTS.tobytes()
    files |= {".csv": text, ".pcd": pcd + values, ".ply": ply + b"end_header\n" + values}
    return files | {".bin": values, ".las": values, ".e57": values, "": values}


def broken(content: bytes, how: str, rng: random.Random) -> bytes:
    if how == "empty":
        return b""
    if how == "noise":
        return rng.randbytes(100)
    if how == "cut off":
        return content[: len(content) // 2 - 3]
    if how == "longer":
        return content + b"\x00\xff\x01"
    if how == "not finite":
        return np.full((5, 4), np.nan, np.float32).tobytes()
    changed = bytearray(content)
    for _ in range(8):
        changed[rng.randrange(min(len(changed), 200))] = rng.randrange(256)
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")  # readers of other packages warn of bad files
@pytest.mark.parametrize("how", ["empty", "noise", "cut off", "longer", "not finite", "changed"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_file_is_one_line(command, how, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(f"{command} {how}")
    files = whole_files(tmp_path)
    suffixes = list(files)
    if command.startswith(("train", "profile it")):
        suffixes = rng.sample(suffixes, 3)
    if command == "profile it" and how in ("changed", "longer"):
        suffixes = [".bin"]  # the command would profile a file that can be read
    for suffix in suffixes:
        path = tmp_path / f"bad{suffix}"
        path.write_bytes(broken(files[suffix], how, rng))
        if command == "profile it" and suffix == ".bin" and how != "empty":
            path.write_bytes(b"12345")
        arguments = [part.format(path) for part in COMMANDS[command]]
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr().err.strip()
        assert status in (0, 2), (arguments, said)
        assert status == 0 or len(said.splitlines()) == 1, said


@pytest.mark.parametrize("content", [b"x = (", b"\x00\xff\xfe", b"", b"\xe9 = 1"])
def test_a_script_that_is_none(content, tmp_path, capsys):
    script = tmp_path / "train.py"
    script.write_bytes(content)
    assert main(["profile", str(script)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_script_with_an_error_of_its_own_shows_where(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("raise KeyError('mine')\n")
    with pytest.raises(KeyError, match="mine"):
        main(["profile", str(script)])
