"""Compare tritonspconv with the libraries that it replaces: results first, then times and memory.

Every case is checked before it is timed: a layer against a plain convolution in float32, a kernel
map against a count of its pairs, a network against another library's float32 result. Wrong results
print FAIL instead of a time, and the exit status is 1. An error of ours gives exit status 1 too; an
error of another library is recorded. Other libraries are found by import.

On a CPU set OMP_NUM_THREADS=1: with more threads the original's CPU layers gave wrong results.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tritonspconv.bench.cases import Case, DeviceLostError, measure_cases
from tritonspconv.bench.cold import measure_cold
from tritonspconv.bench.layers import HEADER as LAYER_HEADER
from tritonspconv.bench.layers import layer_cases, memory_cases, small_cases, tf32_cases
from tritonspconv.bench.maps import HEADER as MAP_HEADER
from tritonspconv.bench.maps import map_cases
from tritonspconv.bench.networks import HEADER as NETWORK_HEADER
from tritonspconv.bench.networks import footprint_cases, network_cases, saving_cases
from tritonspconv.bench.peers import MODULES, Peer, find_peers
from tritonspconv.bench.report import Report, command_line
from tritonspconv.bench.scenes import SceneStore
from tritonspconv.bench.timing import CLOCKS, Meter
from tritonspconv.demo.scenes import choose_device

# The profiler that `maps` uses can slow down later sections, so `maps` comes last.
SECTIONS = ("layers", "tf32", "small", "networks", "memory", "cold", "maps")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Run the sections asked for; return the exit status and the report."""
    unknown = sorted(set(args.sections) - set(SECTIONS))
    if unknown:
        raise ValueError(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    args.sections = args.sections or list(SECTIONS)
    device = choose_device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    peers, missing = find_peers(args.peers, device)
    for name, reason in missing.items():
        print(f"without {name}: {reason}", flush=True)
    if not peers:
        raise ValueError("no library to measure; name others with --peers")

    report = Report([peer.name for peer in peers], _about(args, device, peers, missing))
    print(f"{report.about['device']}; {report.about['versions']}", flush=True)
    scenes = SceneStore(device, args.waymo, args.kitti, args.sphere_radius, args.max_points)
    status = 0
    try:
        for section in SECTIONS:
            if section in args.sections:
                start = time.perf_counter()
                meter = Meter(device, args.quick, args.clock)
                _run_section(section, args, scenes, peers, meter, report)
                print(f"  ({section} took {time.perf_counter() - start:.0f} s)", flush=True)
                _save(args, report)
    except DeviceLostError as error:
        print(f"tritonspconv bench: stopped: {error}", file=sys.stderr)
        status = 1
    finally:
        _save(args, report)
    if args.plot is not None:
        report.save_plot(args.plot)
    if report.failures:
        print(f"FAIL: {len(report.failures)} results are wrong or missing")
        status = 1
    return status, report.content()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all"
    )
    parser.add_argument("--waymo", type=Path, help="scan around a vehicle; simulated if left out")
    parser.add_argument("--kitti", type=Path, help="scan of a front view; simulated if left out")
    parser.add_argument(
        "--peers", nargs="+", choices=MODULES, default=list(MODULES), help="default: all"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu"
    )
    parser.add_argument(
        "--only",
        metavar="REGEX",
        type=_pattern,
        default=re.compile(""),
        help="cases whose labels match, e.g. 'SubM.* 64 float16'",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time; for busy machines"
    )
    parser.add_argument("--sphere-radius", type=int, default=128, help="in voxels (default 128)")
    parser.add_argument("--max-points", type=int, help="use only so many points of a scan")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--plot", type=Path, help="draw the ratios; needs matplotlib")


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"no regular expression: {error}") from error


