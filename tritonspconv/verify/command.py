"""Is this GPU right? Compare every sparse convolution of two LiDAR networks with float64.

The SECOND encoder and a sparse U-Net train for a step on a scan. Then the CPU computes each
convolution and each gradient again, in float64, from the inputs that the layer had, rounded as in
the layer. The errors of one layer therefore do not count in the next layers. An error is the
Frobenius norm of the difference, divided by the norm of the float64 result. The "worst row" is the
largest error of one voxel, in the output or the gradient of the input, over the voxel's norm or the
average norm, whichever is larger. The output voxels must equal the CPU's in the same order, and a
second step must give the same bits.

Tolerances:
  float32: 1e-6 for the output, 2e-6 for the gradients of input, weight and bias. The errors come
    from the sums alone. A sum in float32 drifts like 6e-8 (2^-24) times the root of the number of
    tiles that are added up: some hundreds for the output, more for the weight's gradient, which
    runs over all voxels. In long sums, matrix units also lose bits of small products beside large
    ones; see docs/accuracy.md.
  float16, bfloat16: 1e-3 and 8e-3 for the output and the gradient of the input. Products are exact
    and sums float32; the result is rounded once, by at most 4.9e-4 (2^-11) and 3.9e-3 (2^-8) of
    each value. Twice that is allowed.
  float16, bfloat16: 1e-4 for the gradients of weight and bias, which are summed in float32 and
    never rounded to half precision. Matrix units lose the same bits as in float32. They lose more
    in layers of more than 128 output channels, because there they keep the sums themselves. 1x1
    layers are torch's own matrix product, which rounds the gradients of weight and bias to half
    precision.
  worst row: 1e-5 in float32, because its errors vary between rows. In half precision it equals the
    tolerance of the output, because the bound on rounding holds for every row. A row that misses a
    voxel is wrong by some tenths.

Without a file the scan is simulated. The exit status is 1 if anything fails.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import compat.spconv.pytorch as spconv
from tritonspconv.demo.layer_profile import print_columns
from tritonspconv.demo.scenes import (
    DTYPES,
    add_scan_arguments,
    at_least_one,
    autocast,
    choose_device,
    describe,
    read_scans,
    second_shape,
    unet_shape,
    voxelize,
)
from tritonspconv.models.lidar import second_encoder, sparse_unet
from tritonspconv.points import VoxelGrid, voxel_range
from tritonspconv.verify.layer_capture import StepRecorder
from tritonspconv.verify.layer_float64 import (
    ROUNDED,
    SUMMED,
    CpuMaps,
    LayerResult,
    check_layer,
    relative_error,
    worst,
)

ROTATION, SHIFT = 0.7, (0.31, -0.17)
NETWORKS: dict[str, tuple[str, Callable[..., nn.Module], Callable[[VoxelGrid], list[int]]]] = {
    "second": ("SECOND encoder", second_encoder, second_shape),
    "unet": ("sparse U-Net", sparse_unet, unet_shape),
}


@dataclass(frozen=True)
class Batch:
    """The input of a network: features, voxels, spatial shape and number of samples."""

    feats: Tensor
    indices: Tensor
    shape: list[int]
    size: int

    def tensor(self) -> Any:
        """Return a new sparse tensor, which knows no kernel map yet."""
        return spconv.SparseConvTensor(self.feats, self.indices, self.shape, self.size)


@dataclass
class NetworkResult:
    """Result of a network in one dtype; ``changed`` lists the differences of the second step."""

    network: str
    dtype: str
    layers: list[LayerResult]
    changed: list[str]
    end_to_end: float | None = None

    @property
    def passed(self) -> bool:
        """True if every layer is right and the second step gave the same bits."""
        return not self.changed and all(layer.passed for layer in self.layers)


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Verify; return the exit status and the report."""
    device = choose_device(args.device)
    scans = _copies(read_scans(args, 1)[0], args.batch_size)
    print(f"tritonspconv on {describe(device)}, torch {torch.__version__}, against float64")
    grid = voxel_range(torch.cat(scans))
    feats, indices = voxelize(scans, grid, device)
    print(f"{len(feats):,} voxels in {args.batch_size} sample(s)", flush=True)

    results = []
    for dtype in args.dtypes:
        for key in args.networks:
            batch = Batch(feats, indices, NETWORKS[key][2](grid), args.batch_size)
            results.append(_verify(key, batch, dtype, args.seed, args.end_to_end))
    passed = _summarize(results)
    report = {
        "device": describe(device),
        "torch": torch.__version__,
        "scan": args.scan.name if args.scan else f"simulated, seed {args.seed}",
        "batch_size": args.batch_size,
        "voxels": len(feats),
        "passed": passed,
        "results": [asdict(result) | {"passed": result.passed} for result in results],
    }
    return int(not passed), report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_scan_arguments(parser)
    parser.add_argument(
        "--batch-size",
        type=at_least_one,
        default=1,
        help="copies of the scan, each after the first rotated about z and shifted (default 1)",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=list(DTYPES),
        help="default: all three; name the scan before this",
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        default=list(NETWORKS),
        help="default: both; name the scan before this",
    )
    parser.add_argument("--device", help="what to verify (default: cuda where there is one)")
    parser.add_argument(
        "--end-to-end",
        action="store_true",
        help="also run the whole networks in float64 on the CPU and print how far apart they end",
    )


