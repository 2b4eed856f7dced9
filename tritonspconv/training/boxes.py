"""Boxes on the ground: overlap, points inside, and average precision.

A box is ``[x, y, z, length, width, height, angle]``: centre and sizes in metres, and the angle
about z of the length from the x axis in radians, counter-clockwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Corner = tuple[float, float]
# Precision is averaged at these recalls, as KITTI does since 2019.
RECALLS = [step / 40 for step in range(1, 41)]


def corners(boxes: Tensor) -> Tensor:
    """Return the corners from above, ``[M, 4, 2]``, counter-clockwise.

    Args:
        boxes: ``[M, 7]``.
    """
    signs = boxes.new_tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2
    offsets = signs * boxes[:, None, 3:5]
    cos, sin = boxes[:, None, 6].cos(), boxes[:, None, 6].sin()
    x = offsets[..., 0] * cos - offsets[..., 1] * sin
    y = offsets[..., 0] * sin + offsets[..., 1] * cos
    return torch.stack([x, y], dim=-1) + boxes[:, None, :2]


def points_inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Return how many points lie in each box, int64 ``[M]``.

    Args:
        points: ``[N, 3]``.
        boxes: ``[M, 7]``.
    """
    offset = points[None] - boxes[:, None, :3]
    cos, sin = boxes[:, None, 6].cos(), boxes[:, None, 6].sin()
    along = offset[..., 0] * cos + offset[..., 1] * sin
    across = offset[..., 1] * cos - offset[..., 0] * sin
    local = torch.stack([along, across, offset[..., 2]], dim=-1)
    return (local.abs() <= boxes[:, None, 3:6] / 2).all(dim=-1).sum(dim=1)


def overlaps(first: Tensor, second: Tensor, *, heights: bool = False) -> Tensor:
    """Return intersection over union of each pair, float64 ``[M, N]``.

    Args:
        first: ``[M, 7]``.
        second: ``[N, 7]``.
        heights: True: of the volumes; False: of the areas seen from above.

    Example:
        >>> here = torch.tensor([[0.0, 0, 0, 4, 2, 2, 0]])
        >>> moved = torch.tensor([[2.0, 0, 0, 4, 2, 2, 0]])
        >>> round(float(overlaps(here, moved)), 3)
        0.333
    """
    first, second = first.detach().double().cpu(), second.detach().double().cpu()
    shared = torch.zeros(len(first), len(second), dtype=torch.float64)
    reach = (first[:, None, 3:5].norm(dim=2) + second[None, :, 3:5].norm(dim=2)) / 2
    near = (first[:, None, :2] - second[None, :, :2]).norm(dim=2) < reach
    polygons, windows = corners(first).tolist(), corners(second).tolist()
    for i, j in near.nonzero().tolist():
        shared[i, j] = _shared_area(polygons[i], windows[j])
    last = 6 if heights else 5
    if heights:
        tops = torch.minimum(
            *_pairs(first[:, 2] + first[:, 5] / 2, second[:, 2] + second[:, 5] / 2)
        )
        feet = torch.maximum(
            *_pairs(first[:, 2] - first[:, 5] / 2, second[:, 2] - second[:, 5] / 2)
        )
        shared = shared * (tops - feet).clamp(min=0)
    mine, theirs = _pairs(first[:, 3:last].prod(dim=1), second[:, 3:last].prod(dim=1))
    return shared / (mine + theirs - shared).clamp(min=1e-12)


def distinct(boxes: Tensor, scores: Tensor, most_overlap: float = 0.1) -> list[int]:
    """Return the rows to keep, best first, such that no two overlap by more than a share.

    Args:
        boxes: ``[M, 7]``.
        scores: ``[M]``.
        most_overlap: Intersection over union from above.
    """
    order = scores.argsort(descending=True, stable=True).tolist()
    overlap = overlaps(boxes, boxes)
    kept: list[int] = []
    for row in order:
        if all(overlap[row, other] <= most_overlap for other in kept):
            kept.append(row)
    return kept


@dataclass(frozen=True)
class Judged:
    """The boxes that were found in a scan, and its true boxes.

    Attributes:
        found: float32 ``[M, 7]``.
        scores: float32 ``[M]``.
        truth: float32 ``[N, 7]``.
        ignored: bool ``[N]``: neither finding nor missing such a box counts.
    """

    found: Tensor
    scores: Tensor
    truth: Tensor
    ignored: Tensor


def average_precision(
    scans: Sequence[Judged], least_overlap: float, *, heights: bool = False
) -> float:
    """Return the mean precision at 40 recalls, in 0..1; NaN where no scan has a box that counts.

    Found boxes are taken by falling score. Each takes the true box of its scan that it overlaps
    most, among those that no other has taken.

    Args:
        scans: Found boxes and true boxes of each scan.
        least_overlap: Intersection over union from which a box counts as found.
        heights: True: of the volumes; False: of the areas seen from above.
    """
    outcomes: list[tuple[float, bool]] = []
    count = 0
    for scan in scans:
        count += int((~scan.ignored).sum())
        overlap = overlaps(scan.found, scan.truth, heights=heights)
        taken: set[int] = set()
        for row in scan.scores.argsort(descending=True, stable=True).tolist():
            open_rows = [
                n
                for n in range(len(scan.truth))
                if n not in taken and overlap[row, n] >= least_overlap
            ]
            best = max(open_rows, key=lambda n: float(overlap[row, n]), default=None)
            if best is not None:
                taken.add(best)
            if best is None or not scan.ignored[best]:
                outcomes.append((float(scan.scores[row]), best is not None))
    if not count:
        return math.nan
    outcomes.sort(key=lambda outcome: -outcome[0])
    right = 0
    curve: list[tuple[float, float]] = []
    for number, (_, is_right) in enumerate(outcomes, start=1):
        right += is_right
        curve.append((right / count, right / number))
    best_from = [
        max((precision for recall, precision in curve if recall >= least - 1e-9), default=0.0)
        for least in RECALLS
    ]
    return sum(best_from) / len(RECALLS)


def _pairs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return first[:, None], second[None]


def _shared_area(polygon: list[Corner], window: list[Corner]) -> float:
    """Clip a convex polygon by the sides of another (Sutherland and Hodgman); return its area."""
    for start, end in zip(window, [*window[1:], window[0]], strict=True):
        side = [_left_of(start, end, corner) for corner in polygon]
        clipped: list[Corner] = []
        for n, here in enumerate(polygon):
            before, last = polygon[n - 1], side[n - 1]
            if (last >= 0) != (side[n] >= 0):
                share = last / (last - side[n])
                clipped.append(
                    (
                        before[0] + share * (here[0] - before[0]),
                        before[1] + share * (here[1] - before[1]),
                    )
                )
            if side[n] >= 0:
                clipped.append(here)
        polygon = clipped
    doubled = sum(
        polygon[n - 1][0] * polygon[n][1] - polygon[n][0] * polygon[n - 1][1]
        for n in range(len(polygon))
    )
    return doubled / 2


def _left_of(start: Corner, end: Corner, corner: Corner) -> float:
    """Return a number above zero where the corner lies left of the line."""
    return (end[0] - start[0]) * (corner[1] - start[1]) - (end[1] - start[1]) * (
        corner[0] - start[0]
    )
