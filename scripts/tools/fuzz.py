"""Run many random layers and mistakes, on a CPU or a GPU, and say what came of them.

    python scripts/tools/fuzz.py                          # 20,000 cases on the CPU
    python scripts/tools/fuzz.py --device cuda --cases 2000 --seed 7

Valid layers are compared with torch's dense convolution or with brute force. A mistake is a public
call with one argument replaced. The call must return or raise an error with a message, and the next
valid call must be right.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests import _fuzz, _hostile  # noqa: E402


def fuzz(cases: int, start: int, device: torch.device) -> Counter[str]:
    """Run ``cases`` of every kind in batches that can be repeated by their seed; count results."""
    counts: Counter[str] = Counter()
    expected = _hostile.sentinel(str(device))

    def mistake(drawn: tuple[str, str, str]) -> None:
        refused = _fuzz.check_mistake(drawn, device, expected)
        counts["mistakes refused" if refused else "replacements accepted"] += 1

    kinds: dict[str, tuple[st.SearchStrategy, Callable]] = {
        "mistakes": (st.sampled_from(_fuzz.mistakes()), mistake)
    }

    def checked(name: str, check: Callable) -> Callable:
        def valid(drawn) -> None:
            rows = check(drawn, device)
            counts[f"{name}: right" if rows else f"{name}: right, no rows"] += 1

        return valid

    for name, (draw, check) in _fuzz.CHECKS.items():
        kinds[name] = (draw(), checked(name, check))
    batch = 500
    for number in range(-(-cases // (batch * len(kinds)))):
        for name, (strategy, check) in kinds.items():
            options = settings(
                max_examples=batch, deadline=None, database=None,
                suppress_health_check=[*HealthCheck],  # pyright: ignore
                phases=[Phase.generate, Phase.shrink],
            )  # fmt: skip
            try:
                seed(start + number)(options(given(strategy)(check)))()
            except Exception as error:
                counts[f"{name}: WRONG"] += 1
                print(
                    f"{name}, --seed {start + number}: {type(error).__name__}: {error}", flush=True
                )
        print(f"batch {number}: {dict(sorted(counts.items()))}", flush=True)
    return counts


def main() -> None:
    """Fuzz, print a log, and end with 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000, help="over all kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    begin = time.monotonic()
    counts = fuzz(options.cases, options.seed, options.device)
    total = sum(counts.values())
    wrong = sum(n for name, n in counts.items() if "WRONG" in name)
    print(f"{total} cases on {options.device} in {time.monotonic() - begin:.0f} s; {wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
