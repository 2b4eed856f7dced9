"""Measure from which density on a dense convolution is faster, and draw it.

  python -m scripts.tools.sparse_or_dense             # one thread of a CPU
  python -m scripts.tools.sparse_or_dense --device cuda --dtype float16

A submanifold layer with 3x3x3 taps runs in turn with torch's conv3d on the same grid, both after a check
that they agree at the active sites. Writes the table of docs/sparse-or-dense.md and its picture.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import tritonspconv as ts
from tritonspconv.testing import random_sites, surface_sites

DOCS = Path(__file__).parents[2] / "docs"
START, END = "<!-- table: start -->", "<!-- table: end -->"
DENSITIES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
PROBLEMS = ((32, 16), (32, 64), (64, 16), (64, 64))
ROUNDS = 4
WAYS = ("map reused", "map built", "training")


@dataclass(frozen=True)
class Point:
    """Times of one density, in ms, dense and sparse, for each of WAYS.

    Attributes:
        size: Cells along each side.
        channels: In and out.
        density: Share of the cells that are active.
        neighbours: Mean number of taps that meet a site.
        dense: Times of conv3d.
        sparse: Times of the sparse layer.
    """

    size: int
    channels: int
    density: float
    neighbours: float
    dense: tuple[float, ...]
    sparse: tuple[float, ...]

    def gain(self, way: int) -> float:
        """Return how many times faster the sparse layer is."""
        return self.dense[way] / self.sparse[way]


def main() -> int:
    """Measure, write and draw; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    curves: dict[tuple[int, int, str], list[Point]] = {}
    for size, channels in PROBLEMS:
        sites = [
            random_sites(round(density * size**3), extent=size, batch_size=1, device=device)
            for density in DENSITIES
        ]
        curves[size, channels, "random"] = [
            measured(each.coords, size, channels, dtype) for each in sites
        ]
        shell = surface_sites(size // 2, device=device)
        curves[size, channels, "surface"] = [measured(shell.coords, size, channels, dtype)]
        print(size, channels, flush=True)
    page = DOCS / "sparse-or-dense.md"
    before, rest = page.read_text().split(START)
    rest = rest.split(END)[1]
    page.write_text(before + START + "\n" + table(curves) + about(device, args.dtype) + END + rest)
    draw(DOCS / "img" / "sparse-or-dense.svg", curves)
    return 0


def measured(coords: Tensor, size: int, channels: int, dtype: torch.dtype) -> Point:
    """Return the times of both layers at some sites."""
    torch.manual_seed(0)
    feats = torch.randn(len(coords), channels, device=coords.device, dtype=dtype)
    weight = torch.randn(27, channels, channels, device=coords.device, dtype=dtype) / 9
    kernel = weight.view(3, 3, 3, channels, channels).permute(4, 3, 0, 1, 2).contiguous()
    shape = (size, size, size)

    def tensor() -> ts.SparseTensor:
        return ts.SparseTensor(feats, coords, spatial_shape=shape, batch_size=1)

    layer = ts.nn.SubMConv3d(channels, channels, 3, bias=False).to(coords.device, dtype)
    layer.weight.data.copy_(weight.view_as(layer.weight))
    known = tensor()
    image = known.dense()
    dense_out = torch.nn.functional.conv3d(image, kernel, padding=1)
    at = tuple(coords.long().t())
    expected = dense_out.permute(0, 2, 3, 4, 1)[at]
    found = layer(known).feats
    limit = 1e-2 if dtype != torch.float32 else 1e-4
    assert (found - expected).abs().max() < limit * expected.abs().max(), "the layers disagree"

    def forward_dense() -> None:
        with torch.no_grad():
            torch.nn.functional.conv3d(image, kernel, padding=1)

    def forward_sparse(make: Callable[[], ts.SparseTensor]) -> None:
        with torch.no_grad():
            layer(make())

    image_leaf = image.clone().requires_grad_()
    kernel_leaf = kernel.clone().requires_grad_()
    ones = torch.ones_like(dense_out)

    def train_dense() -> None:
        out = torch.nn.functional.conv3d(image_leaf, kernel_leaf, padding=1)
        out.backward(ones)

    row_ones = torch.ones_like(feats)
    feats_leaf = feats.clone().requires_grad_()

    def train_sparse() -> None:
        x = ts.SparseTensor(feats_leaf, coords, spatial_shape=shape, batch_size=1)
        layer(x).feats.backward(row_ones)

    dense = (forward_dense, forward_dense, train_dense)
    sparse = (lambda: forward_sparse(lambda: known), lambda: forward_sparse(tensor), train_sparse)
    times = [in_turn(a, b, coords.device) for a, b in zip(dense, sparse, strict=True)]
    pairs = ts.kernel_map(known.sites, ts.ConvGeometry.submanifold((3,) * 3, (1,) * 3)).num_pairs()
    return Point(
        size, channels, len(coords) / size**3, pairs / len(coords),
        tuple(a for a, _ in times), tuple(b for _, b in times),
    )  # fmt: skip


def in_turn(
    first: Callable[[], None], second: Callable[[], None], device: torch.device
) -> tuple[float, float]:
    """Return the least times of two callables, in ms, that run one after the other."""
    best = [float("inf")] * 2
    for _ in range(ROUNDS + 1):
        for number, call in enumerate((first, second)):
            start = now(device)
            call()
            best[number] = min(best[number], now(device) - start)
    return best[0], best[1]


def now(device: torch.device) -> float:
    """Return the time in ms, after the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * time.perf_counter()


def crossover(points: list[Point], way: int) -> float | None:
    """Return the density at which both are equal, between two measured ones; None: above all."""
    for below, above in zip(points, points[1:], strict=False):
        if below.gain(way) >= 1 > above.gain(way):
            share = torch.tensor([below.gain(way), 1.0, above.gain(way)]).log()
            part = float((share[0] - share[1]) / (share[0] - share[2]))
            return below.density * (above.density / below.density) ** part
    return None


def table(curves: dict[tuple[int, int, str], list[Point]]) -> str:
    """Return the table as Markdown."""
    lines = [
        "| grid, channels | conv3d, ms: forward / training | as fast at density: map reused | "
        "map built | training | at a surface: density, neighbours | faster there |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for (size, channels, kind), points in curves.items():
        if kind != "random":
            continue
        (surface,) = curves[size, channels, "surface"]
        equal = [crossover(points, way) for way in range(len(WAYS))]
        cells = [f"{100 * x:.0f} %" if x else "> 50 %" for x in equal]
        dense = min(p.dense[1] for p in points), min(p.dense[2] for p in points)
        gains = " / ".join(f"{surface.gain(way):.1f}" for way in range(len(WAYS)))
        lines.append(
            f"| {size}³, {channels} | {dense[0]:.1f} / {dense[1]:.0f} | {' | '.join(cells)} | "
            f"{100 * surface.density:.1f} %, {surface.neighbours:.1f} | {gains} |"
        )
    return "\n".join(lines) + "\n"


def about(device: torch.device, dtype: str) -> str:
    """Return what was measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return f"\n{name}, {dtype}, torch {torch.__version__}.\n"


def cpu_name() -> str:
    """Return the name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"One thread of {line.split(':')[1].strip()}"
    return f"One thread of {platform.processor()}"


def draw(path: Path, curves: dict[tuple[int, int, str], list[Point]]) -> None:
    """Draw how many times faster the sparse layer is, over the density."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "sparse-or-dense"
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    colors = dict(zip(PROBLEMS, ("#8ecae6", "#1f77b4", "#f4a261", "#c1440e"), strict=True))
    axes = figure.subplots(1, 3, sharey=True)
    for way, axis in enumerate(axes):
        for (size, channels, kind), points in curves.items():
            color = colors[size, channels]
            densities = [100 * point.density for point in points]
            gains = [point.gain(way) for point in points]
            if kind == "random":
                label = f"{size}³, {channels} channels"
                axis.plot(densities, gains, color=color, marker="o", ms=3, label=label)
            else:
                axis.plot(densities, gains, color=color, marker="*", ms=13, mec="white", ls="")
        axis.axhline(1, color="#555", lw=1)
        axis.set(xscale="log", yscale="log", xlabel="active cells, %", title=WAYS[way])
        axis.set_xticks([0.2, 1, 5, 20, 50], ["0.2", "1", "5", "20", "50"], minor=False)
        axis.set_yticks([0.1, 0.5, 1, 2, 10, 100], ["0.1", "0.5", "1", "2", "10", "100"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("times faster than conv3d")
    axes[2].plot([], [], color="#555", marker="*", ms=11, ls="", label="a sphere's shell")
    axes[2].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    raise SystemExit(main())
