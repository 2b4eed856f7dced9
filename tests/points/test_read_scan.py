"""Scans are read in the formats that users have, or refused with one helpful line."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from tritonspconv.points import parse_columns, read_scan
from tritonspconv.testing.lidar import simulate_sweep

N = 2000
RNG = np.random.default_rng(0)
XYZ = RNG.uniform(size=(N, 3)) * [40, 30, 3] - [20, 15, 1]
INTENSITY = RNG.uniform(size=(N, 1))
RGB = RNG.integers(0, 256, (N, 3)).astype(float)


def write_bin(folder: Path, *columns: np.ndarray, name: str = "scan.bin") -> Path:
    path = folder / name
    np.concatenate(columns, axis=1).astype(np.float32).tofile(path)
    return path


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ([XYZ], "x,y,z"),
        ([XYZ, INTENSITY], "x,y,z,intensity"),
        ([XYZ, INTENSITY, np.arange(N)[:, None] % 32], "x,y,z,intensity,ring"),
        ([XYZ, INTENSITY, 0.3 * INTENSITY[::-1] + 0.01], "x,y,z,intensity,column4"),
        ([XYZ, RGB], "x,y,z,red,green,blue"),
        ([XYZ, RGB / 255], "x,y,z,red,green,blue"),
        ([XYZ, RGB, np.arange(N)[:, None] % 13], "x,y,z,red,green,blue,column6"),
        ([XYZ, XYZ / 20 - 0.5], "x,y,z,column3,column4,column5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_layout_of_plain_values_is_found(columns, names, tmp_path):
    scan = read_scan(write_bin(tmp_path, *columns))
    assert scan.columns == tuple(names.split(","))
    assert scan.assumed
    assert np.array_equal(scan.points, np.concatenate(columns, axis=1).astype(np.float32))


def test_beams_that_alternate_do_not_look_like_longer_points(tmp_path):
    for points in (XYZ, np.concatenate([XYZ, INTENSITY], axis=1)):
        points = points.copy()
        points[::2, 2] -= 10
        assert read_scan(write_bin(tmp_path, points)).points.shape == points.shape


def test_a_simulated_sweep_in_the_layout_of_nuscenes(tmp_path):
    sweep = simulate_sweep(beams=16, azimuths=256).points.numpy()
    ring = np.arange(len(sweep))[:, None] % 16
    path = write_bin(tmp_path, sweep, ring, name="sweep.pcd.bin")
    assert read_scan(path).columns == ("x", "y", "z", "intensity", "ring")


@pytest.mark.parametrize(
    ("columns", "name", "message"),
    [
        # Columns of normal numbers cannot be told apart, and 6000 values fit 3, 4, 5 or 6 columns.
        ([RNG.normal(size=(N, 3))], "a.bin", r"6000 values may be points of 3, 4, 5, 6 values"),
        ([np.ones((1, 12))], "a.bin", r"12 values may be points of 3, 4, 6 values\. .*--columns"),
        ([np.ones((1, 11))], "a.bin", r"3 to 7 float32 values a point; got 11 values"),
        ([XYZ, RGB, XYZ / 20], "a.bin", r"18000 float32 values that look like 9 a point"),
        ([XYZ, INTENSITY], "a.pcd.bin", r"must hold 5 values a point; .* look like 4 a point"),
        ([RNG.integers(0, 2**32, (N, 3)).astype(np.uint32).view(np.float32)], "a.bin",
         r"must hold float32 numbers; got \d+ % of values that no scan has"),
    ],
    ids=["isotropic", "one point", "prime", "nine columns", "short for nuScenes", "integers"],
)  # fmt: skip
def test_ambiguous_values_are_refused(columns, name, message, tmp_path):
    with pytest.raises(ValueError, match=rf"read_scan: {name} .*{message}"):
        read_scan(write_bin(tmp_path, *columns, name=name))


def test_columns_say_the_layout(tmp_path):
    path = write_bin(tmp_path, INTENSITY, XYZ, RGB[:, :1])
    scan = read_scan(path, parse_columns("intensity,x,y,z,_"))
    assert scan.columns == ("x", "y", "z", "intensity")
    assert not scan.assumed
    expected = np.concatenate([XYZ, INTENSITY], axis=1).astype(np.float32)
    assert np.array_equal(scan.points, expected)
    with pytest.raises(ValueError, match=r"whole points of 3 values \(x,y,z\); got 10000"):
        read_scan(path, ("x", "y", "z"))
    np.save(tmp_path / "wide.npy", XYZ.repeat(2, axis=1))
    with pytest.raises(ValueError, match=r"must name all 6 columns of wide.npy; got 4: x,y,z,_"):
        read_scan(tmp_path / "wide.npy", ("x", "y", "z", "_"))


@pytest.mark.parametrize("text", ["x,y", "x,y,z,x", "x,y,z,,", ""])
def test_columns_that_are_no_layout(text):
    with pytest.raises(ValueError, match=r"--columns must name x, y and z and no column twice"):
        parse_columns(text)


@pytest.mark.parametrize("suffix", ["npy", "npz", "pcd", "ply", "las", "laz", "e57", "xyz"])
def test_far_coordinates_keep_their_millimetres(suffix, tmp_path):
    far = XYZ + np.array([448_000.0, 5_411_000.0, 300.0])
    path = tmp_path / f"utm.{suffix}"
    WRITERS[suffix](path, far)
    scan = read_scan(path)
    assert scan.columns[:3] == ("x", "y", "z")
    assert scan.origin[:2] == (447_980.0, 5_410_985.0)
    found = scan.points[:, :3].double() + torch.tensor(scan.origin, dtype=torch.float64)
    assert (found - torch.from_numpy(far)).abs().max() < 0.5e-3
    assert any("count from 447,980" in line for line in scan.describe())


def test_coordinates_that_the_file_rounded_get_a_remark(tmp_path):
    far = (XYZ + np.array([448_000.0, 5_411_000.0, 0.0])).astype(np.float32)
    np.save(tmp_path / "utm.npy", far)
    remarks = " ".join(read_scan(tmp_path / "utm.npy").remarks)
    assert "the file has coordinates in float32: they are up to 0.65 m apart" in remarks


def test_millimetres_get_a_remark_and_a_scale(tmp_path):
    np.save(tmp_path / "room.npy", 1000 * XYZ)
    remarks = " ".join(read_scan(tmp_path / "room.npy").remarks)
    assert "if these are millimetres, say --scale 0.001" in remarks
    scan = read_scan(tmp_path / "room.npy", scale=0.001)
    assert not any("millimetres" in remark for remark in scan.remarks)
    assert np.allclose(scan.points, XYZ, atol=1e-5)
    np.save(tmp_path / "room.npy", XYZ)
    assert not any("millimetres" in remark for remark in read_scan(tmp_path / "room.npy").remarks)


def test_a_structured_array_is_read_by_name(tmp_path):
    fields = [("intensity", "u2"), ("z", "f4"), ("x", "f8"), ("y", "f8"), ("label", "u1")]
    cloud = np.zeros(N, fields)
    cloud["x"], cloud["y"], cloud["z"] = XYZ.T
    cloud["intensity"] = np.arange(N)
    np.save(tmp_path / "cloud.npy", cloud)
    scan = read_scan(tmp_path / "cloud.npy")
    assert scan.columns == ("x", "y", "z", "intensity")
    assert scan.points[:, 3].tolist() == list(range(N))
    scan = read_scan(tmp_path / "cloud.npy", ("x", "y", "z", "label"))
    assert scan.columns == ("x", "y", "z", "label")
    with pytest.raises(ValueError, match=r"must have the columns x, y, z, ring; got intensity, z"):
        read_scan(tmp_path / "cloud.npy", ("x", "y", "z", "ring"))


def test_arrays_that_are_no_points(tmp_path):
    np.save(tmp_path / "a.npy", XYZ.T)
    with pytest.raises(ValueError, match=r"a row for each point; got \[3, 2000\]"):
        read_scan(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", XYZ[:, :2])
    with pytest.raises(ValueError, match=r"\[N, F\] with F >= 3 .*; got float64 \[2000, 2\]"):
        read_scan(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", before=XYZ, after=XYZ)
    with pytest.raises(ValueError, match=r"or one float array .*; got before \[2000, 3\], after"):
        read_scan(tmp_path / "a.npz")


def test_text_files(tmp_path):
    path = tmp_path / "cloud.csv"
    path.write_text("X,Y,Z,intensity\n1,2,3,0.5\n4,5,6,0.25\n")
    scan = read_scan(path)
    assert scan.columns == ("x", "y", "z", "intensity")
    assert scan.points.tolist() == [[1, 2, 3, 0.5], [4, 5, 6, 0.25]]
    path = tmp_path / "cloud.pts"
    path.write_text("2\n1 2 3\n4 5 6\n")
    assert read_scan(path).points.tolist() == [[1, 2, 3], [4, 5, 6]]
    path.write_text("1 2 3\n4 5\n")
    with pytest.raises(ValueError, match=r"must be a readable .pts file; its reader says: "):
        read_scan(path)


PCD = "VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\n"
PCD += "WIDTH {n}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {n}\nDATA binary\n"
PLY = "ply\nformat ascii 1.0\nelement vertex {n}\nproperty float x\nproperty float y\n"
PLY += "property float z\nend_header\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pcd", PCD.format(n=0)),
        ("cut.pcd", PCD.format(n=5) + "abc"),
        ("head.pcd", "VERSION 0.7\nFIELDS x y z\n"),
        ("noise.pcd", "\0\1\2 nothing"),
        ("empty.ply", PLY.format(n=0)),
        ("cut.ply", PLY.format(n=5) + "1 2 3\n"),
        ("head.ply", "ply\nformat ascii 1.0\nelement vert"),
        ("noise.ply", "\0\1\2 nothing"),
        ("noise.npy", "nothing"),
        ("noise.npz", "nothing"),
        ("noise.xyz", "nothing at all"),
        ("noise.las", "nothing"),
        ("noise.laz", "nothing"),
        ("noise.e57", "nothing"),
        ("odd.bin", "12345"),
        *[(f"void.{suffix}", "") for suffix in ("bin", "npy", "npz", "pcd", "ply", "xyz", "las")],
    ],
)
def test_broken_files_are_told_in_one_line(name, content, tmp_path):
    reader = {"las": "laspy", "laz": "laspy", "e57": "pye57"}.get(name.partition(".")[2])
    if reader and content:
        pytest.importorskip(reader)
    path = tmp_path / name
    path.write_bytes(content.encode())
    with pytest.raises(ValueError, match=rf"^read_scan: {name} must .*") as caught:
        read_scan(path)
    assert "\n" not in str(caught.value)


def test_one_point_and_points_that_are_not_finite(tmp_path):
    path = tmp_path / "one.bin"
    path.write_bytes(struct.pack("<4f", 1, 2, 3, 0.5))
    assert read_scan(path).points.tolist() == [[1, 2, 3, 0.5]]
    cloud = XYZ.copy()
    cloud[7, 1] = np.nan
    np.save(tmp_path / "nan.npy", cloud)
    scan = read_scan(tmp_path / "nan.npy")
    assert len(scan.points) == N - 1
    assert "left out 1 of 2,000 points: not finite" in scan.remarks
    np.save(tmp_path / "nan.npy", cloud[7:8])
    with pytest.raises(ValueError, match=r"must hold a point with finite values"):
        read_scan(tmp_path / "nan.npy")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"read_scan: no file .*x.bin"):
        read_scan(tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"x.obj must end in one of .bin, .*; got '.obj'"):
        read_scan(tmp_path / "x.obj")


def write_pcd(path: Path, points: np.ndarray) -> None:
    """Write PCL's layout of padded double points, four padding bytes behind each."""
    pypcd4 = pytest.importorskip("pypcd4")
    assert pypcd4
    header = PCD.format(n=len(points)).replace("x y z", "x y z _").replace("4 4 4", "8 8 8 1")
    header = header.replace("F F F", "F F F U").replace("1 1 1\n", "1 1 1 4\n")
    padded = np.zeros(len(points), [("xyz", "<f8", 3), ("pad", "u1", 4)])
    padded["xyz"] = points
    path.write_bytes(header.encode() + padded.tobytes())


