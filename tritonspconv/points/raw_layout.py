"""Find how many values a point has in a file of plain float32 numbers.

Such a file does not say where a point ends. Two tests find it. The number of values must be a
multiple of the width. And value ``k`` of the file must depend on ``k modulo width``: x, y, z and
the intensity have different distributions, so the right width separates them, and a wrong width
mixes them. `width_of` accepts a width only where the tests leave no other, and otherwise raises an
error that says how to name the columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonspconv.guide import more
from tritonspconv.points.table import Table

# Values per point of the usual formats: xyz; KITTI; nuScenes and Waymo; coloured rooms; coloured
# rooms with a label.
WIDTHS = (3, 4, 5, 6, 7)
# Wider layouts are recognised, so that they are not read as one of the above; they must be named.
_WIDEST = 16
_SAMPLE = 400_000
_CLEAR = 0.05
_LEAST_VALUES = 480
HOW = "Name the values of a point: --columns x,y,z,intensity,_ (with _ for a value to skip)."


def assume_layout(file: str, values: Tensor, usual: int | None = None) -> Table:
    """Split plain values into points, or refuse.

    Args:
        file: The name of the file, for messages.
        values: float32 ``[M]``, M >= 1, as they stand in the file.
        usual: The width that the name of the file promises; None: no promise.

    Raises:
        ValueError: The values are no float32 numbers, or more than one width is plausible.
    """
    _check_numbers(file, values)
    width = width_of(file, values, usual)
    points = values.reshape(-1, width).double()
    return Table(points, names_of(points), assumed=True, note=f"{width} float32 values a point")


def width_of(file: str, values: Tensor, usual: int | None = None) -> int:
    """Return the number of values of a point; see `assume_layout`."""
    count = len(values)
    fitting = [width for width in WIDTHS if count % width == 0]
    scores = {width: separation(values, width) for width in range(2, _WIDEST + 1)}
    best = max(scores, key=lambda width: scores[width])
    if count < _LEAST_VALUES or scores[best] < _CLEAR:
        return _only_width(file, count, fitting, usual)
    # A multiple of the right width separates as well. The least width that is nearly as good wins.
    least = min(width for width, score in scores.items() if score > 0.9 * scores[best])
    least = _folded(values, least)
    if least not in fitting or (usual is not None and least != usual):
        expected = f"{usual} values a point" if usual else "3 to 7 values a point"
        raise ValueError(
            f"read_scan: {file} must hold {expected}; got {count} float32 values that look like "
            f"{least} a point. {HOW}" + more("scan-layout")
        )
    return least


def separation(values: Tensor, width: int) -> float:
    """Return how well ``k modulo width`` separates the values; 0: not at all.

    The number is a sum of explained shares of variance, of the value's rank, of the rank of its
    magnitude, of whether it is whole, and of whether it lies in 0..1.
    """
    # Whole points of every width up to the sample's end.
    values = values[:_SAMPLE]
    values = values[: len(values) // width * width].double()
    if len(values) < 2 * width:
        return 0.0
    features = (
        _rank(values),
        _rank(values.abs()),
        (values == values.round()).double(),
        ((values >= 0) & (values <= 1)).double(),
    )
    total = 0.0
    for feature in features:
        spread = float(feature.var(correction=0))
        if spread > 1e-12:
            total += float(feature.reshape(-1, width).mean(dim=0).var(correction=0)) / spread
    return total


def names_of(points: Tensor) -> tuple[str, ...]:
    """Return the usual names of columns, by their number and their ranges.

    Args:
        points: ``[N, F]``, F >= 3.
    """
    extra = points[:, 3:]
    count = extra.shape[1]
    names: list[str] = []
    if count >= 3 and _is_color(extra[:, :3]):
        names = ["red", "green", "blue"]
    elif count and not bool((extra[:, 0] < 0).any()):
        names = ["intensity"]
        if count > 1 and _is_index(extra[:, 1]):
            names.append("ring")
    names += [f"column{3 + number}" for number in range(len(names), count)]
    return ("x", "y", "z", *names)


def _only_width(file: str, count: int, fitting: Sequence[int], usual: int | None) -> int:
    """Return the width if the values themselves do not decide."""
    if usual is not None and usual in fitting:
        return usual
    if len(fitting) == 1 and usual is None:
        return fitting[0]
    if usual is not None:
        problem = f"must hold {usual} float32 values a point; got {count} values"
    elif fitting:
        widths = ", ".join(map(str, fitting))
        problem = f"must hold points of one width; {count} values may be points of {widths} values"
    else:
        problem = f"must hold 3 to 7 float32 values a point; got {count} values"
    raise ValueError(f"read_scan: {file} {problem}. {HOW}" + more("scan-layout"))


def _check_numbers(file: str, values: Tensor) -> None:
    """Refuse values whose exponents are not those of float32 metres."""
    size = values.abs()
    plausible = (size == 0) | ((size > 1e-9) & (size < 1e9)) | ~values.isfinite()
    share = float(plausible.float().mean())
    if share < 0.98:
        raise ValueError(
            f"read_scan: {file} must hold float32 numbers; got {100 * (1 - share):.0f} % of values "
            "that no scan has. Read the file with its own tool, and save the points as .npy [N, F]."
        )


def _folded(values: Tensor, width: int) -> int:
    """Return a divisor of ``width`` where several points look like one.

    If the beams of a sensor alternate between high and low, z alternates from point to point. All
    other columns of such points have the same distribution.
    """
    rows = values[: len(values[:_SAMPLE]) // width * width].reshape(-1, width).double()
    for part in WIDTHS:
        if part < width and width % part == 0:
            columns = [rows[:, number::part] for number in range(part)]
            differing = [max(_distance(c[:, 0], other) for other in c.T) > 0.15 for c in columns]
            if sum(differing) <= 1:
                return part
    return width


def _distance(first: Tensor, second: Tensor) -> float:
    """Return the greatest difference of two distributions (Kolmogorov and Smirnov)."""
    both = torch.cat([first, second]).unique()
    shares = [
        torch.searchsorted(x.sort().values, both, right=True) / len(x) for x in (first, second)
    ]
    return float((shares[0] - shares[1]).abs().max())


def _rank(values: Tensor) -> Tensor:
    """Return the rank of each value in 0..1; equal values share the rank of their middle."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    middle = counts.cumsum(0) - 0.5 * counts
    return (middle / len(values))[group]


def _is_color(columns: Tensor) -> bool:
    finite = columns[columns.isfinite()]
    if not len(finite) or bool(finite.min() < 0):
        return False
    whole = bool((finite == finite.round()).all())
    return bool(finite.max() <= 1) if not whole else 1 < float(finite.max()) <= 255


def _is_index(column: Tensor) -> bool:
    finite = column[column.isfinite()]
    whole = bool((finite == finite.round()).all())
    return whole and len(finite) > 0 and 0 <= float(finite.min()) < float(finite.max()) <= 255
