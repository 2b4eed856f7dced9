"""Does the adapter do what the original does? Run the same cases through both and compare.

Each library runs in a process of its own, on the same seeded inputs and parameters. If a library
crashes, the report records the crash and goes on. The command compares outputs, sites and all
gradients, with rows ordered by batch and coordinates. ``tests/parity/judge.py`` derives the
tolerance. Verdicts: equal (all bits), within tolerance, explained (the report names the line of the
adapter's QUIRKS.md), or DIFFERENT. The exit status is 1 if any comparison is DIFFERENT.

  tritonspconv parity --original spconv --device cpu
  tritonspconv parity --original spconv --device cuda --markdown out.md --json out.json
  tritonspconv parity --original spconv --device cuda --golden --only subm
  tritonspconv parity --original MinkowskiEngine --device cpu --original-python FILE

On a CPU, spconv has its Native algorithm only; on a GPU its default algorithms are compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonspconv.cli.errors import CommandError
from tritonspconv.demo.scenes import at_least_one

if TYPE_CHECKING:
    from tests.parity import suite
    from tests.parity.case import Case
    from tests.parity.originals import Original

NAMES = ("spconv", "MinkowskiEngine")


def run(args: argparse.Namespace) -> tuple[int, Any]:
    """Compare; return the exit status and the report."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        from tests.parity import report
        from tests.parity.judge import Verdict
        from tests.parity.originals import ORIGINALS
    except ImportError as error:
        raise CommandError(
            "the cases are in the repository: run this command in a clone of it "
            f"(git clone, then pip install -e '.[test]'); {error}"
        ) from error
    target = ORIGINALS[args.original].golden_target
    if args.golden and args.device != target:
        raise CommandError(f"--golden needs --device {target}: {args.original} was recorded there")
    original = ORIGINALS[args.original]
    cases = [
        case
        for name, case in original.cases.items()
        if args.device in case.dtypes and (not args.only or args.only in name)
    ]
    if not cases:
        raise CommandError(f"no case for {args.device} has {args.only!r} in its name")
    try:
        setting, results = _results(original, cases, args)
    except RuntimeError as error:
        raise CommandError(str(error)) from error
    print(report.text(results))
    command = f"tritonspconv parity --original {original.name} --device {args.device}"
    place = {"cpu": "a CPU", "cuda": "a GPU"}[args.device]
    title = f"{original.adapter} compared with {original.name} on {place}"
    if args.golden:
        command += " --golden"
        recorded = f"recorded runs of {original.name} on {place}"
        title = f"{original.adapter} on a CPU compared with {recorded}"
    setting = {"made by": f"`{command}`"} | setting | _cpu_back_end(args)
    if args.markdown:
        args.markdown.write_text(report.markdown(title, setting, results))
    different = any(result.verdict is Verdict.DIFFERENT for result in results)
    return int(different), report.data(setting, results)


def _cpu_back_end(args: argparse.Namespace) -> dict[str, str]:
    """Return the back end of the adapter where it ran on a CPU."""
    if args.device != "cpu" and not args.golden:
        return {}
    import torch

    from tritonspconv.kernels import has_numba

    found = f"numba {version('numba')}" if has_numba(torch.device("cpu")) else "torch"
    return {"the adapter's back end": found}


def _results(original: Original, cases: Sequence[Case], args: argparse.Namespace) -> suite.Report:
    from tests.parity import suite

    if args.golden:
        return suite.against_golden(original, cases, args.processes)
    return suite.live(original, cases, args.device, args.original_python, args.processes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--original", choices=NAMES, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--only", metavar="TEXT", help="cases with TEXT in their name")
    parser.add_argument(
        "--golden",
        action="store_true",
        help="compare with what the original recorded; the adapter runs on the CPU",
    )
    parser.add_argument(
        "--original-python",
        default=sys.executable,
        metavar="FILE",
        help="interpreter that can import the original (default: this one)",
    )
    parser.add_argument(
        "--processes",
        type=at_least_one,
        default=1,
        metavar="N",
        help="for each library and device (default 1; compiling for a GPU gains from more)",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report to FILE")
