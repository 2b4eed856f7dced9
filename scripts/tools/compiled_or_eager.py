"""Compare eager networks with compiled ones: results, the time of a call, and of the first call.

  python -m scripts.tools.compiled_or_eager                 # on a GPU where there is one
  python -m scripts.tools.compiled_or_eager --device cpu --max-points 4000 --clock cpu
  python -m scripts.tools.compiled_or_eager --only 'residual.* float16 .*train'

Every network of ``tritonspconv.models`` runs through ``compat.spconv``, as it is and after
``torch.compile``. A result that differs gets no time. The two take turns. The first call of an
eager network compiles kernels, which the compiled network then finds in Triton's cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from pathlib import Path

import torch

from tritonspconv.bench.cases import Case, Trial, measure_cases
from tritonspconv.bench.networks import (
    BUILDERS,
    FUSED,
    GRADIENT_TOLERANCE,
    HEADER,
    NETWORK_TOLERANCE,
    NetworkBench,
)
from tritonspconv.bench.peers import OURS, Peer, load_peer
from tritonspconv.bench.reference import relative_error
from tritonspconv.bench.report import Report
from tritonspconv.bench.scenes import Scene, SceneStore
from tritonspconv.bench.timing import CLOCKS, Meter

COMPILED = "compiled"
SCENES = {"SECOND encoder": "kitti", "residual encoder": "kitti_b4", "SpUNet-34": "waymo_unet"}


def main() -> int:
    """Measure; return 1 where a result is wrong or missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kitti", type=Path, help="scan of a front view; simulated if left out")
    parser.add_argument("--waymo", type=Path, help="scan around a vehicle; simulated if left out")
    parser.add_argument("--max-points", type=int, help="use only so many points of a scan")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="cases that match")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    args = parser.parse_args()
    device = torch.device(args.device)
    scenes = SceneStore(device, args.waymo, args.kitti, 16, args.max_points)
    eager = load_peer(OURS, device)
    peers = [eager, dataclasses.replace(eager, name=COMPILED)]
    meter = Meter(device, args.quick, args.clock)
    report = Report([peer.name for peer in peers], {})
    dtypes = ("float16", "float32") if meter.on_gpu else ("float32",)
    cases = [
        network_case(name, scenes[SCENES[name]], dtype, training)
        for name in BUILDERS
        if name != FUSED
        for dtype in dtypes
        for training in (False, True)
    ]
    chosen = [c for c in cases if args.only.search(" ".join((*c.labels, *c.passes)))]
    title = f"eager and compiled networks, {CLOCKS[args.clock]}, ms"
    measure_cases("compiled", title, HEADER, chosen, peers, meter, report, metric=meter.wall)
    if meter.on_gpu:
        title = "the same, sum of the kernels' durations, ms"
        measure_cases(
            "compiled", title, HEADER, chosen, peers, meter, report, metric=meter.device_time,
            checked=False,
        )  # fmt: skip
    return int(bool(report.failures))


def network_case(name: str, scene: Scene, dtype: str, training: bool) -> Case:
    """Return the case of one network, dtype and pass."""
    shown = "float16 autocast" if training and dtype == "float16" else dtype
    labels = (name, scene.name, f"{len(scene.indices):,}", shown)
    passed = "train step" if training else "infer"
    state = fitting_state(name, scene)

    def prepare(peer: Peer) -> Trial:
        bench = NetworkBench(name, scene, peer, dtype, training, state)
        if peer.name == COMPILED:
            # The networks share the code of their classes, and torch's limit of compilations.
            torch.compiler.reset()
            bench.network = torch.compile(bench.network)
        start = time.perf_counter()
        result = bench.result()
        print(f"  first call, {' '.join(labels)}, {passed}, {peer.name}: ", end="")
        print(f"{time.perf_counter() - start:.1f} s", flush=True)

        def errors() -> dict[str, float]:
            expected = NetworkBench(
                name, scene, load_peer(OURS, scene.indices.device), dtype, training, state
            ).result()
            found = {"out": relative_error(result.feats, expected.feats)}
            if result.grads is not None and expected.grads is not None:
                found["grads"] = relative_error(result.grads, expected.grads)
            return found

        return Trial({passed: bench.step if training else bench.infer}, errors)

    limits = {"out": NETWORK_TOLERANCE[dtype], "grads": GRADIENT_TOLERANCE[dtype]}
    return Case(labels, (passed,), prepare, limits)


def fitting_state(name: str, scene: Scene) -> dict[str, torch.Tensor]:
    """Return weights, and statistics of batch norms that fit them, so that halves do not vanish."""
    bench = NetworkBench(name, scene, load_peer(OURS, scene.indices.device), "float32", True)
    bench.calibrate()
    return {key: value.cpu() for key, value in bench.network.state_dict().items()}


if __name__ == "__main__":
    sys.exit(main())