def _copies(points: Tensor, count: int) -> list[Tensor]:
    """Return ``count`` clouds, copy number n rotated about z by 0.7 n rad and shifted."""
    clouds = []
    for number in range(count):
        sine, cosine = math.sin(ROTATION * number), math.cos(ROTATION * number)
        x, y = points[:, 0], points[:, 1]
        cloud = points.clone()
        cloud[:, 0] = cosine * x - sine * y + SHIFT[0] * number
        cloud[:, 1] = sine * x + cosine * y + SHIFT[1] * number
        clouds.append(cloud)
    return clouds


def _verify(key: str, batch: Batch, dtype: str, seed: int, end_to_end: bool) -> NetworkResult:
    """Train one network for a step, twice, check all its layers and print the table."""
    title, build, _ = NETWORKS[key]
    start = time.perf_counter()
    torch.manual_seed(seed)
    network = build(spconv).to(batch.feats.device)
    weights = {name: value.to("cpu", copy=True) for name, value in network.state_dict().items()}
    recorder = StepRecorder(spconv, network)
    whole: dict[str, Tensor] = {}
    for _ in range(2):
        recorder.keep(whole, "network", "output", _step(network, batch, DTYPES[dtype], seed))
    stepped = time.perf_counter()

    results, maps = [], CpuMaps()
    for number, layer in enumerate(recorder.layers, start=1):
        _progress(f"  {dtype}, {title}: layer {number} of {len(recorder.layers)}")
        results.append(check_layer(layer, maps))
        layer.tensors.clear()
    _progress("")
    result = NetworkResult(title, dtype, results, recorder.changed)
    checked = time.perf_counter()
    if end_to_end:
        reference = build(spconv).double()
        reference.load_state_dict(weights)
        result.end_to_end = _end_to_end(reference, batch, whole["output"])
    print(f"\n{title}, {dtype}: steps {stepped - start:.1f} s, check {checked - stepped:.1f} s")
    _print_table(result)
    # Hooks and layers refer to each other; a GPU's memory should not wait for the collector.
    del network, recorder
    gc.collect()
    return result


def _step(network: nn.Module, batch: Batch, dtype: torch.dtype, seed: int) -> Tensor:
    """Run forward and backward from a random gradient; return the output's features."""
    # The first layer's input gradient is verified too.
    feats = batch.feats.detach().requires_grad_()
    batch = Batch(feats, batch.indices, batch.shape, batch.size)
    network.zero_grad()
    with autocast(feats.device, dtype):
        out = network(batch.tensor())[0].features
    # The gradient has unit size, because the gradient of a mean over all voxels vanishes in
    # float16.
    generator = torch.Generator().manual_seed(seed)
    out.backward(torch.randn(out.shape, generator=generator).to(out))
    return out.detach()


def _end_to_end(network: nn.Module, batch: Batch, output: Tensor) -> float:
    """Return the error of a whole network's output against ``network``, on the CPU in float64."""
    batch = Batch(batch.feats.cpu().double(), batch.indices.cpu(), batch.shape, batch.size)
    with torch.no_grad():
        exact = network(batch.tensor())[0].features
    return relative_error(output, exact) if output.shape == exact.shape else math.nan


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<60}", end="" if text else "\r", file=sys.stderr, flush=True)


def _print_table(result: NetworkResult) -> None:
    columns = (*ROUNDED, *SUMMED, "worst row")
    rows = []
    for layer in result.layers:
        errors = (layer.errors.get(name) for name in columns)
        verdict = "ok" if layer.passed else "FAIL" if layer.same_sites else "FAIL: sites"
        rows.append(
            (
                layer.name.removesuffix(".conv") + (" (1x1)" if layer.pointwise else ""),
                verdict,
                f"{layer.voxels:,}",
                f"{layer.pairs:,}",
                *("-" if error is None else f"{error:.1e}" for error in errors),
            )
        )
    print_columns(("layer", "", "voxels", "pairs", *columns), rows, left=2)
    print(f"  same bits: {'yes' if not result.changed else 'NO'}")
    if result.changed:
        print(f"  {len(result.changed)} tensors changed, first {', '.join(result.changed[:3])}")
    if result.end_to_end is not None:
        print(f"  end to end: output differs from float64 by {result.end_to_end:.1e}", flush=True)


def _summarize(results: list[NetworkResult]) -> bool:
    """Print the worst error of each dtype with its limit; return whether all errors are below."""
    columns = (*ROUNDED, *SUMMED, *(f"{name} 1x1" for name in SUMMED), "worst row")
    rows = []
    for dtype in dict.fromkeys(result.dtype for result in results):
        runs = [result for result in results if result.dtype == dtype]
        found: dict[str, list[tuple[float, float]]] = {}
        for layer in (layer for run in runs for layer in run.layers):
            for name, error in layer.errors.items():
                column = f"{name} 1x1" if layer.pointwise and name in SUMMED else name
                found.setdefault(column, []).append((error, layer.limits[name]))
        cells = []
        for column in columns:
            pairs = found.get(column)
            error = None if pairs is None else worst(error for error, _ in pairs)
            cells.append("-" if pairs is None else f"{error:.1e} ({pairs[0][1]:.0e})")
        same = all(layer.same_sites for run in runs for layer in run.layers)
        bits = not any(run.changed for run in runs)
        verdict = "PASS" if all(run.passed for run in runs) else "FAIL"
        rows.append((dtype, verdict, "yes" if same else "NO", "yes" if bits else "NO", *cells))
    print("\nworst error of each dtype (tolerance)")
    used = [number for number in range(4 + len(columns)) if any(row[number] != "-" for row in rows)]
    header = ("dtype", "", "same sites", "same bits", *columns)
    shown = [tuple(row[number] for number in used) for row in (header, *rows)]
    print_columns(shown[0], shown[1:], left=4)
    return all(result.passed for result in results)
