"""Draw the pictures of docs/concepts.md from the engine's own kernel maps.

  python -m scripts.tools.draw_concepts

Writes docs/img/kinds.svg and docs/img/taps.svg. Needs nothing but torch.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tritonspconv import ActiveSites, ConvGeometry, Grid, kernel_map

IMAGES = Path(__file__).parents[2] / "docs" / "img"
SITES = [(0, 1), (1, 1), (1, 2), (2, 4), (3, 4), (4, 5)]
CELL = 26
Cells = list[tuple[int, int]]


def main() -> int:
    """Draw; return the exit status."""
    coords = torch.tensor([(0, *site) for site in SITES], dtype=torch.int32)
    sites = ActiveSites(coords, Grid((0, 0), (6, 6), 1))
    one, two, none = (1, 1), (2, 2), (0, 0)
    down = kernel_map(sites, ConvGeometry(two, two, none, one))
    coarse = down.out_sites
    generative = kernel_map(coarse, ConvGeometry(two, two, none, one, transposed=True))
    panels = [
        ("input", SITES, 6, 6),
        ("submanifold 3x3", SITES, 6, 6),
        ("strided 2x2 / 2", _cells(coarse), 3, 3),
        ("inverse of it", _cells(down.inverse().out_sites), 6, 6),
        ("generative 2x2 / 2", _cells(generative.out_sites), 6, 6),
    ]
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "kinds.svg").write_text(_kinds(panels))
    (IMAGES / "taps.svg").write_text(_taps())
    return 0


def _cells(sites: ActiveSites) -> Cells:
    return [(int(row), int(column)) for _, row, column in sites.coords.tolist()]


def _kinds(panels: list[tuple[str, Cells, int, int]]) -> str:
    parts, x = [], 10
    for title, cells, rows, columns in panels:
        side = CELL * 6 // columns
        parts.append(f'<text x="{x}" y="18">{title}: {len(cells)} sites</text>')
        for row in range(rows):
            for column in range(columns):
                fill = "#2f8fa3" if (row, column) in cells else "#eef1f5"
                parts.append(
                    f'<rect x="{x + side * column}" y="{28 + side * row}" width="{side - 2}" '
                    f'height="{side - 2}" rx="3" fill="{fill}"/>'
                )
        x += CELL * 6 + 30
    return _svg(x, CELL * 6 + 38, parts)


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
