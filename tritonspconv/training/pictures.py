"""Pictures of a training: curves, and predictions beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tritonspconv.training.data import IGNORED
from tritonspconv.training.loop import Epoch


class Shown(NamedTuple):
    """A scan with its true and its predicted classes; coordinates are batch, z, y, x."""

    coords: Tensor
    truth: Tensor
    found: Tensor


def draw_curves(path: Path, runs: Mapping[str, Sequence[Epoch]]) -> None:
    """Draw loss and mean IoU over the epochs, one line a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, epochs in runs.items():
        numbers = [epoch.number for epoch in epochs]
        left.plot(numbers, [epoch.loss for epoch in epochs], marker="o", ms=3, label=name)
        right.plot(numbers, [100 * epoch.miou for epoch in epochs], marker="o", ms=3, label=name)
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel="validation mIoU, %", ylim=(0, 100))
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.25)
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
    figure = Figure(figsize=(13, 4.4 * len(scans)), layout="constrained")
    for row, scan in zip(figure.subplots(len(scans), 3, squeeze=False), scans, strict=True):
        seen = scan.truth != IGNORED
        if "ceiling" in class_names:
            ceiling = list(class_names).index("ceiling")
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
        titles = ("truth", "prediction", f"wrong: {share:.1f} % of the voxels")
        extent = float(coords[:, 2:].amax()) + 1
        for axis, shade, title in zip(row, shades, titles, strict=True):
            size = (290 / extent) ** 2
            axis.scatter(coords[:, 3], coords[:, 2], s=size, c=shade, marker="s", linewidths=0)
            axis.set_title(title, loc="left")
            axis.set_aspect("equal")
            axis.set_axis_off()
    patches = [
        Patch(color=color, label=name) for color, name in zip(colors, class_names, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
