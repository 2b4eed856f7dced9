"""Report of the measurements: the table on the screen, and the files."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tritonspconv.bench.peers import OURS
from tritonspconv.bench.timing import Measurement

COLUMN_WIDTH = 13


def command_line() -> str:
    """Return the command of this process as a user types it, without the folder of the program."""
    program = Path(sys.argv[0]).name
    start = ["tritonspconv"] if program in ("__main__.py", "tritonspconv") else ["python", program]
    return shlex.join([*start, *sys.argv[1:]])


@dataclass(frozen=True)
class Cell:
    """The result of one library in one row.

    Attributes:
        status: ``"ok"``; ``"FAIL"``: wrong results, so no time; ``"error"``: it raised; ``"n/a"``:
            it has no such case.
        measurement: The measurement if the status is ``"ok"``, else None.
        errors: Relative errors by name, where they were checked.
        message: First line of the exception, or of the description of the wrong result.
    """

    status: str
    measurement: Measurement | None = None
    errors: dict[str, float] = field(default_factory=dict)
    message: str = ""

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Cell:
        """Return the cell that ``dataclasses.asdict`` saved."""
        measurement = saved["measurement"]
        return cls(
            saved["status"],
            None if measurement is None else Measurement(**measurement),
            saved["errors"],
            saved["message"],
        )

    @property
    def text(self) -> str:
        """The caption of the table."""
        if self.measurement is None:
            return "-" if self.status == "n/a" else self.status
        median = self.measurement.median
        return f"{median:,.0f}" if median >= 999.5 else f"{median:#.3g}".rstrip(".")


@dataclass(frozen=True)
class Row:
    """One measured case.

    Attributes:
        section: Name of the section on the command line.
        labels: Text for each label column of the section.
        cells: Results by name of the library.
    """

    section: str
    labels: tuple[str, ...]
    cells: dict[str, Cell]

    def ratio(self, peer: str) -> float | None:
        """Return the peer's value over ours."""
        ours, theirs = self.cells.get(OURS), self.cells.get(peer)
        if ours is None or theirs is None or not ours.measurement or not theirs.measurement:
            return None
        if not ours.measurement.median:
            return None
        return theirs.measurement.median / ours.measurement.median


@dataclass
class Section:
    """Rows under one heading."""

    name: str
    title: str
    header: tuple[str, ...]
    widths: tuple[int, ...]
    rows: list[Row] = field(default_factory=list)


