"""Cases, and their checks and measurements, library by library."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from tritonspconv.bench.peers import first_line
from tritonspconv.bench.report import Cell, Report
from tritonspconv.bench.timing import Measurement, Meter, Metric, Run


class MeasuredLibrary(Protocol):
    """A library under measurement: `peers.Peer`, or `minkowski.Library`."""

    @property
    def name(self) -> str:
        """The head of its column."""
        ...

    def tf32(self, allowed: bool) -> AbstractContextManager[None]:
        """Let float32 layers multiply in TF32, or not, within the context."""
        ...


@dataclass(frozen=True)
class Trial:
    """The functions of one library for one case.

    Attributes:
        runs: The functions to measure, by name of the pass.
        check: Returns the relative errors by name.
    """

    runs: dict[str, Run]
    check: Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Case:
    """A measured task that every library can do.

    Attributes:
        labels: Text of the label columns except the last, which is the pass.
        passes: Names of the passes, one row each.
        prepare: Makes the trial of a library.
        limits: Largest error allowed, by name of the error.
        tf32: Let float32 layers multiply in TF32.
    """

    labels: tuple[str, ...]
    passes: tuple[str, ...]
    prepare: Callable[[Any], Trial]
    limits: dict[str, float]
    tf32: bool = False


class DeviceLostError(RuntimeError):
    """The GPU no longer answers, so all further measurements would fail too."""


def measure_cases(
    name: str,
    title: str,
    header: tuple[str, ...],
    cases: Sequence[Case],
    peers: Sequence[MeasuredLibrary],
    meter: Meter,
    report: Report,
    metric: Metric,
    *,
    checked: bool = True,
) -> None:
    """Check every case with every library, then measure them in turn; print each as it is done.

    Args:
        name: Name of the section.
        title: Title of the section.
        header: Heads of the label columns, the pass included.
        cases: The cases to measure.
        peers: The libraries.
        meter: The meter of the device.
        report: Takes the rows.
        metric: The quantity to measure.
        checked: Run the check first; wrong results get no time.

    Raises:
        DeviceLostError: The device failed for good.
    """
    labels = [(*case.labels, passed) for case in cases for passed in case.passes]
    report.begin(name, title, header, labels)
    for case in cases:
        results = _run_case(case, peers, meter, metric, checked)
        gc.collect()  # networks refer to themselves
        for passed in case.passes:
            cells = {peer: cells[passed] for peer, cells in results.items()}
            report.add((*case.labels, passed), cells)
        lost = [cell for cells in results.values() for cell in cells.values() if _is_lost(cell)]
        if lost:
            raise DeviceLostError(lost[0].message)


def _run_case(
    case: Case, peers: Sequence[MeasuredLibrary], meter: Meter, metric: Metric, checked: bool
) -> dict[str, dict[str, Cell]]:
    """Return a cell for each pass, by library."""
    entries = [_Entry(case, peer, meter) for peer in peers]
    for entry in entries:
        entry.make_ready(checked)
    for passed in case.passes:
        for _ in range(metric.rounds):
            for entry in entries:
                entry.measure(passed, metric)
    return {
        entry.peer.name: {passed: entry.cell(passed, metric.unit) for passed in case.passes}
        for entry in entries
    }


class _Entry:
    """The measurement of a library in a case, from its trial to its cells."""

    def __init__(self, case: Case, peer: MeasuredLibrary, meter: Meter) -> None:
        self.case, self.peer, self.meter = case, peer, meter
        self._trial: Trial | None = None
        self._errors: dict[str, float] = {}
        self._failed: dict[str, Cell] = {}
        self._values: dict[str, list[float]] = {passed: [] for passed in case.passes}

    def make_ready(self, checked: bool) -> None:
        """Prepare the trial; without the right results there is none."""

        def work() -> None:
            trial = self.case.prepare(self.peer)
            if checked:
                self._errors = trial.check()
            self._trial = trial

        failed = self._attempt(work)
        wrong = _exceeding(self._errors, self.case.limits)
        if failed is None and wrong:
            failed = Cell("FAIL", None, self._errors, wrong)
        if failed is not None:
            self._trial = None
            self._failed = dict.fromkeys(self.case.passes, failed)

    def measure(self, passed: str, metric: Metric) -> None:
        """Measure a pass for one round, if the library has this pass and it works."""
        run = None if self._trial is None else self._trial.runs.get(passed)
        if run is None or passed in self._failed:
            return
        failed = self._attempt(lambda: self._values[passed].extend(metric.once(run)))
        if failed is not None:
            self._failed[passed] = failed

    def cell(self, passed: str, unit: str) -> Cell:
        """Return the result of a pass."""
        if passed in self._failed:
            return self._failed[passed]
        values = self._values[passed]
        if not values:
            return Cell("n/a")
        return Cell("ok", Measurement.of(values, unit), self._errors)

    def _attempt(self, work: Callable[[], None]) -> Cell | None:
        """Call a function of the library; return the error, or None."""
        message = ""
        try:
            with self.peer.tf32(self.case.tf32):
                work()
        except Exception as error:  # a library may raise anything; other libraries go on
            message = first_line(error)
        if message:
            # The error keeps the frames of the failed case alive, and gigabytes of tensors with
            # them.
            gc.collect()
        try:
            self.meter.synchronize()
        except RuntimeError as error:
            message = f"device lost: {first_line(error)}"
        return Cell("error", None, self._errors, message) if message else None


def _exceeding(errors: dict[str, float], limits: dict[str, float]) -> str:
    """Name the errors above their limits; NaN is above any."""
    return ", ".join(
        f"{name} {value:.2e} > {limits[name]:.0e}"
        for name, value in errors.items()
        if not value <= limits[name]
    )


def _is_lost(cell: Cell) -> bool:
    return cell.message.startswith("device lost")
