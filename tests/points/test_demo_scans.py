"""On the smallest scans, the demonstration prints a result or one line, never a traceback."""

import numpy as np
import pytest

from tests._process import run

CLOUDS = {
    "one point": [[1.0, 2.0, 3.0]],
    "two points of one voxel": [[1.0, 2.0, 3.0], [1.001, 2.0, 3.0]],
    "vertical line": [[1.0, 2.0, 0.01 * z] for z in range(300)],
    "flat square": [[0.05 * x, 0.05 * y, 0.0] for x in range(30) for y in range(30)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLOUDS)
def test_small_clouds(name, tmp_path):
    pytest.importorskip("matplotlib")
    np.save(tmp_path / "scan.npy", CLOUDS[name])
    command = ("-m", "tritonspconv", "demo", "scan.npy", "--device", "cpu")
    lines = run(*command, cwd=tmp_path, MPLBACKEND="agg").stdout.splitlines()
    assert not [line for line in lines if "FAIL" in line or "nan" in line]
    assert (tmp_path / "demo_out" / "levels.png").stat().st_size > 10_000


def test_a_broken_scan_is_one_line_and_status_two(tmp_path):
    (tmp_path / "scan.bin").write_bytes(b"")
    command = ("-m", "tritonspconv", "demo", "scan.bin", "--device", "cpu")
    process = run(*command, cwd=tmp_path, status=2)
    assert "scan.bin must hold points; the file is empty" in process.stderr
    assert process.stderr.count("\n") == 1
