"""The columns of a point cloud as a file holds them, and the columns that a caller asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tritonspconv.guide import more

INTENSITY_NAMES = ("intensity", "reflectance", "reflectivity", "scalar_intensity", "i")
SKIPPED = "_"


@dataclass(frozen=True)
class Table:
    """Numbers of a file, one column for each value that it holds for a point.

    Attributes:
        values: float64 ``[N, F]``.
        names: The F names of the columns.
        assumed: True: the names are a guess. False: the file or the caller gave them.
        note: The way in which the layout was found, for the description of the scan.
    """

    values: Tensor
    names: tuple[str, ...]
    assumed: bool
    note: str = ""


def parse_columns(text: str) -> tuple[str, ...]:
    """Return the names in a list such as ``x,y,z,intensity,_``.

    Args:
        text: Names between commas. Each of x, y and z must be there once. ``_`` skips a column.

    Raises:
        ValueError: x, y or z is missing, or a name comes twice.

    Example:
        >>> parse_columns("x,y,z,intensity,_")
        ('x', 'y', 'z', 'intensity', '_')
    """
    names = tuple(name.strip() for name in text.split(","))
    kept = [name for name in names if name != SKIPPED]
    if not {"x", "y", "z"} <= set(kept) or len(set(kept)) != len(kept) or "" in kept:
        raise ValueError(
            f"--columns must name x, y and z and no column twice; got {text!r}. Give one name for "
            "each value of a point, and _ for a value to skip: --columns x,y,z,intensity,_"
            + more("scan-layout")
        )
    return names


def wanted_names(file: str, held: Sequence[str], asked: Sequence[str] | None) -> tuple[str, ...]:
    """Return which columns to read from a file that names its columns.

    Args:
        file: The name of the file, for the message.
        held: The names in the file.
        asked: The names that the caller wants; None: x, y, z and the intensity where there is one.

    Raises:
        ValueError: The file lacks a column.
    """
    if asked is None:
        brightness = [name for name in held if name.lower() in INTENSITY_NAMES]
        asked = ("x", "y", "z", *brightness[:1])
    asked = tuple(name for name in asked if name != SKIPPED)
    lacking = [name for name in asked if name not in held]
    if lacking:
        raise ValueError(
            f"read_scan: {file} must have the columns {', '.join(asked)}; got {', '.join(held)}. "
            "Name columns that the file has: --columns x,y,z,..." + more("scan-layout")
        )
    return asked


def named_in_order(file: str, values: Tensor, columns: Sequence[str]) -> Table:
    """Name the columns of an array in their order, and put x, y, z first.

    Raises:
        ValueError: The number of names differs from the number of columns.
    """
    if values.shape[1] != len(columns):
        raise ValueError(
            f"read_scan: --columns must name all {values.shape[1]} columns of {file}; got "
            f"{len(columns)}: {','.join(columns)}. Use _ for a column to skip."
            + more("scan-layout")
        )
    others = [name for name in columns if name not in ("x", "y", "z", SKIPPED)]
    names = ("x", "y", "z", *others)
    order = [columns.index(name) for name in names]
    return Table(values[:, order], names, assumed=False)
