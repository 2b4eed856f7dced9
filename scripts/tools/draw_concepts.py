"""Draw the pictures of docs/concepts.md from the engine's own kernel maps.

  python -m scripts.tools.draw_concepts

Writes docs/img/kinds.svg, map.svg and taps.svg. Needs nothing but torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from tritonspconv import ActiveSites, ConvGeometry, Grid, KernelMap, kernel_map

IMAGES = Path(__file__).parents[2] / "docs" / "img"
SITES = [(0, 1), (1, 1), (1, 2), (2, 4), (3, 4), (4, 5)]
GIVEN = [(0, 0), (1, 2), (2, 5), (3, 4), (5, 5)]
CELL = 26
FULL, EMPTY, MARK = "#2f8fa3", "#eef1f5", "#f2c14e"
Cells = list[tuple[int, int]]


class Panel(NamedTuple):
    """One grid of the picture of all kinds; a cell has the side of ``stride`` input cells."""

    title: str
    cells: Cells
    stride: int


def main() -> int:
    """Draw; return the exit status."""
    sites, given = _sites(SITES), _sites(GIVEN)
    one, two, none = (1, 1), (2, 2), (0, 0)
    submanifold = kernel_map(sites, ConvGeometry.submanifold((3, 3), one))
    down = kernel_map(sites, ConvGeometry(two, two, none, one))
    coarse = down.out_sites
    up = ConvGeometry(two, two, none, one, transposed=True)
    to_given = kernel_map(coarse, up, out_sites=given)
    panels = [
        Panel("input", SITES, 1),
        Panel("submanifold 3x3", _cells(submanifold.out_sites), 1),
        Panel("strided 2x2, stride 2", _cells(coarse), 2),
        Panel("inverse of the strided", _cells(down.inverse().out_sites), 1),
        Panel("transposed to given sites", _cells(to_given.out_sites), 1),
        Panel("generative 2x2, stride 2", _cells(kernel_map(coarse, up).out_sites), 1),
    ]
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "kinds.svg").write_text(_kinds(panels))
    (IMAGES / "map.svg").write_text(_map(submanifold))
    (IMAGES / "taps.svg").write_text(_taps())
    return 0


def _sites(cells: Cells) -> ActiveSites:
    coords = torch.tensor([(0, *cell) for cell in cells], dtype=torch.int32)
    return ActiveSites(coords, Grid((0, 0), (6, 6), 1))


def _cells(sites: ActiveSites) -> Cells:
    return [(int(row), int(column)) for _, row, column in sites.coords.tolist()]


def _grid(x: int, y: int, cells: Cells, stride: int = 1, *, numbered: bool = False) -> list[str]:
    """Return the squares of a 6x6 grid, or of the coarser grid of a stride."""
    parts, side = [], CELL * stride
    for row in range(6 // stride):
        for column in range(6 // stride):
            active = (row, column) in cells
            left, top = x + side * column, y + side * row
            parts.append(
                f'<rect x="{left}" y="{top}" width="{side - 2}" height="{side - 2}" rx="3" '
                f'fill="{FULL if active else EMPTY}"/>'
            )
            if numbered and active:
                number = cells.index((row, column))
                parts.append(f'<text x="{left + 8}" y="{top + 17}" fill="#ffffff">{number}</text>')
    return parts


def _kinds(panels: list[Panel]) -> str:
    """Return two rows of three grids."""
    parts, width, height = [], CELL * 6 + 48, CELL * 6 + 56
    for number, panel in enumerate(panels):
        x, y = 12 + width * (number % 3), height * (number // 3)
        parts.append(f'<text x="{x}" y="{y + 20}" font-weight="600">{panel.title}</text>')
        facts = f"{len(panel.cells)} sites, tensor stride {panel.stride}"
        parts.append(f'<text x="{x}" y="{y + 37}" fill="#5b6575">{facts}</text>')
        parts += _grid(x, y + 46, panel.cells, panel.stride)
    return _svg(12 + 3 * width, 2 * height, parts)


def _map(submanifold: KernelMap) -> str:
    """Return the sites with their rows, the window of one output, and the pairs of that output."""
    chosen, x, y = 1, 12, 32
    row, column = SITES[chosen]
    parts = [f'<text x="{x}" y="20">sites, numbered by rows</text>']
    parts += _grid(x, y, SITES, numbered=True)
    parts.append(
        f'<rect x="{x + CELL * (column - 1) - 2}" y="{y + CELL * (row - 1) - 2}" '
        f'width="{3 * CELL + 2}" height="{3 * CELL + 2}" rx="5" fill="none" stroke="{MARK}" '
        'stroke-width="3"/>'
    )
    left = x + CELL * 6 + 30
    parts.append(f'<text x="{left}" y="20">pairs of output row {chosen}, in its 3x3 window</text>')
    for number, text in enumerate(("tap", "offset", "input row", "output row")):
        parts.append(f'<text x="{left + 70 * number}" y="{y + 16}" fill="#5b6575">{text}</text>')
    in_rows, out_rows, tap_ptr = submanifold.pairs()
    line = 0
    for tap, offset in enumerate(submanifold.geometry.offsets):
        for pair in range(int(tap_ptr[tap]), int(tap_ptr[tap + 1])):
            if int(out_rows[pair]) != chosen:
                continue
            line += 1
            place = "(" + ", ".join(map(str, offset)) + ")"
            for number, text in enumerate((tap, place, int(in_rows[pair]), chosen)):
                parts.append(
                    f'<text x="{left + 70 * number}" y="{y + 16 + 24 * line}">{text}</text>'
                )
    return _svg(left + 290, CELL * 6 + 44, parts)


def _taps() -> str:
    parts = []
    offsets = ConvGeometry.submanifold((3, 3), (1, 1)).offsets
    side = 52
    for number, (row, column) in enumerate(offsets):
        x, y = 10 + side * (column + 1), 10 + side * (row + 1)
        fill = "#f2c14e" if (row, column) == (0, 0) else "#eef1f5"
        parts.append(
            f'<rect x="{x}" y="{y}" width="{side - 3}" height="{side - 3}" rx="4" fill="{fill}"/>'
            f'<text x="{x + 8}" y="{y + 20}">tap {number}</text>'
            f'<text x="{x + 8}" y="{y + 38}" fill="#5b6575">{row}, {column}</text>'
        )
    return _svg(3 * side + 20, 3 * side + 20, parts)


def _svg(width: int, height: int, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="12" fill="#1d2430">\n'
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
