"""Search faster tiles for the matrix kernels on this GPU, and keep them in a file.

  python -m scripts.tools.tune tiles.json --channels 16:16 32:64 --dtypes float16 float32
  TRITONSPCONV_TILES=tiles.json python train.py

For each pair of channels the forward kernel is tuned in both directions, the second being that of
the input gradient, and the weight gradient once, on submanifold 3x3x3 maps of a LiDAR scan. The
search starts from the fixed choice of the library and changes one number at a time as long as that
helps. A tile counts if its result agrees with that of the fixed choice, and is kept if it is faster
by 3 %. What the file holds for other problems stays. Without the variable nothing changes, and
nothing is ever tuned while a program runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from tritonspconv import ActiveSites, ConvGeometry, Grid, KernelMap, kernel_map
from tritonspconv.bench.reference import LAYER_TOLERANCE, relative_error
from tritonspconv.bench.scenes import Scene, SceneStore, normal
from tritonspconv.bench.timing import Meter
from tritonspconv.kernels.eager.invert_table import mask_words
from tritonspconv.kernels.triton import gather_gemm, half_parts, weight_grad
from tritonspconv.kernels.triton.configs import (
    GemmConfig,
    card_of,
    gather_gemm_config,
    weight_grad_config,
)
from tritonspconv.kernels.triton.tuned_tiles import MatrixOp, Problem, problem

WINDOW = ConvGeometry.submanifold((3, 3, 3), (1, 1, 1))
STEPS: dict[str, tuple[int, ...]] = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (16, 32, 64, 128),
    "num_warps": (2, 4, 8),
    # Rows are gathered by indices loaded before them: an even number holds no more of them.
    "num_stages": (2, 3, 5, 7, 9),
}
# Less is noise.
LEAST_GAIN = 0.03
DTYPES = ("float16", "bfloat16", "float32", "tf32")


@dataclass(frozen=True)
class Task:
    """One kernel on one set of operands.

    Attributes:
        wanted: What the tile is for.
        log2_rows: Bits of its number of rows or pairs.
        fixed: The tile that the library chooses.
        tolerance: Largest relative error against the result of ``fixed``.
        run: Computes with a tile.
    """

    wanted: Problem
    log2_rows: int
    fixed: GemmConfig
    tolerance: float
    run: Callable[[GemmConfig], Tensor]


def main() -> int:
    """Tune what was asked for; return the exit status."""
    args = _parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print(f"tune.py: --device {args.device}: torch finds no GPU", file=sys.stderr)
            return 2
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    scene = SceneStore(device, args.scan, None, 0, args.max_points)["waymo_b4"]
    meter = Meter(device, quick=True)
    content = _read(args.file, device)
    for rows in args.rows or [len(scene.indices)]:
        kmap = _map_of(scene.first(rows))
        for c_in, c_out in args.channels:
            for dtype in args.dtypes:
                for task in _tasks(kmap, c_in, c_out, dtype, args.ops):
                    _keep(content, task, *search(task, meter))
                    _write(args.file, content)
    return 0


def search(task: Task, meter: Meter) -> tuple[GemmConfig, float, float]:
    """Return the fastest tile found and the times in ms, its own and that of the fixed choice."""
    expected = task.run(task.fixed)
    times: dict[GemmConfig, float] = {}

    def time_of(tile: GemmConfig) -> float:
        if tile not in times:
            times[tile] = _time(task, tile, expected, meter)
        return times[tile]

    best, improved = task.fixed, True
    fixed_ms = time_of(task.fixed)
    while improved:
        improved = False
        for tile in _neighbours(best):
            if time_of(tile) < (1 - LEAST_GAIN) * time_of(best):
                best, improved = tile, True
    print(
        f"{' '.join(map(str, task.wanted))}, 2**{task.log2_rows}: {fixed_ms:.3f} to "
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


def _time(task: Task, tile: GemmConfig, expected: Tensor, meter: Meter) -> float:
    """Return the median time of a tile in ms, or infinity where it cannot run or is wrong."""
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        out = task.run(tile)
        meter.synchronize()
    except (OutOfResources, PTXASError):
        return math.inf
    if not relative_error(out, expected) <= task.tolerance:
        return math.inf
    return meter.layer.alone(lambda: task.run(tile)).median


def _tasks(
    kmap: KernelMap, c_in: int, c_out: int, dtype: str, ops: Sequence[MatrixOp]
) -> Iterator[Task]:
    """Yield what a layer runs: forward, input gradient, weight gradient."""
    if "gather_gemm" in ops:
        yield _gather_task(kmap, c_in, c_out, dtype)
        if c_in != c_out:
            yield _gather_task(kmap, c_out, c_in, dtype)
    if "weight_grad" in ops:
        yield _weight_task(kmap, c_in, c_out, dtype)


def _gather_task(kmap: KernelMap, c_in: int, c_out: int, dtype: str) -> Task:
    table, device = kmap.out_table, kmap.out_sites.device
    # The map of a CPU, where the interpreter runs the kernel, has no mask.
    mask = mask_words(table.rows) if table.mask is None else table.mask
    volume = kmap.kernel_volume
    weight = normal(volume * c_in, c_out, device, torch.float32).view(volume, c_in, c_out)
    weight = weight * (volume * c_in) ** -0.5
    storage, precision, work = _numbers(kmap, c_in, c_out, dtype)
    feats = half_parts.as_operand(normal(kmap.n_in, c_in, device, storage), work, precision)
    matrices = half_parts.as_operand(weight.to(storage), work, precision)
    parts, leading, _, _ = half_parts.leading_part(feats)
    log2_rows = kmap.n_out.bit_length()

    def run(tile: GemmConfig) -> Tensor:
        return gather_gemm.gather_gemm(
            feats, matrices, None, table.rows, mask, table.order,
            mirrored=table.mirrored, precision=precision, config=tile,
        )  # fmt: skip

    choice = (c_in, c_out, leading.dtype, parts)
    fixed = gather_gemm_config(card_of(device), log2_rows, *choice)
    return _task("gather_gemm", choice, log2_rows, fixed, LAYER_TOLERANCE[dtype], run)


def _weight_task(kmap: KernelMap, c_in: int, c_out: int, dtype: str) -> Task:
    listed, device = kmap.pair_list, kmap.out_sites.device
    storage, precision, work = _numbers(kmap, c_in, c_out, dtype)
    feats = half_parts.as_operand(normal(kmap.n_in, c_in, device, storage), work, precision)
    grad = half_parts.as_operand(normal(kmap.n_out, c_out, device, storage), work, precision)
    parts, leading, _, _ = half_parts.leading_part(feats)
    out = torch.empty(kmap.kernel_volume, c_in, c_out, dtype=torch.float32, device=device)

    def run(tile: GemmConfig) -> Tensor:
        return weight_grad.weight_grad(
            feats, grad, listed.pairs, listed.tap_ptr, torch.empty_like(out),
            mirrored=listed.mirrored, precision=precision, config=tile,
        )  # fmt: skip

    choice = (c_in, c_out, leading.dtype, parts)
    fixed = weight_grad_config(card_of(device), *choice)
    log2_pairs = listed.pairs.shape[1].bit_length()
    return _task("weight_grad", choice, log2_pairs, fixed, LAYER_TOLERANCE[dtype], run)


def _task(
    op: MatrixOp,
    choice: tuple[int, int, torch.dtype, int],
    log2_rows: int,
    fixed: GemmConfig,
    tolerance: float,
    run: Callable[[GemmConfig], Tensor],
) -> Task:
    c_in, c_out, dtype, parts = choice
    return Task(problem(op, dtype, parts, c_in, c_out), log2_rows, fixed, tolerance, run)


def _numbers(kmap: KernelMap, c_in: int, c_out: int, dtype: str) -> tuple[torch.dtype, Any, int]:
    """Return the dtype of the operands, the precision of their products, and the work."""
    storage = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    work = max(kmap.n_in, kmap.n_out) * c_in * c_out
    return storage, "tf32" if dtype == "tf32" else "ieee", work


def _map_of(scene: Scene) -> KernelMap:
    z, y, x = scene.spatial_shape
    return kernel_map(
        ActiveSites(scene.indices, Grid((0, 0, 0), (z, y, x), scene.batch_size)), WINDOW
    )


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    """Return the content of the file, or that of a new one.

    Raises:
        SystemExit: The file is of another kind of card.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    new = {
        "device": name,
        "card": card_of(device)._asdict(),
        "versions": {"torch": torch.__version__, "triton": importlib.metadata.version("triton")},
        "command": shlex.join(["python", *sys.argv]),
        "tiles": [],
    }
    if not path.exists():
        return new
    old = json.loads(path.read_text(encoding="utf-8"))
    if old["card"] != new["card"]:
        raise SystemExit(f"tune.py: {path} is of {old['device']}; give {name} a file of its own")
    return new | {"tiles": old["tiles"]}


def _keep(
    content: dict[str, Any], task: Task, best: GemmConfig, ms: float, fixed_ms: float
) -> None:
    """Put the tile in the place of what was found before; the fixed choice needs no entry."""
    place = {**task.wanted._asdict(), "log2_rows": task.log2_rows}
    others = [entry for entry in content["tiles"] if not place.items() <= entry.items()]
    found = {**place, "tile": best._asdict(), "ms": round(ms, 4), "fixed_ms": round(fixed_ms, 4)}
    content["tiles"] = others if best == task.fixed else [*others, found]


def _write(path: Path, content: dict[str, Any]) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _channels(text: str) -> tuple[int, int]:
    c_in, c_out = map(int, text.split(":"))
    return c_in, c_out


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
