"""Tables of parity results: for the terminal, as Markdown and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tests.parity.case import GRAD
from tests.parity.judge import Result, Value, Verdict

HEADER = (
    "case",
    "dtype",
    "output abs",
    "output rel",
    "gradients abs (rel)",
    "sites",
    "order",
    "verdict",
)
LEGEND = """\
A case runs one layer, function or network on both libraries, with the same inputs and
parameters. `tests/parity/cases` holds the cases. A dash means that the case has nothing
to compare in that column. Rows are compared in the order of batch and coordinates.

- **output abs**: the largest difference between the outputs of the two libraries.
- **output rel**: that difference as a share of the original's largest output.
- **gradients abs (rel)**: both numbers for each gradient.
- **sites**: whether both libraries have the same output sites.
- **order**: whether the output sites also stand in the same rows. The adapter orders new
  sites by a rule of its own, which its QUIRKS.md states.
- **verdict**: "equal" means that all bits agree, or that both libraries refuse the case as
  they should. "within tolerance" means that the errors of both libraries stay within the
  tolerance that `tests/parity/judge.py` derives from a float64 run. "explained" means that
  the difference is intended: a line of the adapter's QUIRKS.md describes it. "DIFFERENT"
  means that no line describes it."""
LEGEND_OF_DIFFERENCES = """\
The last column quotes the beginning of the line in the adapter's QUIRKS.md that explains
the difference.

- "must be A; got B": the original gives A, the adapter gives B.
- "error N times the tolerance": the larger error of the two libraries, measured against
  the float64 run.
- "original error", "adapter error": the library raised this error or its process died."""


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Return one row of text per result, in the columns of ``HEADER``."""
    return [_row(result) for result in results]


def text(results: Sequence[Result]) -> str:
    """Return the table with aligned columns, and the counts below it."""
    lines = [HEADER, *rows(results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*(line.rstrip() for line in table), "", summary(results)])


def markdown(title: str, setting: dict[str, str], results: Sequence[Result]) -> str:
    """Return the report: versions, counts, the table, and a list of all differences."""
    lines = [f"# {title}", ""]
    lines += [f"- {name}: {value}" for name, value in setting.items()]
    lines += [f"- result: {summary(results)}", "", LEGEND, ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    lines += ["| " + " | ".join(line) + " |" for line in rows(results)]
    explained = [result for result in results if result.problems]
    if explained:
        lines += [
            "",
            "## Differences",
            "",
            LEGEND_OF_DIFFERENCES,
            "",
            "| case | dtype | difference | line of QUIRKS.md |",
            "| --- | --- | --- | --- |",
        ]
    for result in explained:
        what = "; ".join(f"{name}: {problem}" for name, problem in result.problems.items())
        why = "; ".join(result.quirks) or "**unexplained**"
        lines.append(f"| {result.case} | {result.precision} | {_escape(what)} | {why} |")
    return "\n".join(lines) + "\n"


def data(setting: dict[str, str], results: Sequence[Result]) -> dict[str, Any]:
    """Return everything, ready for JSON."""
    return {
        "setting": setting,
        "verdicts": dict(Counter(result.verdict.value for result in results)),
        "results": [asdict(result) for result in results],
    }


def summary(results: Sequence[Result]) -> str:
    """Return how many comparisons have each verdict."""
    counts = Counter(result.verdict for result in results)
    parts = [f"{counts[verdict]} {verdict.value}" for verdict in Verdict]
    return f"{len(results)} comparisons: " + ", ".join(parts)


def _row(result: Result) -> tuple[str, ...]:
    outputs = [value for value in result.values if not value.name.startswith(GRAD)]
    gradients = [value for value in result.values if value.name.startswith(GRAD)]
    return (
        result.case,
        result.precision,
        _number(max((value.absolute for value in outputs), default=None)),
        _number(max((value.relative for value in outputs), default=None)),
        ", ".join(map(_gradient, gradients)) or "-",
        _answer(result.same_sites),
        _answer(result.same_order),
        result.verdict.value,
    )


def _gradient(value: Value) -> str:
    numbers = f"{_number(value.absolute)} ({_number(value.relative)})" if value.absolute else "0"
    return f"{value.name.removeprefix(GRAD)} {numbers}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if value else "0"


def _answer(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "no"


def _escape(value: str) -> str:
    return value.replace("|", "\\|")