def write_ply(path: Path, points: np.ndarray) -> None:
    plyfile = pytest.importorskip("plyfile")
    vertices = np.zeros(len(points), [(name, "f8") for name in "xyz"])
    vertices["x"], vertices["y"], vertices["z"] = points.T
    plyfile.PlyData([plyfile.PlyElement.describe(vertices, "vertex")]).write(str(path))


def write_las(path: Path, points: np.ndarray) -> None:
    laspy = pytest.importorskip("laspy")
    las = laspy.create()
    las.header.scales, las.header.offsets = [1e-4] * 3, points.min(axis=0)
    las.x, las.y, las.z = points.T
    las.intensity = np.arange(len(points))
    las.write(str(path))


def write_e57(path: Path, points: np.ndarray) -> None:
    """Write two scans around a common origin: the writer of pye57 keeps single precision."""
    pye57 = pytest.importorskip("pye57")
    origin = points.mean(axis=0)
    file = pye57.E57(str(path), mode="w")
    for half in (points[: N // 2], points[N // 2 :]):
        local = dict(
            zip(("cartesianX", "cartesianY", "cartesianZ"), (half - origin).T, strict=True)
        )
        file.write_scan_raw(local, translation=origin)
    file.close()


WRITERS = {
    "npy": lambda path, points: np.save(path, points),
    "npz": lambda path, points: np.savez(path, points=points),
    "xyz": lambda path, points: np.savetxt(path, points, fmt="%.6f"),
    "pcd": write_pcd,
    "ply": write_ply,
    "las": write_las,
    "laz": write_las,
    "e57": write_e57,
}
