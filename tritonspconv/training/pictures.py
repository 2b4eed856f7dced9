"""Pictures of a training: curves, and predictions beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tritonspconv.points import VoxelGrid
from tritonspconv.training.box_scenes import BoxScene
from tritonspconv.training.boxes import corners
from tritonspconv.training.data import IGNORED
from tritonspconv.training.loop import Epoch


class Shown(NamedTuple):
    """A scan with its true and its predicted classes; coordinates are batch, z, y, x."""

    coords: Tensor
    truth: Tensor
    found: Tensor


class ShownBoxes(NamedTuple):
    """A scene, the boxes found in it, float32 ``[M, 7]``, and their scores ``[M]``."""

    scene: BoxScene
    boxes: Tensor
    scores: Tensor


def draw_curves(path: Path, runs: Mapping[str, Sequence[Epoch]], score_name: str = "mIoU") -> None:
    """Draw loss and score over the epochs, one line a run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, epochs in runs.items():
        numbers = [epoch.number for epoch in epochs]
        left.plot(numbers, [epoch.loss for epoch in epochs], marker="o", ms=3, label=name)
        right.plot(numbers, [100 * epoch.score for epoch in epochs], marker="o", ms=3, label=name)
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel=f"validation {score_name}, %", ylim=(0, 100))
    right.legend()
    left.yaxis.set_major_formatter(ScalarFormatter())
    left.yaxis.set_minor_formatter(ScalarFormatter())
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_predictions(path: Path, scans: Sequence[Shown], class_names: Sequence[str]) -> None:
    """Draw scans from above, one a row: the truth, the prediction, and where they differ.

    Voxels of a class called ceiling are left out, because they would hide all others.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    palette = colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    colors = [palette[number % 20] for number in range(len(class_names))]
    ceiling = list(class_names).index("ceiling") if "ceiling" in class_names else None
    without = "" if ceiling is None else ", ceiling left out"
    width = 9.5
    figure = Figure(figsize=(width, 3.3 * len(scans) + 0.5), layout="constrained")
    rows = zip(figure.subplots(len(scans), 3, squeeze=False), scans, strict=True)
    for number, (row, scan) in enumerate(rows):
        seen = scan.truth != IGNORED
        if ceiling is not None:
            seen &= (scan.truth != ceiling) & (scan.found != ceiling)
        order = scan.coords[seen, 1].argsort()
        coords, truth, found = (part[seen][order] for part in scan)
        wrong = truth != found
        shades = [
            [colors[label] for label in truth.tolist()],
            [colors[label] for label in found.tolist()],
            ["#d62728" if bad else "#d9dde3" for bad in wrong.tolist()],
        ]
        share = 100 * float(wrong.float().mean())
        titles = (f"scan {number}: truth", "prediction", f"wrong: {share:.1f} %{without}")
        extent = float(coords[:, 2:].amax()) + 1
        for axis, shade, title in zip(row, shades, titles, strict=True):
            size = (72 * width / 3 * 0.93 / extent) ** 2
            axis.scatter(coords[:, 3], coords[:, 2], s=size, c=shade, marker="s", linewidths=0)
            axis.set_title(title, loc="left")
            axis.set_aspect("equal")
            axis.set_axis_off()
    patches = [
        Patch(color=color, label=name)
        for label, (color, name) in enumerate(zip(colors, class_names, strict=True))
        if label != ceiling
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_boxes(
    path: Path, scenes: Sequence[ShownBoxes], grid: VoxelGrid, least_score: float = 0.3
) -> None:
    """Draw scenes from above, side by side: points, true boxes, and found boxes with their scores.

    Args:
        path: The file.
        scenes: The scenes to draw.
        grid: The voxel grid of the detector.
        least_score: Boxes below this score are left out.
    """
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    x0, y0, _, x1, y1, _ = grid.point_range
    height = 5 * (y1 - y0) / (x1 - x0)
    figure = Figure(figsize=(5 * len(scenes), height + 0.5), layout="constrained")
    colors = {
        "a car": "#2ca02c",
        "a car with too few points": "#b9c2ce",
        "found, with its score in %": "#d62728",
    }
    pairs = zip(figure.subplots(1, len(scenes), squeeze=False)[0], scenes, strict=True)
    for number, (axis, shown) in enumerate(pairs):
        points, boxes, ignored = shown.scene
        axis.scatter(points[:, 0], points[:, 1], s=0.6, c="#56606f", linewidths=0, rasterized=True)
        kept = shown.scores >= least_score
        groups = zip(
            colors.items(), (boxes[~ignored], boxes[ignored], shown.boxes[kept]), strict=True
        )
        for (name, color), group in groups:
            wide = 1.2 if name.startswith("found") else 2.0
            shapes = list(corners(group).numpy())
            axis.add_collection(
                PolyCollection(shapes, facecolors="none", edgecolors=color, linewidths=wide)
            )
        for box, score in zip(shown.boxes[kept].tolist(), shown.scores[kept].tolist(), strict=True):
            axis.annotate(
                f"{100 * score:.0f}", (box[0], box[1]), (0, 7), textcoords="offset points",
                fontsize=7, color="#8c1c1d", ha="center", annotation_clip=True,
            )  # fmt: skip
        axis.set(xlim=(x0, x1), ylim=(y0, y1), xlabel="x, m", ylabel="y, m", aspect="equal")
        axis.set_title(f"scan {number}", loc="left", fontsize=10)
    handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
