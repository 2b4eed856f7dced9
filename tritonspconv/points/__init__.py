"""Read a scan from a file, and choose a voxel grid that suits it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

INTENSITY_NAMES = ("intensity", "reflectance", "reflectivity", "scalar_intensity", "i")


@dataclass(frozen=True)
class VoxelGrid:
    """A box of equal voxels.

    Attributes:
        point_range: Lower x, y, z, then upper x, y, z, in metres.
        voxel_size: Metres along x, y, z.
    """

    point_range: tuple[float, float, float, float, float, float]
    voxel_size: tuple[float, float, float]

    @property
    def spatial_shape(self) -> list[int]:
        """Number of voxels along z, y, x."""
        lower, upper = self.point_range[:3], self.point_range[3:]
        axes = zip(lower, upper, self.voxel_size, strict=True)
        return [round((high - low) / size) for low, high, size in axes][::-1]


FRONT_CROP = VoxelGrid((0.0, -40.0, -3.0, 70.4, 40.0, 1.0), (0.05, 0.05, 0.1))
SURROUND = VoxelGrid((-76.8, -76.8, -2.0, 76.8, 76.8, 6.0), (0.1, 0.1, 0.15))
FINE = VoxelGrid((-76.8, -76.8, -2.0, 76.8, 76.8, 6.0), (0.05, 0.05, 0.05))


def load_points(path: str | Path) -> Tensor:
    """Read a point cloud.

    Args:
        path: A ``.bin`` file (float32 x, y, z, intensity as in KITTI; five values a point where
            the name ends in ``.pcd.bin``, as in nuScenes), ``.npy``, ``.npz`` (array ``pc`` or
            ``points``, else the first two-dimensional float array), ``.pcd`` or ``.ply``.

    Returns:
        float32 ``[N, F]``: x, y, z and what else the file holds for a point (of ``.pcd`` and
        ``.ply``: the intensity). Points with a value that is not finite are left out, and their
        number is printed.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: The reader of the format is not installed.
        ValueError: The format is unknown, or the content is no point cloud.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"load_points: {path.name} must end in one of {', '.join(_READERS)}; got "
            f"{path.suffix or 'no suffix'!r}. Convert the scan, for example to .npy with [N, 4]."
        )
    if not path.is_file():
        raise FileNotFoundError(f"load_points: no file {path}. Check the path of the scan.")
    array = reader(path)
    numeric = np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)
    if array.ndim != 2 or array.shape[1] < 3 or not numeric:
        raise ValueError(
            f"load_points: {path.name} must hold numbers [N, F] with F >= 3 (x, y, z, ...); got "
            f"{array.dtype} {list(array.shape)}."
        )
    points = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    finite = points.isfinite().all(dim=1)
    dropped = int((~finite).sum())
    if dropped:
        print(f"{path.name}: left out {dropped} of {len(points)} points: not finite", flush=True)
        points = points[finite]
    if not len(points):
        raise ValueError(f"load_points: {path.name} holds no point with finite coordinates.")
    return points


def voxel_range(points: Tensor) -> VoxelGrid:
    """Choose a voxel grid for a scan.

    A scan cropped to the front camera gets KITTI's usual grid, one around a vehicle a box of
    153.6 m, and anything else (a room, a tile of a map) a box around 99.8 % of its points with at
    most 1,500 voxels a side.

    Args:
        points: ``[N, F]`` with x, y, z first, in metres; N >= 1.
    """
    ordered = points[:, :3].double().sort(dim=0).values
    trim = len(points) // 1000
    lower, upper = ordered[trim], ordered[-1 - trim]
    extent = upper - lower
    if bool(ordered[0, 0] >= 0) and _share(points, FRONT_CROP) > 0.9 and extent[0] > 20:
        return FRONT_CROP
    if _share(points, SURROUND) > 0.95 and extent[:2].amin() > 20:
        return SURROUND
    size = max(0.02, float(extent.amax()) / 1500)
    # 32 voxels are enough for the networks' strides even where a cloud is flat.
    cells = [max(32, int(value / size) + 4) for value in extent.tolist()]
    middle = (0.5 * (lower + upper)).tolist()
    low = [
        size * math.floor(at / size - count / 2) for at, count in zip(middle, cells, strict=True)
    ]
    high = [start + size * count for start, count in zip(low, cells, strict=True)]
    return VoxelGrid((low[0], low[1], low[2], high[0], high[1], high[2]), (size, size, size))


def _share(points: Tensor, grid: VoxelGrid) -> float:
    """Return the share of the points that lies inside the grid."""
    bounds = points.new_tensor(grid.point_range)
    inside = (points[:, :3] >= bounds[:3]) & (points[:, :3] < bounds[3:])
    return float(inside.all(dim=1).float().mean())


def _read_bin(path: Path) -> np.ndarray:
    values = np.fromfile(path, dtype=np.float32)
    columns = 5 if path.name.lower().endswith(".pcd.bin") else 4
    if path.stat().st_size % (4 * columns):
        raise ValueError(
            f"load_points: {path.name} must hold {columns} float32 values a point, a multiple of "
            f"{4 * columns} bytes; got {path.stat().st_size} bytes. Save other layouts as .npy."
        )
    return values.reshape(-1, columns)


def _read_npy(path: Path) -> np.ndarray:
    return np.load(path, allow_pickle=False)


def _read_npz(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        for name in ("pc", "points"):
            if name in arrays:
                return arrays[name]
        for name in arrays.files:
            if arrays[name].ndim == 2 and np.issubdtype(arrays[name].dtype, np.floating):
                return arrays[name]
        found = {name: list(arrays[name].shape) for name in arrays.files}
    raise ValueError(
        f"load_points: {path.name} must hold an array named 'pc' or 'points', or a float array "
        f"[N, F]; got {found}."
    )


def _read_pcd(path: Path) -> np.ndarray:
    try:
        from pypcd4.pypcd4 import PointCloud
    except ImportError as error:
        raise _missing("pypcd4", ".pcd") from error
    cloud = PointCloud.from_path(path)
    return cloud.numpy(_columns(path, cloud.fields))


def _read_ply(path: Path) -> np.ndarray:
    try:
        import plyfile
    except ImportError as error:
        raise _missing("plyfile", ".ply") from error
    content = plyfile.PlyData.read(path)
    if "vertex" not in content:
        found = [element.name for element in content.elements]
        raise ValueError(f"load_points: {path.name} must have an element 'vertex'; got {found}.")
    vertices = content["vertex"].data
    names = _columns(path, vertices.dtype.names)
    return np.stack([np.asarray(vertices[name], dtype=np.float32) for name in names], axis=1)


def _columns(path: Path, fields: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of x, y, z and, where there is one, the intensity."""
    lacking = [name for name in ("x", "y", "z") if name not in fields]
    if lacking:
        raise ValueError(
            f"load_points: {path.name} must have the fields x, y, z; got {list(fields)}."
        )
    brightness = [name for name in fields if name.lower() in INTENSITY_NAMES]
    return ("x", "y", "z", *brightness[:1])


def _missing(module: str, suffix: str) -> ImportError:
    return ImportError(
        f"load_points: reading {suffix} needs the package {module}, which is not installed. "
        "Install it with: pip install 'tritonspconv[demo]'"
    )


_READERS: dict[str, Callable[[Path], np.ndarray]] = {
    ".bin": _read_bin,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pcd": _read_pcd,
    ".ply": _read_ply,
}
