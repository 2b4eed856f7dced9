"""Cases, and how they are checked and measured library by library."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench_peers import Peer, first_line
from bench_report import Cell, Report
from bench_timing import Measurement, Meter, Run


@dataclass(frozen=True)
class Trial:
    """One library, ready to run a case.

    Attributes:
        runs: What to measure, by name of the pass.
        check: Returns the relative errors by name.
    """

    runs: dict[str, Run]
    check: Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Case:
    """Something that every library can do.

    Attributes:
        labels: Text of the label columns except the last, which is the pass.
        passes: Names of the passes, one row each.
        prepare: Makes the trial of a library.
        limits: Largest error allowed, by name of the error.
        tf32: Let float32 layers multiply in TF32.
    """

    labels: tuple[str, ...]
    passes: tuple[str, ...]
    prepare: Callable[[Peer], Trial]
    limits: dict[str, float]
    tf32: bool = False


class DeviceLostError(RuntimeError):
    """The GPU no longer answers: everything that would follow would fail too."""


def measure_cases(
    name: str,
    title: str,
    header: tuple[str, ...],
    cases: Sequence[Case],
    peers: Sequence[Peer],
    meter: Meter,
    report: Report,
    measure: Callable[[Run], Measurement],
    *,
    checked: bool = True,
) -> None:
    """Check and measure every case with every library, and print each as it is done.

    Args:
        name: Of the section.
        title: Of the section.
        header: Heads of the label columns, the pass included.
        cases: What to measure.
        peers: The libraries.
        meter: Of the device.
        report: Takes the rows.
        measure: Measures one run.
        checked: Run the check first; wrong results get no time.

    Raises:
        DeviceLostError: The device failed for good.
    """
    labels = [(*case.labels, passed) for case in cases for passed in case.passes]
    report.begin(name, title, header, labels)
    for case in cases:
        results = {peer.name: _run_case(case, peer, meter, measure, checked) for peer in peers}
        for passed in case.passes:
            cells = {peer: cells[passed] for peer, cells in results.items()}
            report.add((*case.labels, passed), cells)
        lost = [cell for cells in results.values() for cell in cells.values() if _is_lost(cell)]
        if lost:
            raise DeviceLostError(lost[0].message)


def _run_case(
    case: Case, peer: Peer, meter: Meter, measure: Callable[[Run], Measurement], checked: bool
) -> dict[str, Cell]:
    """Return a cell for each pass."""
    cells: dict[str, Cell] = {}
    errors: dict[str, float] = {}
    try:
        with peer.tf32(case.tf32):
            trial = case.prepare(peer)
            if checked:
                errors = trial.check()
                wrong = _exceeding(errors, case.limits)
                if wrong:
                    return dict.fromkeys(case.passes, Cell("FAIL", None, errors, wrong))
            for passed in case.passes:
                run = trial.runs.get(passed)
                cells[passed] = Cell("n/a") if run is None else Cell("ok", measure(run), errors)
    except Exception as error:  # a library may raise anything; the others go on
        cell = Cell("error", None, errors, first_line(error))
        cells = {passed: cells.get(passed, cell) for passed in case.passes}
    # What is left of a failed case can hold gigabytes.
    gc.collect()
    try:
        meter.synchronize()
    except RuntimeError as error:
        lost = Cell("error", None, errors, f"device lost: {first_line(error)}")
        return dict.fromkeys(case.passes, lost)
    return cells


def _exceeding(errors: dict[str, float], limits: dict[str, float]) -> str:
    """Name the errors above their limits; NaN is above any."""
    return ", ".join(
        f"{name} {value:.2e} > {limits[name]:.0e}"
        for name, value in errors.items()
        if not value <= limits[name]
    )


def _is_lost(cell: Cell) -> bool:
    return cell.message.startswith("device lost")