def _run_section(
    section: str,
    args: argparse.Namespace,
    scenes: SceneStore,
    peers: list[Peer],
    meter: Meter,
    report: Report,
) -> None:
    on_gpu = meter.on_gpu

    def measure(
        name: str, title: str, header: tuple[str, ...], cases: list[Case], **how: Any
    ) -> None:
        chosen = [case for case in cases if args.only.search(" ".join(case.labels))]
        measure_cases(name, title, header, chosen, peers, meter, report, **how)

    if section == "layers":
        cases = layer_cases(scenes, args.quick, on_gpu)
        title = "ms for one layer; fwd, fwd+bwd: cached kernel map; map+: a new map at every call"
        measure(section, title, LAYER_HEADER, cases, metric=meter.layer)
    elif section == "tf32" and not on_gpu:
        print(f"\n{section}: needs a GPU", flush=True)
    elif section == "tf32" and args.sections != ["tf32"]:
        report.adopt(_measured_apart(args))
    elif section == "tf32":
        title = "one float32 layer that multiplies in TF32, ms; a process of its own"
        measure(section, title, LAYER_HEADER, tf32_cases(scenes), metric=meter.layer)
    elif section == "small":
        cases = small_cases(scenes, args.quick, on_gpu)
        title = "one layer on few voxels, kernel map cached, ms"
        measure(section, title, LAYER_HEADER, cases, metric=meter.layer)
    elif section == "networks":
        cases = network_cases(scenes, peers, on_gpu)
        title = f"{CLOCKS[args.clock]}, ms; new kernel maps at every call"
        measure(section, title, NETWORK_HEADER, cases, metric=meter.wall)
    elif section == "cold":
        dtype = "float16" if on_gpu else "float32"
        measure_cold(scenes["kitti"], peers, report, dtype, args.quick)
    elif section == "maps":
        title = f"kernel maps, {CLOCKS[args.clock]}, ms"
        measure(section, title, MAP_HEADER, map_cases(scenes, "wall"), metric=meter.wall)
        if on_gpu:
            title = "kernel maps, sum of the kernels' durations, ms"
            cases = map_cases(scenes, "device")
            measure(section, title, MAP_HEADER, cases, metric=meter.device_time, checked=False)
    else:
        title = "peak memory that a call adds, MiB; kernel maps included"
        cases = memory_cases(scenes, args.quick, on_gpu)
        measure(section, title, LAYER_HEADER, cases, metric=meter.peak, checked=False)
        cases = network_cases(scenes, peers, on_gpu)
        measure(section, title, NETWORK_HEADER, cases, metric=meter.peak, checked=False)
        if not on_gpu:
            return
        cases = saving_cases(scenes, peers, captured=False)
        title = "peak memory that a training step adds, MiB; as it is and under save_memory"
        measure(section, title, NETWORK_HEADER, cases, metric=meter.peak, checked=False)
        title = "the same training steps, wall time, ms"
        measure(section, title, NETWORK_HEADER, cases, metric=meter.wall, checked=False)
        cases = saving_cases(scenes, peers, captured=True)
        title = "memory that a captured training step needs, MiB; as it is and under save_memory"
        measure(section, title, NETWORK_HEADER, cases, metric=meter.footprint, checked=False)
        title = "the same captured steps, wall time, ms"
        measure(section, title, NETWORK_HEADER, cases, metric=meter.wall, checked=False)
        title = "memory that a network needs, MiB; what graphs keep included, room for 1.5 x voxels"
        cases = footprint_cases(scenes, peers)
        measure(section, title, NETWORK_HEADER, cases, metric=meter.footprint, checked=False)


def _measured_apart(args: argparse.Namespace) -> dict[str, Any]:
    """Return the content of the section ``tf32`` from a process that measures nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tf32.json"
        command = [sys.executable, "-m", "tritonspconv", *_arguments_apart(args, path)]
        # The process prints to this terminal.
        subprocess.run(command, env={**os.environ, "SPCONV_ALLOW_TF32": "1"}, check=False)
        if not path.exists():
            print("tf32: its process wrote no results", flush=True)
            return {"rows": []}
        return json.loads(path.read_text())


def _arguments_apart(args: argparse.Namespace, path: Path) -> list[str]:
    """Return the command line that measures the section ``tf32`` alone."""
    line = ["bench", "tf32", "--device", args.device, "--json", str(path)]
    line += ["--only", args.only.pattern, "--sphere-radius", str(args.sphere_radius)]
    line += ["--clock", args.clock]
    for name in ("waymo", "kitti", "max_points"):
        value = getattr(args, name)
        if value is not None:
            line += [f"--{name.replace('_', '-')}", str(value)]
    return [*line, *(["--quick"] if args.quick else []), "--peers", *args.peers]


def _about(
    args: argparse.Namespace, device: torch.device, peers: Sequence[Peer], missing: dict[str, str]
) -> dict[str, Any]:
    versions = {peer.name: peer.version for peer in peers}
    versions |= {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("triton", "numba", "cumm"):
        for distribution in importlib.metadata.packages_distributions().get(package, []):
            versions[package] = importlib.metadata.version(distribution)
    on_gpu = device.type == "cuda"
    return {
        "command": command_line(),
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "versions": versions,
        "missing": missing,
        "quick": args.quick,
        "clock": args.clock,
        "date": time.strftime("%Y-%m-%d"),
    }


def _save(args: argparse.Namespace, report: Report) -> None:
    # Write the files after every section, so that a lost device does not lose earlier results.
    if isinstance(args.json, Path):
        report.save_json(args.json)
    if args.markdown is not None:
        report.save_markdown(args.markdown)
