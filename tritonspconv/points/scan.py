"""Read a point cloud from a file, and describe its columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tritonspconv.points.formats import reader_of
from tritonspconv.points.table import Table

# Beyond this distance from zero, neighbouring float32 numbers are half a millimetre apart or more.
_FAR = 4096.0
_FARTHEST = 1e8


@dataclass(frozen=True)
class Scan:
    """A point cloud.

    Attributes:
        name: The name of the file.
        points: float32 ``[N, F]``, N >= 1: x, y, z in metres from the origin, then other columns.
        columns: The F names of the columns.
        origin: Metres along x, y, z that were subtracted from the file's coordinates, in float64.
            Zeros for a scan that lies around zero.
        assumed: True: the names of the columns are an assumption.
        remarks: Sentences about the scan that its user should read.
    """

    name: str
    points: Tensor
    columns: tuple[str, ...]
    origin: tuple[float, float, float]
    assumed: bool
    remarks: tuple[str, ...]

    def describe(self) -> list[str]:
        """Return lines that describe the scan: columns, ranges, units and remarks."""
        how = "assumed" if self.assumed else "as named"
        columns = ", ".join(self.columns)
        lines = [f"{self.name}: {len(self.points):,} points; columns {how}: {columns}"]
        low, high = (bound.tolist() for bound in self.points.aminmax(dim=0))
        for number, name in enumerate(self.columns):
            unit = " m" if number < 3 else ""
            lines.append(f"  {name:12} {low[number]:>12,.2f} .. {high[number]:>12,.2f}{unit}")
        if any(self.origin):
            at = ", ".join(f"{value:,.0f}" for value in self.origin)
            lines.append(f"  x, y, z count from {at}")
        return [*lines, *(f"  {remark}" for remark in self.remarks)]


def read_scan(
    path: str | Path, columns: Sequence[str] | None = None, *, scale: float = 1.0
) -> Scan:
    """Read a point cloud.

    Formats: ``.bin`` (float32 values without a header, as of KITTI, nuScenes and Waymo), ``.npy``
    and ``.npz`` (``[N, F]``, or structured with the fields x, y, z), ``.txt``, ``.xyz``, ``.csv``
    and ``.pts`` (numbers in lines), ``.pcd``, ``.ply``, ``.las``, ``.laz`` and ``.e57``. All but
    ``.bin`` need an optional package; the error names it.

    Coordinates farther than 4 km from zero (UTM, for example) are moved to an origin in float64
    before they become float32; `Scan.origin` holds it.

    Args:
        path: The file.
        columns: For a file that names its columns, the columns to read. For other files, the names
            of all columns in their order, with ``_`` for one to skip. None: the names in the file,
            or an assumption from the number of columns and their ranges.
        scale: Metres in one unit of the file; 0.001 for a file in millimetres.

    Returns:
        The points with finite values. The remarks say how many others were left out.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: The reader of the format is not installed.
        ValueError: The format is unknown, the content is no point cloud, or the layout of a
            ``.bin`` file is ambiguous. The message says how to name the columns.
    """
    path = Path(path)
    reader = reader_of(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_scan: no file {path}. Check the path of the scan.")
    if path.stat().st_size == 0:
        raise ValueError(f"read_scan: {path.name} must hold points; the file is empty.")
    try:
        table = reader(path, columns)
    except (ImportError, OSError):
        raise
    except Exception as error:  # a reader of another package may raise anything
        if isinstance(error, ValueError) and str(error).startswith(("read_scan:", "--columns")):
            raise
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ValueError(
            f"read_scan: {path.name} must be a readable {path.suffix} file; its reader says: "
            f"{reason[:200]}"
        ) from error
    return _scan(path.name, table, scale)


def _scan(name: str, table: Table, scale: float) -> Scan:
    values = table.values
    remarks = [f"the layout: {table.note}"] if table.note else []
    finite = values.isfinite().all(dim=1)
    dropped = int((~finite).sum())
    if dropped:
        remarks.append(f"left out {dropped:,} of {len(values):,} points: not finite")
        values = values[finite]
    if not len(values):
        raise ValueError(f"read_scan: {name} must hold a point with finite values; it holds none.")
    xyz = values[:, :3] * scale
    farthest = float(xyz.abs().max())
    if farthest > _FARTHEST:
        raise ValueError(
            f"read_scan: {name} must hold metres; got a coordinate of {farthest:.3g}. "
            "Name the columns (--columns), or give the unit (--scale)."
        )
    origin = torch.zeros(3, dtype=torch.float64)
    if farthest > _FAR:
        origin = xyz.amin(dim=0).floor()
        _remark_on_steps(table, xyz, remarks)
    xyz = xyz - origin
    if scale == 1.0 and _looks_like_millimetres(xyz):
        size = " x ".join(f"{float(extent):,.0f}" for extent in xyz.amax(0) - xyz.amin(0))
        remarks.append(f"the cloud measures {size} m; if these are millimetres, say --scale 0.001")
    points = torch.cat([xyz, values[:, 3:]], dim=1).float()
    x, y, z = origin.tolist()
    return Scan(name, points, table.names, (x, y, z), table.assumed, tuple(remarks))


def _remark_on_steps(table: Table, xyz: Tensor, remarks: list[str]) -> None:
    """Remark on far coordinates that the file keeps in float32: the file itself is coarse."""
    stored = table.values[:, :3]
    if bool((stored.float().double() == stored).all()):
        step = float(xyz.abs().max()) * 2**-23
        remarks.append(f"the file has coordinates in float32: they are up to {step:.2g} m apart")


def _looks_like_millimetres(xyz: Tensor) -> bool:
    """Tell whether 98 % of the points span a height that no scan in metres has."""
    heights = xyz[:, 2].sort().values
    trim = len(heights) // 100
    return float(heights[-1 - trim] - heights[trim]) > 500
