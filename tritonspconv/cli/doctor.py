"""Check this installation: versions, devices, their back ends, and whether results are right.

Every kind of convolution and pool runs on every device in four dtypes, forward and backward, and is
compared with brute force in float64. The exit status is 1 if a result is wrong. On a GPU the
kernels are compiled first, which takes a minute or two.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tritonspconv import ActiveSites, __version__
from tritonspconv._compat_name import foreign_module
from tritonspconv._self_check import CHECKS, DTYPES
from tritonspconv.kernels import NUMBA_VARIABLE, has_numba, has_triton
from tritonspconv.testing import random_sites


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command: none."""


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Print the findings; return the exit status and the report."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    versions = _versions()
    for name, value in versions:
        _say(f"{name:14}{value}")
    checked = []
    for device in devices:
        about = _describe(device)
        _say(f"\n{device}: {about}")
        results = [result for kind in CHECKS for result in _check(kind, device)]
        checked.append({"device": str(device), "about": about, "results": results})
    passed = all(result["passed"] for each in checked for result in each["results"])
    details = [result["details"] for each in checked for result in each["results"]]
    if any(details):
        _say(f"\nThe first failure in full:\n{next(filter(None, details))}")
    findings = examine(devices)
    for finding in findings:
        _say(f"\n! {finding.what}\n  {finding.advice}")
    _say("\nAll is well." if passed else "\nSomething is wrong: please report it with this output.")
    report = {
        "versions": dict(versions),
        "devices": checked,
        "findings": [asdict(finding) for finding in findings],
        "passed": passed,
    }
    return int(not passed), report


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Finding:
    """A fact about the installation that its user should know, and a remedy."""

    what: str
    advice: str


def examine(devices: Sequence[torch.device]) -> list[Finding]:
    """Return the unusual facts about this installation."""
    findings = []
    folder = Path.cwd()
    # Scripts in a checkout of this project import the engine from there too.
    in_checkout = (folder / "tritonspconv" / "_compat_name.py").is_file()
    foreign = foreign_module(None if in_checkout else str(folder))
    if foreign is not None:
        findings.append(
            Finding(
                f"another module is called compat: {foreign}",
                "Here 'import compat.spconv' does not find the adapters. Rename that module, or "
                "use the other names: 'import tritonspconv.compat.spconv.pytorch', "
                "'tritonspconv run --as spconv -- SCRIPT'.",
            )
        )
    on_gpu = any(device.type == "cuda" for device in devices)
    if on_gpu and importlib.util.find_spec("triton") is None:
        findings.append(
            Finding(
                "there is a GPU, and Triton is not installed",
                "Layers on the GPU run in plain torch, which is slow. Install the torch build for "
                "your CUDA or ROCm version: it brings the Triton that fits.",
            )
        )
    for device in devices:
        if device.type == "cuda" and not has_triton(device) and not torch.version.hip:
            findings.append(
                Finding(
                    f"{device} is older than sm_80",
                    "Its layers run in plain torch. Triton kernels need an A100 or newer.",
                )
            )
    if not has_numba(torch.device("cpu")):
        findings.append(_without_numba())
    tiles = os.environ.get("TRITONSPCONV_TILES")
    if tiles and not Path(tiles).is_file():
        findings.append(
            Finding(
                f"TRITONSPCONV_TILES names {tiles}, which is no file",
                "Unset the variable, or write the file: tritonspconv tune FILE --channels IN:OUT.",
            )
        )
    return findings


def _without_numba() -> Finding:
    """Say why the CPU's layers run in torch, and name a remedy."""
    if os.environ.get(NUMBA_VARIABLE) == "0":
        return Finding(
            f"{NUMBA_VARIABLE}=0 switches the numba kernels off",
            "Layers on the CPU run in vectorised torch. Unset the variable for faster ones.",
        )
    return Finding(
        "numba is not installed, or cannot be imported",
        "Layers on the CPU run in vectorised torch: right, and slower. For faster ones: "
        "pip install 'tritonspconv[cpu]'.",
    )


def _versions() -> list[tuple[str, str]]:
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if torch.version.hip:
        built = f"ROCm {torch.version.hip}"
    return [
        ("tritonspconv", __version__),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {built}"),
        ("Triton", _version("triton", "not installed; GPUs need it, CPUs do not")),
        ("numba", _version("numba", "not installed; layers on the CPU are faster with it")),
        ("kernel cache", os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache")),
    ]


def _version(distribution: str, otherwise: str) -> str:
    """Return the installed version of a distribution, or ``otherwise``."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return otherwise


def _describe(device: torch.device) -> str:
    """Return the device's name, and which kernels run on it."""
    if device.type == "cpu":
        kernels = "numba kernels" if has_numba(device) else "vectorised torch"
        threads = torch.get_num_threads()
        return f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}, {kernels}"
    properties = torch.cuda.get_device_properties(device)
    arch = getattr(properties, "gcnArchName", f"sm_{properties.major}{properties.minor}")
    if not has_triton(device):
        kernels = "vectorised torch: Triton kernels need sm_80 or newer"
    else:
        from tritonspconv.kernels.triton._versions import hands_values

        kernels = f"Triton kernels, {'direct' if hands_values else 'ordinary'} launches"
    return f"{properties.name} ({arch}, {properties.total_memory >> 30} GiB), {kernels}"


def _check(kind: str, device: torch.device) -> list[dict[str, Any]]:
    """Print the result of a layer in each dtype, and return the results."""
    torch.manual_seed(0)
    sites = random_sites(200, extent=9)
    moved = ActiveSites(sites.coords.to(device), sites.grid)
    results = []
    for dtype in DTYPES:
        start = time.perf_counter()
        passed, details = False, None
        try:
            CHECKS[kind](moved, dtype)
            verdict, passed = "right", True
        except AssertionError as error:
            verdict = f"WRONG: {error}"
        except Exception as error:
            verdict = f"FAILED: {_reason(error)}"
            details = "".join(traceback.format_exception(error))
        seconds = time.perf_counter() - start
        name = str(dtype).removeprefix("torch.")
        _say(f"  {kind:14} {name:9} {seconds:5.1f} s  {verdict}")
        result = {"layer": kind, "dtype": name, "seconds": seconds}
        results.append({**result, "verdict": verdict, "passed": passed, "details": details})
    return results


def _reason(error: BaseException) -> str:
    """Return the innermost cause of an error in one line.

    Triton raises one error for each kernel function that led to a mistake, and the text of an error
    quotes the source: its last line says what is wrong.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