class Report:
    """Prints rows as they come and keeps them for the files.

    Args:
        peers: Names of the libraries, in the order of their columns.
        about: Versions, GPU, command line, settings.
    """

    def __init__(self, peers: Sequence[str], about: dict[str, Any]) -> None:
        self.peers = list(peers)
        self.about = about
        self.sections: list[Section] = []

    @property
    def others(self) -> list[str]:
        """The libraries that ours is compared with."""
        return [peer for peer in self.peers if peer != OURS] if OURS in self.peers else []

    @property
    def columns(self) -> list[str]:
        """Heads of the columns behind the labels."""
        return [*self.peers, *(f"{peer} / {OURS}" for peer in self.others)]

    @property
    def failures(self) -> list[tuple[Row, str, Cell]]:
        """Wrong results of any library, and cases that ours could not run."""
        return [
            (row, peer, cell)
            for section in self.sections
            for row in section.rows
            for peer, cell in row.cells.items()
            if cell.status == "FAIL" or (cell.status == "error" and peer == OURS)
        ]

    def begin(
        self, name: str, title: str, header: tuple[str, ...], labels: Iterable[tuple[str, ...]]
    ) -> None:
        """Print the head of a section; ``labels`` are the labels of all its rows."""
        columns = zip(header, *labels, strict=True)
        widths = tuple(max(len(text) for text in column) for column in columns)
        section = Section(name, title, header, widths)
        self.sections.append(section)
        print(f"\n{name}: {title}", flush=True)
        self._print(section, header, self.columns)
        self._print(section, tuple("-" * width for width in widths), self._rules())

    def add(self, labels: tuple[str, ...], cells: dict[str, Cell]) -> None:
        """Print and keep a row of the section begun last."""
        section = self.sections[-1]
        row = Row(section.name, labels, cells)
        section.rows.append(row)
        self._print(section, labels, self._values(row))
        for peer, cell in cells.items():
            if cell.message and cell.status in ("FAIL", "error"):
                print(f"    {peer}: {cell.message}", flush=True)

    def adopt(self, content: dict[str, Any]) -> None:
        """Add the rows of another process's report, and do not print them: that process did.

        Args:
            content: The result of :meth:`content` there.
        """
        for saved in content["rows"]:
            header, labels = tuple(saved["labels"]), tuple(saved["labels"].values())
            if not self.sections or self.sections[-1].name != saved["section"]:
                title = saved.get("title", "")
                self.sections.append(Section(saved["section"], title, header, ()))
            cells = {peer: Cell.of(result) for peer, result in saved["results"].items()}
            self.sections[-1].rows.append(Row(saved["section"], labels, cells))

    def content(self) -> dict[str, Any]:
        """Return all numbers, as JSON holds them."""
        rows = [
            {
                "section": row.section,
                "title": section.title,
                "labels": dict(zip(section.header, row.labels, strict=True)),
                "results": {peer: asdict(cell) for peer, cell in row.cells.items()},
                "ratios": {peer: row.ratio(peer) for peer in self.others},
            }
            for section in self.sections
            for row in section.rows
        ]
        return {"about": self.about, "rows": rows}

    def save_json(self, path: Path) -> None:
        """Write all numbers."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.content(), indent=1) + "\n")

    def save_markdown(self, path: Path) -> None:
        """Write the tables."""
        versions = ", ".join(f"{name} {text}" for name, text in self.about["versions"].items())
        lines = [f"{self.about['device']}; {versions}.", "", f"`{self.about['command']}`"]
        for section in self.sections:
            lines += ["", f"### {section.name}", "", section.title, ""]
            lines.append(_markdown_row((*section.header, *self.columns)))
            marks = ["---"] * len(section.header) + ["---:"] * len(self.columns)
            lines.append(_markdown_row(marks))
            lines += [_markdown_row((*row.labels, *self._values(row))) for row in section.rows]
            notes = [
                f"- {', '.join(row.labels)}: {peer} {cell.status}: {cell.message}"
                for row in section.rows
                for peer, cell in row.cells.items()
                if cell.message
            ]
            lines += ["", *notes] if notes else []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")

    def save_plot(self, path: Path) -> None:
        """Draw the ratios as bars, one panel a section; needs matplotlib."""
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt

        panels = [
            (section, [row for row in section.rows if any(map(row.ratio, self.others))])
            for section in self.sections
        ]
        panels = [(section, rows) for section, rows in panels if rows]
        if not panels:
            print("no plot: no row has both a library to compare with and ours", flush=True)
            return
        heights = [len(rows) + 2 for _, rows in panels]
        figure, axes = plt.subplots(
            len(panels),
            1,
            figsize=(9, 1 + 0.22 * sum(heights)),
            height_ratios=heights,
            squeeze=False,
            layout="constrained",
        )
        for axis, (section, rows) in zip(axes[:, 0], panels, strict=True):
            thickness = 0.8 / len(self.others)
            for number, peer in enumerate(self.others):
                places = [place + number * thickness for place in range(len(rows))]
                values = [row.ratio(peer) or 0.0 for row in rows]
                axis.barh(places, values, height=thickness, align="edge", label=peer)
            axis.set_yticks(
                [place + 0.4 for place in range(len(rows))],
                [", ".join(row.labels) for row in rows],
                fontsize=6,
            )
            axis.axvline(1.0, color="black", linewidth=0.8)
            axis.invert_yaxis()
            axis.set_title(f"{section.name}: peer / {OURS}", fontsize=8, loc="left")
        axes[0, 0].legend(fontsize=7)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)

    def _values(self, row: Row) -> list[str]:
        texts = [row.cells[peer].text if peer in row.cells else "-" for peer in self.peers]
        ratios = [row.ratio(peer) for peer in self.others]
        return texts + ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]

    def _rules(self) -> list[str]:
        return ["-" * max(COLUMN_WIDTH, len(head)) for head in self.columns]

    def _print(self, section: Section, labels: Sequence[str], values: Sequence[str]) -> None:
        left = [text.ljust(width) for text, width in zip(labels, section.widths, strict=True)]
        rules = self._rules()
        right = [text.rjust(len(rule)) for text, rule in zip(values, rules, strict=True)]
        print("  " + "  ".join([*left, *right]).rstrip(), flush=True)


def _markdown_row(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"
