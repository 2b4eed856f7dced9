"""Does the adapter do what the original does? Run the same cases through both and compare.

Each library runs in a process of its own, on the same seeded inputs and parameters; a crash of one
is a result, not an end. Outputs, sites, and all gradients are compared, rows ordered by batch and
coordinates. How far apart they may be is derived, not chosen: see ``tests/parity/judge.py``.
Verdicts: equal (all bits), within tolerance, explained (by a line of the adapter's QUIRKS.md, which
is named), or DIFFERENT. The exit status is 1 if anything is DIFFERENT.

  python -m scripts.tools.parity --original spconv --device cpu
  python -m scripts.tools.parity --original spconv --device cuda --markdown out.md --json out.json
  python -m scripts.tools.parity --original spconv --device cuda --golden --only subm
  python -m scripts.tools.parity --original MinkowskiEngine --device cpu --original-python FILE

On a CPU, spconv has its Native algorithm only; on a GPU its default algorithms are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.parity import report, suite
from tests.parity.case import Case
from tests.parity.judge import Verdict
from tests.parity.originals import ORIGINALS, Original


def main() -> int:
    """Compare; return the exit status."""
    args = _parse_args()
    original = ORIGINALS[args.original]
    cases = [
        case
        for name, case in original.cases.items()
        if args.device in case.dtypes and (not args.only or args.only in name)
    ]
    if not cases:
        print(
            f"parity.py: no case for {args.device} has {args.only!r} in its name", file=sys.stderr
        )
        return 2
    try:
        setting, results = _results(original, cases, args)
    except RuntimeError as error:
        print(f"parity.py: {error}", file=sys.stderr)
        return 2
    print(report.text(results))
    command = f"python -m scripts.tools.parity --original {original.name} --device {args.device}"
    title = f"{original.adapter} beside {original.name} ({args.device})"
    if args.golden:
        command += " --golden"
        title = f"{original.adapter} on a CPU beside {original.name} as recorded ({args.device})"
    setting = {"made by": f"`{command}`"} | setting
    if args.markdown:
        args.markdown.write_text(report.markdown(title, setting, results))
    if args.json:
        args.json.write_text(json.dumps(report.data(setting, results), indent=1) + "\n")
    return int(any(result.verdict is Verdict.DIFFERENT for result in results))


def _results(original: Original, cases: Sequence[Case], args: argparse.Namespace) -> suite.Report:
    if args.golden:
        return suite.against_golden(original, cases, args.processes)
    return suite.live(original, cases, args.device, args.original_python, args.processes)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--original", choices=ORIGINALS, required=True)
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
        type=int,
        default=1,
        metavar="N",
        help="for each library and device (default 1; compiling for a GPU gains from more)",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report to FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    args = parser.parse_args()
    if args.processes < 1:
        parser.error(f"--processes must be at least 1; got {args.processes}")
    target = ORIGINALS[args.original].golden_target
    if args.golden and args.device != target:
        parser.error(f"--golden needs --device {target}: it is where {args.original} was recorded")
    return args


if __name__ == "__main__":
    sys.exit(main())
