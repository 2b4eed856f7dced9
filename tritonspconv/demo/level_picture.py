"""Draw the active voxels of a network's levels from above."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspconv.points import VoxelGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize

BACKGROUND = "#0b0e14"
FAINT = "#2a3140"
TEXT = "#d7dce5"
HEIGHT_COLORS = ("#27408b", "#1f7a8c", "#3fb68b", "#f2c14e", "#f2784b", "#f25f8a", "#ffd6e2")
PANEL_INCHES = 7.6
DPI = 150


@dataclass(frozen=True)
class Level:
    """A level of a network: the voxels of one resolution.

    Attributes:
        name: Its title.
        stride: Input voxels along z, y, x in one voxel of this level.
        indices: int ``[N, 4]``: batch, z, y, x.
        centre: The input voxel (z, y, x) in the middle of the region that voxel 0 of this level
            sees.
    """

    name: str
    stride: tuple[int, int, int]
    indices: Tensor
    centre: tuple[int, int, int] = (0, 0, 0)


def draw_levels(path: Path, grid: VoxelGrid, levels: list[Level], title: str) -> None:
    """Write a picture with one panel for each level, coloured by height.

    Args:
        path: The file; its folder is made.
        grid: The voxel grid of the first level.
        levels: The levels; of each, the first sample of the batch is drawn. The first level has
            voxels in that sample.
        title: A line over the panels.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    colormap = LinearSegmentedColormap.from_list("heights", HEIGHT_COLORS)
    places = [_centres(grid, level) for level in levels]
    view = _view(places[0], 8 * max(grid.voxel_size[:2]))
    columns = min(2, len(levels))
    rows = math.ceil(len(levels) / columns)
    ratio = (view[3] - view[2]) / (view[1] - view[0])
    figure = Figure(
        figsize=(columns * PANEL_INCHES, rows * (PANEL_INCHES * ratio + 0.42) + 1.15),
        facecolor=BACKGROUND,
        layout="constrained",
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    heights = places[0][:, 2]
    low, high = float(_at(heights, 0.02)), float(_at(heights, 0.985))
    norm = Normalize(low, max(high, low + grid.voxel_size[2]))
    for ax in axes.flat[len(levels) :]:
        ax.set_visible(False)
    for ax, level, place in zip(axes.flat, levels, places, strict=False):
        _draw_panel(ax, grid, level, place, view, norm, colormap)
    colors = figure.colorbar(
        ScalarMappable(norm, colormap),
        ax=axes,
        location="bottom",
        shrink=0.4,
        aspect=60,
        pad=0.015,
    )
    colors.set_label("height (z), m", color=TEXT, fontsize=11)
    colors.ax.tick_params(colors=TEXT, labelsize=9, length=0)
    colors.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    figure.suptitle(title, color=TEXT, fontsize=17)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor=BACKGROUND)


def _draw_panel(
    ax: Axes,
    grid: VoxelGrid,
    level: Level,
    place: Tensor,
    view: tuple[float, float, float, float],
    norm: Normalize,
    colormap: Colormap,
) -> None:
    place = place[place[:, 2].argsort()]
    x, y, z = place.T.tolist()
    side = grid.voxel_size[0] * level.stride[2]
    points = 72 * PANEL_INCHES * 0.95 * side / (view[1] - view[0])
    _draw_rings(ax, view)
    style = {"c": z, "cmap": colormap, "norm": norm, "linewidths": 0, "marker": "s", "snap": False}
    ax.scatter(x, y, s=(points + 2.4) ** 2, alpha=0.06, **style)
    ax.scatter(x, y, s=max(0.92 * points, 0.85) ** 2, **style)
    ax.set(xlim=view[:2], ylim=view[2:], xticks=[], yticks=[], facecolor=BACKGROUND)
    ax.set_aspect("equal")
    for spine in ax.spines.values():
        spine.set_color(FAINT)
    strides = set(level.stride)
    stride = str(level.stride[0]) if len(strides) == 1 else "x".join(map(str, level.stride))
    ax.set_title(
        f"{level.name}   stride {stride}   {len(place):,} voxels of {100 * side:.0f} cm",
        color=TEXT,
        fontsize=12,
        loc="left",
    )


def _draw_rings(ax: Axes, view: tuple[float, float, float, float]) -> None:
    """Draw the sensor and circles around it, where the sensor is in view."""
    if not (view[0] < 0 < view[1] and view[2] < 0 < view[3]):
        return
    from matplotlib.patches import Circle

    farthest = max(abs(bound) for bound in view)
    step = 20.0 if farthest > 30 else 2.0
    for number in range(1, int(1.5 * farthest / step) + 1):
        ring = Circle((0, 0), number * step, fill=False, color=FAINT, linewidth=0.6)
        ax.add_patch(ring)
        if number * step < 0.93 * view[1]:
            ax.annotate(
                f"{number * step:g} m",
                (number * step, 0),
                color="#97a1b3",
                fontsize=7,
                zorder=5,
                xytext=(2, 2),
                textcoords="offset points",
            )
    ax.plot(0, 0, marker=(3, 0, -90), color="#ffffff", markersize=6)


def _centres(grid: VoxelGrid, level: Level) -> Tensor:
    """Return x, y, z of the voxels of the first sample, in metres."""
    cells = level.indices[level.indices[:, 0] == 0][:, [3, 2, 1]].double().cpu()
    stride = torch.tensor(level.stride[::-1], dtype=torch.float64)
    centre = torch.tensor(level.centre[::-1], dtype=torch.float64) + 0.5
    size = torch.tensor(grid.voxel_size, dtype=torch.float64)
    origin = torch.tensor(grid.point_range[:3], dtype=torch.float64)
    return origin + (cells * stride + centre) * size


def _view(place: Tensor, least: float) -> tuple[float, float, float, float]:
    """Return x and y limits that hold nearly all voxels.

    No panel is longer than 2 to 1, and no side is shorter than ``least`` metres.
    """
    extent = (place.amax(dim=0) - place.amin(dim=0))[:2].amax()
    margin = max(0.02 * float(extent), 0.5 * least)
    low = [float(_at(place[:, axis], 0.005)) - margin for axis in (0, 1)]
    high = [float(_at(place[:, axis], 0.995)) + margin for axis in (0, 1)]
    if 0 < low[0] < 0.2 * high[0]:
        low[0] = -margin  # the sensor is just outside the picture: show it
    extent = [upper - lower for lower, upper in zip(low, high, strict=True)]
    for axis in (0, 1):
        missing = 0.5 * max(extent) - extent[axis]
        if missing > 0:
            low[axis] -= 0.5 * missing
            high[axis] += 0.5 * missing
    return low[0], high[0], low[1], high[1]


def _at(values: Tensor, share: float) -> Tensor:
    """Return the value below which ``share`` of the values lie."""
    return values.sort().values[int(share * (len(values) - 1))]
