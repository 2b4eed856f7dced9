"""Search faster tiles for the matrix kernels on this GPU, and keep them in a file.

  tritonspconv tune tiles.json --channels 16:16 32:64 --dtypes float16 float32
  TRITONSPCONV_TILES=tiles.json python train.py

The tuner uses submanifold 3x3x3 maps of a LiDAR scan. For each pair of channels it tunes the
forward kernel in both directions, because the second direction serves the input gradient. It tunes
the weight gradient once. The search starts from the fixed choice of the library and changes one
number at a time as long as that helps. A tile counts if its result agrees with the result of the
fixed choice. A tile is kept if it is faster by 3 %. Tiles of other problems stay in the file.
Without the variable nothing changes, and nothing is ever tuned while a program runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from tritonspconv import ActiveSites, ConvGeometry, Grid, KernelMap, kernel_map
from tritonspconv.bench.reference import LAYER_TOLERANCE, relative_error
from tritonspconv.bench.report import command_line
from tritonspconv.bench.scenes import Scene, SceneStore, normal
from tritonspconv.bench.timing import Meter
from tritonspconv.cli.errors import CommandError
from tritonspconv.demo.scenes import choose_device
from tritonspconv.kernels import has_triton
from tritonspconv.kernels.tuning import (
    GemmConfig,
    MatrixOp,
    TunableLaunch,
    card_of,
    gather_gemm_launch,
    weight_grad_launch,
)

WINDOW = ConvGeometry.submanifold((3, 3, 3), (1, 1, 1))
STEPS: dict[str, tuple[int, ...]] = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (16, 32, 64, 128),
    "num_warps": (2, 4, 8),
    # A gather loads its indices one stage ahead, so an even number of stages holds no more rows.
    "num_stages": (2, 3, 5, 7, 9),
}
# A smaller gain is noise.
LEAST_GAIN = 0.03
DTYPES = ("float16", "bfloat16", "float32", "tf32")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Tune the requested kernels; return the exit status and the content of the file."""
    device = choose_device(args.device)
    if not has_triton(device) and os.environ.get("TRITON_INTERPRET") != "1":
        raise CommandError(
            f"tiles are for the Triton kernels of a GPU (sm_80 or newer, or AMD); got {device}"
        )
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    scene = SceneStore(device, args.scan, None, 0, args.max_points)["waymo_b4"]
    meter = Meter(device, quick=True)
    content = _read(args.file, device)
    for rows in args.rows or [len(scene.indices)]:
        kmap = _map_of(scene.first(rows))
        for c_in, c_out in args.channels:
            for dtype in args.dtypes:
                for launch in _launches(kmap, c_in, c_out, dtype, args.ops):
                    found = search(launch, LAYER_TOLERANCE[dtype], meter)
                    _keep(content, launch, *found)
                    _write(args.file, content)
    return 0, content


def search(
    launch: TunableLaunch, tolerance: float, meter: Meter
) -> tuple[GemmConfig, float, float]:
    """Return the fastest tile found, its time in ms, and the time of the fixed choice in ms.

    Args:
        launch: The problems to tune.
        tolerance: Largest relative error against the result of the fixed choice.
        meter: Takes the times.

    Raises:
        CommandError: The device cannot run the fixed choice.
    """
    expected = launch.run(launch.fixed)
    if expected is None:
        raise CommandError(f"this device cannot run the library's tile {tuple(launch.fixed)}")
    times: dict[GemmConfig, float] = {}

    def time_of(tile: GemmConfig) -> float:
        if tile not in times:
            times[tile] = _time(launch, tile, expected, tolerance, meter)
        return times[tile]

    best, improved = launch.fixed, True
    fixed_ms = time_of(launch.fixed)
    while improved:
        improved = False
        for tile in _neighbours(best):
            if time_of(tile) < (1 - LEAST_GAIN) * time_of(best):
                best, improved = tile, True
    print(
        f"{' '.join(map(str, launch.problem))}, 2**{launch.log2_rows}: {fixed_ms:.3f} to "
        f"{times[best]:.3f} ms, {len(times)} tiles, {tuple(best)}",
        flush=True,
    )
    return best, times[best], fixed_ms


