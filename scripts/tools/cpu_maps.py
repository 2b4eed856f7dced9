"""Measure kernel maps on a CPU: numba, torch, spconv and MinkowskiEngine in turn, one thread.

  OMP_NUM_THREADS=1 python -m scripts.tools.cpu_maps --waymo scan.npz --kitti scan.bin > cpu-maps.md

Each map is made from coordinates alone: indices, hash tables and output sites are part of it. A
time is the processor time of the calling thread, the median of all rounds; in a round the libraries
take turns. Tables by numba and by torch must be equal, and spconv must make as many output sites.
"""

from __future__ import annotations

import argparse
import collections
import collections.abc
import contextlib
import importlib
import importlib.metadata
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import tritonspconv
from tritonspconv import ActiveSites, ConvGeometry, Grid, kernel_map
from tritonspconv.bench.scenes import Scene, SceneStore

FACES = "sites", "neighbor_table", "invert_table"
SIZES = {"10k": 4000, "25k": 11000, "40k": 17000, "100k": 43000}
Build = Callable[[Scene], int]


def _cube(size: int, stride: int, padding: int, transposed: bool = False) -> ConvGeometry:
    sizes = ((n,) * 3 for n in (size, stride, padding, 1))
    return ConvGeometry(*sizes, transposed=transposed)


MAPS = {
    "submanifold 3^3": ConvGeometry.submanifold((3,) * 3, (1,) * 3),
    "3^3 / 2": _cube(3, 2, 1),
    "3^3 / 2, both tables": _cube(3, 2, 1),
    "2^3 / 2": _cube(2, 2, 0),
    "transposed 2^3 / 2": _cube(2, 2, 0, transposed=True),
    "transposed 3^3 / 2": _cube(3, 2, 1, transposed=True),
}


@contextlib.contextmanager
def back_end(name: str) -> Iterator[None]:
    """Have the faces of maps call the back end ``name``."""
    faces = [importlib.import_module(f"tritonspconv.kernels.{face}") for face in FACES]
    kept = [vars(face)["_back_end"] for face in faces]
    try:
        for face, op in zip(faces, FACES, strict=True):
            module = importlib.import_module(f"tritonspconv.kernels.{name}.{op}")
            vars(face)["_back_end"] = lambda *_, module=module: module
        yield
    finally:
        for face, original in zip(faces, kept, strict=True):
            vars(face)["_back_end"] = original


def ours(name: str, kind: str) -> Build:
    """Return a function that makes a map by one of our back ends."""

    def build(scene: Scene) -> int:
        grid = Grid((0, 0, 0), scene.spatial_shape, scene.batch_size)
        with back_end(name):
            made = kernel_map(ActiveSites(scene.indices, grid), MAPS[kind])
            if "both" in kind:
                _ = made.in_table
        return made.n_out

    return build


def of_spconv(kind: str) -> Build:
    """Return a function that makes the lists of spconv's CPU layers, which serve both passes."""
    spconv = importlib.import_module("spconv.pytorch")
    geometry = MAPS[kind]

    def build(scene: Scene) -> int:
        fields = (geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation)
        out, *_ = spconv.ops.get_indice_pairs(
            scene.indices, scene.batch_size, list(scene.spatial_shape), spconv.ConvAlgo.Native,
            *map(list, fields), [0, 0, 0], geometry.sites == "same", geometry.transposed,
        )  # fmt: skip
        return len(out)

    return build


def of_minkowski(kind: str) -> Build | None:
    """Return a function that makes MinkowskiEngine's map; None if its sites are others."""
    setattr(collections, "Sequence", collections.abc.Sequence)  # noqa: B010 - it imports that name
    engine = importlib.import_module("MinkowskiEngine")
    geometry = MAPS[kind]
    if geometry.transposed:
        return None

    def build(scene: Scene) -> int:
        manager = engine.CoordinateManager(D=3)
        key, _ = manager.insert_and_map(scene.indices, [1, 1, 1])
        step, size = geometry.stride[0], geometry.kernel_size[0]
        out = key if step == 1 else manager.stride(key, step)
        manager.kernel_map(key, out, stride=step, kernel_size=size)
        return manager.size(out)

    return build


