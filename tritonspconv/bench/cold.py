"""Time to the first result in a new process, with an empty and with a filled cache of kernels.

``python -m tritonspconv.bench.cold PEER SCENE.pt DEVICE DTYPE`` is that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tritonspconv.bench.networks import NetworkBench
from tritonspconv.bench.peers import Peer, first_line, load_peer
from tritonspconv.bench.report import Cell, Report
from tritonspconv.bench.scenes import Scene
from tritonspconv.bench.timing import Measurement

HEADER = ("network", "scene", "dtype", "Triton cache")
TIMEOUT_S = 300


def measure_cold(
    scene: Scene, peers: Sequence[Peer], report: Report, dtype: str, quick: bool
) -> None:
    """Measure the section ``cold``: one row with an empty cache, one with the cache it left.

    The time runs from a process with torch imported and the device started to the synchronised
    first result; it includes the import of the library.
    """
    labels = ("SECOND encoder, infer", scene.name, dtype)
    # A library that tunes at run time would take minutes.
    asked = [peer for peer in peers if not (quick and peer.name == "spconv-triton")]
    report.begin(
        "cold",
        "time to the first result in a new process, s",
        HEADER,
        [(*labels, state) for state in ("empty", "warm")],
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scene.pt"
        torch.save({**vars(scene), "indices": scene.indices.cpu()}, path)
        for state in ("empty", "warm"):
            cells = {
                peer.name: _ask(peer.name, path, scene.indices.device, dtype, Path(folder))
                for peer in asked
            }
            report.add((*labels, state), cells)


def _ask(peer: str, scene: Path, device: torch.device, dtype: str, folder: Path) -> Cell:
    """Return the answer of a new process, which keeps its kernels in ``folder``."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / f"triton-{peer}")}
    command = [sys.executable, "-m", __spec__.name, peer, str(scene), str(device), dtype]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Cell("error", message=f"no result after {TIMEOUT_S} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reasons = done.stderr.strip().splitlines() or ["no output"]
        return Cell("error", message=f"exit {done.returncode}: {reasons[-1][:160]}")
    answer = json.loads(lines[-1])
    if "error" in answer:
        return Cell("error", message=answer["error"])
    return Cell("ok", Measurement.of([answer["seconds"]], "s"))


def main() -> int:
    """Print the time to the first result as JSON."""
    name, path, device_name, dtype = sys.argv[1:]
    device = torch.device(device_name)
    parts: dict[str, Any] = torch.load(path)
    scene = Scene(**{**parts, "indices": parts["indices"].to(device)})
    torch.ones(8, device=device).sum().item()
    start = time.perf_counter()
    try:
        bench = NetworkBench("SECOND encoder", scene, load_peer(name, device), dtype, False)
        with torch.no_grad():
            value = bench.forward().features.float().sum().item()
    except Exception as error:  # a library may raise anything
        print(json.dumps({"error": first_line(error)}))
        return 0
    print(json.dumps({"seconds": time.perf_counter() - start, "sum": value}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
