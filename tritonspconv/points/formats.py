"""Readers of point clouds, one for each format. A reader returns the columns as float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritonspconv.guide import more
from tritonspconv.points.raw_layout import HOW, assume_layout, names_of
from tritonspconv.points.table import Table, named_in_order, wanted_names

if TYPE_CHECKING:
    import numpy as np

Columns = Sequence[str] | None
ARRAY_NAMES = ("points", "pc", "xyz", "pointcloud", "point_cloud", "coords", "coord")


def reader_of(path: Path) -> Callable[[Path, Columns], Table]:
    """Return the reader for the suffix of a file.

    Raises:
        ValueError: There is no reader for the suffix.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None and path.is_dir():
        raise ValueError(f"read_scan: {path} is a folder; it must be a file. Name a file in it.")
    if reader is None:
        raise ValueError(
            f"read_scan: {path.name} must end in one of {', '.join(_READERS)}; got "
            f"{path.suffix or 'no suffix'!r}. Convert the scan, for example to .npy with [N, 4]."
        )
    return reader


def _read_bin(path: Path, columns: Columns) -> Table:
    """Read float32 values without a header; nuScenes ends the names of its sweeps in .pcd.bin."""
    size = path.stat().st_size
    if size % 4:
        raise ValueError(
            f"read_scan: {path.name} must hold float32 values, a multiple of 4 bytes; got {size} "
            "bytes. The file is cut off, or of another format."
        )
    values = torch.from_file(str(path), size=size // 4, dtype=torch.float32)
    if columns is None:
        usual = 5 if path.name.lower().endswith(".pcd.bin") else None
        return assume_layout(path.name, values, usual)
    if len(values) % len(columns):
        raise ValueError(
            f"read_scan: {path.name} must hold whole points of {len(columns)} values "
            f"({','.join(columns)}); got {len(values)} float32 values. {HOW}" + more("scan-layout")
        )
    return named_in_order(path.name, values.reshape(-1, len(columns)).double(), columns)


def _read_npy(path: Path, columns: Columns) -> Table:
    numpy = _import("numpy", path)
    return _of_array(path.name, numpy.load(path, allow_pickle=False), columns)


def _read_npz(path: Path, columns: Columns) -> Table:
    numpy = _import("numpy", path)
    with numpy.load(path, allow_pickle=False) as arrays:
        held = {name: arrays[name] for name in arrays.files}
    for name in ARRAY_NAMES:
        if name in held:
            return _of_array(f"{path.name}[{name}]", held[name], columns)
    clouds = [
        name
        for name, array in held.items()
        if array.dtype.names
        or (array.ndim == 2 and array.shape[1] >= 3 and array.dtype.kind == "f")
    ]
    if len(clouds) != 1:
        found = ", ".join(f"{name} {list(array.shape)}" for name, array in held.items())
        raise ValueError(
            f"read_scan: {path.name} must hold an array named {' or '.join(ARRAY_NAMES[:3])}, or "
            f"one float array [N, F]; got {found or 'no array'}. Save the points as .npy."
        )
    return _of_array(f"{path.name}[{clouds[0]}]", held[clouds[0]], columns)


def _of_array(name: str, array: np.ndarray, columns: Columns) -> Table:
    """Return the columns of a structured array by name, and of a plain one by position."""
    if array.dtype.names:
        names = wanted_names(name, array.dtype.names, columns)
        flat = array.reshape(-1)
        return Table(_stack([flat[each] for each in names]), names, assumed=False)
    if array.ndim != 2 or array.shape[1] < 3 or array.dtype.kind not in "fiu":
        raise ValueError(
            f"read_scan: {name} must hold numbers [N, F] with F >= 3 (x, y, z, ...); got "
            f"{array.dtype} {list(array.shape)}."
        )
    if array.shape[0] in (3, 4) and array.shape[1] > 64:
        raise ValueError(
            f"read_scan: {name} must have a row for each point; got {list(array.shape)}, which "
            "looks like a column for each point. Save the array transposed."
        )
    values = torch.from_numpy(array.astype("float64"))
    if columns is not None:
        return named_in_order(name, values, columns)
    return Table(values, names_of(values), assumed=True, note=f"{array.dtype} {list(array.shape)}")


def _read_text(path: Path, columns: Columns) -> Table:
    """Read numbers in lines, between spaces, commas or semicolons; the first line may name them."""
    numpy = _import("numpy", path)
    lines = path.read_text(errors="replace").replace(",", " ").replace(";", " ").splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("//")]
    header: list[str] = []
    if lines and not _are_numbers(lines[0].lstrip("#").split()):
        header = [name.strip('"').lower() for name in lines[0].lstrip("#").split()]
        lines = lines[1:]
    elif lines and len(lines[0].split()) == 1:
        lines = lines[1:]  # the number of points, as in .pts
    if not lines:
        return Table(torch.empty(0, 3, dtype=torch.float64), ("x", "y", "z"), assumed=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        array = numpy.loadtxt(lines, dtype="float64", ndmin=2)
    if len(header) == array.shape[1] and {"x", "y", "z"} <= set(header):
        names = wanted_names(path.name, header, columns)
        return Table(_stack([array[:, header.index(each)] for each in names]), names, assumed=False)
    return _of_array(path.name, array, columns)


def _are_numbers(words: Sequence[str]) -> bool:
    try:
        [float(word) for word in words]
    except ValueError:
        return False
    return True


def _read_pcd(path: Path, columns: Columns) -> Table:
    point_cloud = _import("pypcd4.pypcd4", path).PointCloud
    cloud = point_cloud.from_path(path)
    # A padded cloud has a field for every padding byte: read the named fields only.
    names = wanted_names(path.name, cloud.fields, columns)
    return Table(_stack([cloud.pc_data[name] for name in names]), names, assumed=False)


def _read_ply(path: Path, columns: Columns) -> Table:
    content = _import("plyfile", path).PlyData.read(path)
    if "vertex" not in content:
        found = [element.name for element in content.elements]
        raise ValueError(f"read_scan: {path.name} must have an element 'vertex'; got {found}.")
    vertices = content["vertex"].data
    names = wanted_names(path.name, vertices.dtype.names, columns)
    return Table(_stack([vertices[name] for name in names]), names, assumed=False)


def _read_las(path: Path, columns: Columns) -> Table:
    las = _import("laspy", path).read(path)
    held = (
        "x",
        "y",
        "z",
        *(name.lower() for name in las.point_format.dimension_names if len(name) > 1),
    )
    names = wanted_names(path.name, held, columns)
    return Table(_stack([las[name] for name in names]), names, assumed=False)


def _read_e57(path: Path, columns: Columns) -> Table:
    """Read all scans of the file in its common frame; pye57 leaves invalid points out."""
    file = _import("pye57", path).E57(str(path))
    parts: list[Tensor] = []
    names: tuple[str, ...] = ()
    for number in range(file.scan_count):
        fields = file.get_header(number).point_fields
        scan = file.read_scan(
            number, intensity="intensity" in fields, colors="colorRed" in fields,
            ignore_missing_fields=True,
        )  # fmt: skip
        held = {str(_E57_NAMES.get(name, name)): values for name, values in scan.items()}
        # All scans have the columns of the first one.
        names = wanted_names(path.name, list(held), names or columns)
        parts.append(_stack([held[name] for name in names]))
    if not parts:
        return Table(torch.empty(0, 3, dtype=torch.float64), ("x", "y", "z"), assumed=False)
    return Table(torch.cat(parts), names, assumed=False, note=f"{len(parts)} scans")


_E57_NAMES = {
    "cartesianX": "x",
    "cartesianY": "y",
    "cartesianZ": "z",
    "colorRed": "red",
    "colorGreen": "green",
    "colorBlue": "blue",
}


def _stack(columns: Sequence[Any]) -> Tensor:
    """Return arrays ``[N]`` of any number type as the columns of a float64 tensor."""
    return torch.stack([torch.from_numpy(_float64(column)) for column in columns], dim=1)


def _float64(column: Any) -> np.ndarray:
    import numpy

    return numpy.ascontiguousarray(column, dtype="float64").reshape(-1)


def _import(module: str, path: Path) -> Any:
    """Import the reader of a format.

    Raises:
        ImportError: The reader is not installed.
    """
    import importlib

    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = "scans" if package in ("laspy", "pye57") else "demo"
        raise ImportError(
            f"read_scan: reading {path.suffix} needs the package {package}, which is not "
            f"installed. Install it with: pip install 'tritonspconv[{extra}]'"
        ) from error


_READERS: dict[str, Callable[[Path, Columns], Table]] = {
    ".bin": _read_bin,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".txt": _read_text,
    ".xyz": _read_text,
    ".csv": _read_text,
    ".pts": _read_text,
    ".pcd": _read_pcd,
    ".ply": _read_ply,
    ".las": _read_las,
    ".laz": _read_las,
    ".e57": _read_e57,
}
