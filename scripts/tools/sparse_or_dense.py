"""Measure from which density on a dense convolution is faster, and draw it.

  python -m scripts.tools.sparse_or_dense             # one thread of a CPU
  python -m scripts.tools.sparse_or_dense --device cuda --dtype float16

A submanifold layer with 3x3x3 taps and torch's dense convolution on the same grid, after a check
that they agree at the active sites. On a CPU the time is that of the processor, which others do not
disturb. Writes the table of docs/sparse-or-dense.md and its picture.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

import tritonspconv as ts
from tritonspconv.kernels import has_numba
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
        dense = dense_times(size, channels, device, dtype)
        curves[size, channels, "random"] = [
            measured(each.coords, size, channels, dtype, dense) for each in sites
        ]
        shell = surface_sites(size // 2, device=device)
        curves[size, channels, "surface"] = [measured(shell.coords, size, channels, dtype, dense)]
        print(size, channels, flush=True)
    page = DOCS / "sparse-or-dense.md"
    before, rest = page.read_text().split(START)
    rest = rest.split(END)[1]
    page.write_text(before + START + "\n" + table(curves) + about(device, args.dtype) + END + rest)
    draw(DOCS / "img" / "sparse-or-dense.svg", curves)
    return 0


def dense_conv(image: Tensor, kernel: Tensor) -> Tensor:
    """Return the dense convolution of torch, the fastest that there is for the device.

    On one thread of a CPU ``conv3d`` takes a slow path for small grids, eight times as slow.
    """
    if image.device.type == "cpu":
        ones = [1, 1, 1]
        return torch.mkldnn_convolution(image, kernel, None, ones, ones, ones, 1)
    return torch.nn.functional.conv3d(image, kernel, padding=1)


def dense_times(
    size: int, channels: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, ...]:
    """Return the times of WAYS, in ms, which do not depend on the contents of the grid."""
    image = torch.randn(1, channels, size, size, size, device=device, dtype=dtype)
    kernel = torch.randn(channels, channels, 3, 3, 3, device=device, dtype=dtype)
    image, kernel = image.requires_grad_(), kernel.requires_grad_()
    ones = torch.ones_like(image)

    def forward() -> None:
        with torch.no_grad():
            dense_conv(image, kernel)

    def train() -> None:
        dense_conv(image, kernel).backward(ones)

    once, both = least(forward, device), least(train, device)
    return once, once, both


def measured(
    coords: Tensor, size: int, channels: int, dtype: torch.dtype, dense: tuple[float, ...]
) -> Point:
    """Return the times of the sparse layer at some sites, with the times of the dense layer."""
    torch.manual_seed(0)
    device = coords.device
    feats = torch.randn(len(coords), channels, device=device, dtype=dtype)
    weight = torch.randn(27, channels, channels, device=device, dtype=dtype) / 9
    kernel = weight.view(3, 3, 3, channels, channels).permute(4, 3, 0, 1, 2).contiguous()
    shape = (size, size, size)
    layer = ts.nn.SubMConv3d(channels, channels, 3, bias=False).to(device, dtype)
    layer.weight.data.copy_(weight.view_as(layer.weight))
    known = ts.SparseTensor(feats, coords, spatial_shape=shape, batch_size=1)
    at = tuple(coords.long().t())
    expected = dense_conv(known.dense(), kernel).permute(0, 2, 3, 4, 1)[at]
    limit = 1e-2 if dtype != torch.float32 else 1e-4
    found = layer(known).feats
    assert (found - expected).abs().max() < limit * expected.abs().max(), "the layers disagree"
    feats_leaf, ones = feats.clone().requires_grad_(), torch.ones_like(feats)

    def reuse() -> None:
        with torch.no_grad():
            layer(known)

    def build() -> None:
        with torch.no_grad():
            layer(ts.SparseTensor(feats, coords, spatial_shape=shape, batch_size=1))

    def train() -> None:
        x = ts.SparseTensor(feats_leaf, coords, spatial_shape=shape, batch_size=1)
        layer(x).feats.backward(ones)

    sparse = tuple(least(call, device) for call in (reuse, build, train))
    pairs = ts.kernel_map(known.sites, ts.ConvGeometry.submanifold((3,) * 3, (1,) * 3)).num_pairs()
    return Point(size, channels, len(coords) / size**3, pairs / len(coords), dense, sparse)


def least(call: Callable[[], None], device: torch.device) -> float:
    """Return the least time of some calls, in ms, after one that does not count."""
    call()
    times = []
    for _ in range(ROUNDS):
        start = now(device)
        call()
        times.append(now(device) - start)
    return min(times)


def now(device: torch.device) -> float:
    """Return the time in ms, after the device has finished; of the processor on a CPU."""
    if device.type != "cuda":
        return 1e3 * time.process_time()
    torch.cuda.synchronize(device)
    return 1e3 * time.perf_counter()


def crossover(points: list[Point], way: int) -> float | None:
    """Return the density at which both are equal, between two measured ones; None: above all."""
    for below, above in itertools.pairwise(points):
        if below.gain(way) >= 1 > above.gain(way):
            share = torch.tensor([below.gain(way), 1.0, above.gain(way)]).log()
            part = float((share[0] - share[1]) / (share[0] - share[2]))
            return below.density * (above.density / below.density) ** part
    return None


def table(curves: dict[tuple[int, int, str], list[Point]]) -> str:
    """Return the table as Markdown."""
    lines = [
        "| grid, channels | dense, ms: forward / training | as fast at density: map reused | "
        "map built | training | at a surface: density, neighbours | faster there |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for (size, channels, kind), points in curves.items():
        if kind != "random":
            continue
        (surface,) = curves[size, channels, "surface"]
        equal = [crossover(points, way) for way in range(len(WAYS))]
        cells = [f"{100 * x:.0f} %" if x else "> 50 %" for x in equal]
        dense = points[0].dense[1:]
        gains = " / ".join(f"{surface.gain(way):.1f}" for way in range(len(WAYS)))
        lines.append(
            f"| {size}³, {channels} | {dense[0]:.1f} / {dense[1]:.0f} | {' | '.join(cells)} | "
            f"{100 * surface.density:.1f} %, {surface.neighbours:.1f} | {gains} |"
        )
    return "\n".join(lines) + "\n"


def about(device: torch.device, dtype: str) -> str:
    """Return the machine and the versions of the measurement."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    numba = f", numba {version('numba')}" if has_numba(device) else ""
    return f"\n{name}, {dtype}, torch {torch.__version__}{numba}.\n"


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
    figure = Figure(figsize=(11, 4.2), layout="constrained")
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
        axis.set_yticks(
            [0.1, 0.5, 1, 2, 10, 100, 1000], ["0.1", "0.5", "1", "2", "10", "100", "1000"]
        )
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("times faster than dense")
    axes[2].plot([], [], color="#555", marker="*", ms=11, ls="", label="a sphere's shell")
    figure.legend(
        *axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    raise SystemExit(main())