def _neighbours(tile: GemmConfig) -> Iterator[GemmConfig]:
    """Yield the tiles that differ from ``tile`` by one step of one number."""
    for name, values in STEPS.items():
        own = getattr(tile, name)
        below = [value for value in values if value < own]
        above = [value for value in values if value > own]
        for value in below[-1:] + above[:1]:
            yield tile._replace(**{name: value})


def _time(
    launch: TunableLaunch, tile: GemmConfig, expected: Tensor, tolerance: float, meter: Meter
) -> float:
    """Return the median time of a tile in ms, or infinity where it cannot run or is wrong."""
    out = launch.run(tile)
    meter.synchronize()
    if out is None or not relative_error(out, expected) <= tolerance:
        return math.inf
    return meter.layer.alone(lambda: launch.run(tile)).median


def _launches(
    kmap: KernelMap, c_in: int, c_out: int, dtype: str, ops: Sequence[MatrixOp]
) -> Iterator[TunableLaunch]:
    """Yield the kernels of a layer: forward, input gradient, weight gradient."""
    storage = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    precision = "tf32" if dtype == "tf32" else "ieee"
    device, volume = kmap.out_sites.device, kmap.kernel_volume
    if "gather_gemm" in ops:
        # The input gradient multiplies with the transposed matrices.
        for first, second in dict.fromkeys(((c_in, c_out), (c_out, c_in))):
            feats = normal(kmap.n_in, first, device, storage)
            weight = normal(volume * first, second, device, torch.float32)
            weight = weight.view(volume, first, second) * (volume * first) ** -0.5
            yield gather_gemm_launch(feats, weight.to(storage), kmap.out_table, precision=precision)
    if "weight_grad" in ops:
        feats = normal(kmap.n_in, c_in, device, storage)
        grad = normal(kmap.n_out, c_out, device, storage)
        yield weight_grad_launch(feats, grad, kmap.pair_list, volume, precision=precision)


def _map_of(scene: Scene) -> KernelMap:
    z, y, x = scene.spatial_shape
    return kernel_map(
        ActiveSites(scene.indices, Grid((0, 0, 0), (z, y, x), scene.batch_size)), WINDOW
    )


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    """Return the content of the file, or the content of a new file.

    Raises:
        CommandError: The file is of another kind of card.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    new = {
        "device": name,
        "card": card_of(device)._asdict(),
        "versions": {"torch": torch.__version__, "triton": importlib.metadata.version("triton")},
        "command": command_line(),
        "tiles": [],
    }
    if not path.exists():
        return new
    old = json.loads(path.read_text(encoding="utf-8"))
    if old["card"] != new["card"]:
        raise CommandError(f"{path} is of {old['device']}; give {name} a file of its own")
    return new | {"tiles": old["tiles"]}


def _keep(
    content: dict[str, Any], launch: TunableLaunch, best: GemmConfig, ms: float, fixed_ms: float
) -> None:
    """Replace the earlier entry by the tile; the fixed choice needs no entry."""
    place = {**launch.problem._asdict(), "log2_rows": launch.log2_rows}
    others = [entry for entry in content["tiles"] if not place.items() <= entry.items()]
    found = {**place, "tile": best._asdict(), "ms": round(ms, 4), "fixed_ms": round(fixed_ms, 4)}
    content["tiles"] = others if best == launch.fixed else [*others, found]


def _write(path: Path, content: dict[str, Any]) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _channels(text: str) -> tuple[int, int]:
    try:
        c_in, c_out = map(int, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be IN:OUT, two whole numbers such as 32:64; got {text!r}"
        ) from None
    return c_in, c_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("file", type=Path, help="file of tiles to write, or to add to")
    parser.add_argument(
        "--channels", nargs="+", type=_channels, required=True, metavar="IN:OUT",
        help="channels of the layers, such as 32:64",
    )  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float16"])
    ops = get_args(MatrixOp)
    parser.add_argument("--ops", nargs="+", choices=ops, default=ops, help="default: both kernels")
    parser.add_argument(
        "--rows",
        nargs="+",
        type=int,
        help="numbers of voxels to tune for; default: all of the scan",
    )
    parser.add_argument("--scan", type=Path, help="scan around a vehicle; simulated if left out")
    parser.add_argument("--max-points", type=int, help="use only so many points of the scan")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda; cpu, in Triton's interpreter, only tries the script out",
    )  # fmt: skip
