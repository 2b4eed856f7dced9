"""Compile kernels for every target and write their use of resources to docs/targets.md.

    python scripts/tools/target_table.py            # all targets: an hour on two cores
    python scripts/tools/target_table.py gfx942     # these rows, the others as they are

Ends with 1 where a kernel does not fit a card's shared memory or spills registers.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
import triton  # noqa: E402

from tests.kernels._record import compile_for, record_launches, resources  # noqa: E402
from tests.kernels._targets import MAY_SPILL, TARGETS, card  # noqa: E402
from tests.kernels.launch_cases import LAUNCH_CASES  # noqa: E402
from tritonspconv.kernels.triton import gather_gemm, weight_grad  # noqa: E402

PAGE = ROOT / "docs" / "targets.md"
HEAD = f"""\
# Targets

Kernels compiled ahead of time for each target, without a card, by Triton {triton.__version__} and
torch {torch.__version__}: `scripts/tools/target_table.py`. A target fits if no kernel takes more
shared memory (AMD: LDS) than one block may use there, and no kernel spills registers. Compiling is
not running: the kernels ran on NVIDIA H100 and H200, and under Triton's interpreter.

In this run: {{cases}}.

| target | cards | warp | kernels | most shared memory, of the limit | most registers | spills |
| --- | --- | --- | --- | --- | --- | --- |
"""


def survey(target: str, pattern: str) -> tuple[str, list[str]]:
    """Compile cases for a target; return its row, and a line for each fault."""
    gpu, kilobytes, cards = TARGETS[target]
    taken, faults = {}, []
    for case, run in LAUNCH_CASES:
        if not re.search(pattern, case):
            continue
        with (
            mock.patch.object(gather_gemm, "card_of", return_value=card(target)),
            mock.patch.object(weight_grad, "card_of", return_value=card(target)),
            record_launches() as launches,
        ):
            run()
        for launch in launches:
            used = resources(compile_for(launch, gpu))
            taken[case, launch.name, len(taken)] = used
            if used.shared_bytes > kilobytes * 1024:
                faults.append(f"{target} {case} {launch.name} does not fit: {used}")
            if used.spill and (target, launch.name) not in MAY_SPILL:
                faults.append(f"{target} {case} {launch.name} spills: {used}")
    shared = max(taken, key=lambda key: taken[key].shared_bytes)
    registers = max(taken, key=lambda key: taken[key].registers)
    spills = sum(used.spill > 0 for used in taken.values())
    row = (
        f"| {target} | {cards} | {gpu.warp_size} | {len(taken)} | "
        f"{taken[shared].shared_bytes / 1024:.0f} of {kilobytes} KiB ({shared[0]}) | "
        f"{taken[registers].registers} ({registers[0]}) | {spills or 'none'} |"
    )
    return row, faults


def main() -> None:
    """Compile, and write or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="default: all")
    parser.add_argument("--cases", default="", help="those whose names hold this pattern")
    options = parser.parse_args()
    rows, faults = [], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for target in options.targets or TARGETS:
            row, found = survey(target, options.cases)
            print("\n".join([row, *found]), flush=True)
            rows.append(row)
            faults += found
    known = PAGE.read_text().splitlines() if PAGE.exists() else []
    rows = [row for row in [*known, *rows] if row.startswith(("| sm", "| gfx"))]
    by_target = {row.split()[1]: row for row in rows}
    ordered = [by_target[target] for target in TARGETS if target in by_target]
    cases = f"the cases that hold `{options.cases}`" if options.cases else "all kernels"
    PAGE.write_text(HEAD.replace("{cases}", cases) + "\n".join([*ordered, ""]))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
