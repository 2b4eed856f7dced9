"""Record the results of an original, for tests on machines without a GPU or without the original.

spconv is recorded on this machine's GPU, MinkowskiEngine on a CPU. Every parity case of that device
is recorded from the original alone: outputs, coordinates and gradients, with versions, device, and
the errors of cases that it cannot run. Inputs are not stored: they follow from the name of the case
by integer arithmetic (`tests/parity/case.py`).

  python -m scripts.tools.make_golden --original spconv                  # into tests/parity/golden
  python -m scripts.tools.make_golden --original spconv --output spconv-cuda.npz
  python -m scripts.tools.make_golden --original MinkowskiEngine --original-python FILE

``tritonspconv parity --original spconv --device cuda --golden`` then compares with
the file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tests.parity import golden, suite
from tests.parity.originals import ORIGINALS


def main() -> int:
    """Record; return the exit status."""
    args = _parse_args()
    original = ORIGINALS[args.original]
    if original.golden_target == "cuda" and not torch.cuda.is_available():
        print(
            f"make_golden.py: {original.name} is recorded on a GPU; none is here", file=sys.stderr
        )
        return 2
    path = args.output or golden.path_of(original)
    try:
        count = suite.record_golden(original, path, args.original_python, args.processes)
    except RuntimeError as error:
        print(f"make_golden.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {count} recordings to {path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--original", choices=ORIGINALS, required=True)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: the tests' own file")
    parser.add_argument(
        "--original-python",
        default=sys.executable,
        metavar="FILE",
        help="interpreter that can import the original (default: this one)",
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="default 1")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