def contenders(kind: str) -> dict[str, Build]:
    """Return functions that make maps of a kind; originals that are not installed are left out."""
    found: dict[str, Build] = {"numba": ours("numba", kind), "torch": ours("eager", kind)}
    for name, make in (("spconv", of_spconv), ("MinkowskiEngine", of_minkowski)):
        with contextlib.suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build = make(kind)
            if build is not None:
                found[name] = build
    return found


def check(scene: Scene, kind: str, builds: dict[str, Build]) -> None:
    """Compare the tables of our back ends, and the number of sites of all but MinkowskiEngine.

    MinkowskiEngine has a site for each occupied cell, which are fewer than those that are reached.
    """
    grid = Grid((0, 0, 0), scene.spatial_shape, scene.batch_size)
    tables = []
    for name in ("numba", "eager"):
        with back_end(name):
            tables.append(kernel_map(ActiveSites(scene.indices, grid), MAPS[kind]).out_table.rows)
    if not torch.equal(*tables):
        raise AssertionError(f"{scene.name}, {kind}: the tables of numba and torch differ")
    sites = {name: build(scene) for name, build in builds.items() if name != "MinkowskiEngine"}
    if len(set(sites.values())) != 1:
        raise AssertionError(f"{scene.name}, {kind}: the numbers of sites differ: {sites}")


def measure(scene: Scene, builds: dict[str, Build], rounds: int) -> dict[str, float]:
    """Return the milliseconds of processor time that each contender takes."""
    times: dict[str, list[float]] = {name: [] for name in builds}
    for _ in range(rounds):
        for name, build in builds.items():
            start = time.thread_time()
            build(scene)
            times[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def halved(scene: Scene) -> Scene:
    """Return the scene on the next level, from which transposed layers start."""
    grid = Grid((0, 0, 0), scene.spatial_shape, scene.batch_size)
    sites = kernel_map(ActiveSites(scene.indices, grid), MAPS["2^3 / 2"]).out_sites
    z, y, x = sites.grid.shape
    return Scene(scene.name, sites.coords, (z, y, x), scene.batch_size)


def row(scene: Scene, kind: str, rounds: int) -> str:
    """Return a line of the table."""
    if MAPS[kind].transposed:
        scene = halved(scene)
    builds = contenders(kind)
    check(scene, kind, builds)
    times = measure(scene, builds, rounds)
    cells = [f"{times[name]:.2f}" if name in times else "" for name in COLUMNS]
    ratios = [
        f"{times[name] / times['numba']:.1f}" if name in times else "" for name in COLUMNS[1:]
    ]
    return (
        f"| {scene.name} | {len(scene.indices):,} | {kind} | "
        + " | ".join([*cells, *ratios])
        + " |"
    )


COLUMNS = ("numba", "torch", "spconv", "MinkowskiEngine")


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--waymo", type=Path, help="scan around a vehicle; simulated if left out")
    parser.add_argument("--kitti", type=Path, help="scan of a front view; simulated if left out")
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    torch.set_num_threads(1)
    packages = ("torch", "numba", "spconv", "MinkowskiEngine")
    versions = [f"{name} {_version(name)}" for name in packages]
    print(f"tritonspconv {tritonspconv.__version__}, {', '.join(versions)}, "
          f"Python {platform.python_version()}, {platform.machine()}\n")  # fmt: skip
    ratios = [f"{name} / numba" for name in COLUMNS[1:]]
    print(f"| scene | voxels | map | {' | '.join([*COLUMNS, *ratios])} |")
    print("| --- | --- | --- |" + " ---: |" * (len(COLUMNS) + len(ratios)))
    for scene in _scenes(args):
        for kind in MAPS:
            print(row(scene, kind, args.rounds), flush=True)
    return 0


def _version(name: str) -> Any:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _scenes(args: argparse.Namespace) -> Iterator[Scene]:
    def store(points: int | None) -> SceneStore:
        return SceneStore(torch.device("cpu"), args.waymo, args.kitti, 60, points)

    yield store(None)["kitti"]
    yield store(None)["sphere"]
    for points in SIZES.values():
        yield store(points)["waymo_b4"]


if __name__ == "__main__":
    sys.exit(main())
