"""Write a profile into one HTML file: a sentence about the bound, bars, and a table."""

from __future__ import annotations

from html import escape
from pathlib import Path

from tritonspconv.profile.layers import LayerProfile, NetworkProfile

_PARTS = (
    ("kernel map", "#f2c14e"),
    ("product", "#2f8fa3"),
    ("norm", "#8f6fc1"),
    ("other", "#97a1b3"),
)
_FONT = 'font-family="system-ui, sans-serif"'
_ABOUT = (
    "Each layer alone, with the device synchronised around it. Bandwidth and rate are shares of a "
    "copy and of a large matrix product on this device; rows that stay in a cache go beyond 100 %."
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem;
  color: #1d2430; background: #fff; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.about { color: #5b6575; } li { margin: .3rem 0; } svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 3px 8px; border-bottom: 1px solid #e4e8ee; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
th { position: sticky; top: 0; background: #fff; }
.wide { overflow-x: auto; } svg text.on { fill: #10151d; }
.key { margin-right: 1.2rem; white-space: nowrap; }
.key i { display: inline-block; width: 11px; height: 11px; margin-right: 5px; border-radius: 2px; }
@media (prefers-color-scheme: dark) { body, th { background: #0f131a; color: #d7dce5; }
  th, td { border-color: #2a3140; } .about { color: #97a1b3; } svg text { fill: #d7dce5; }
  svg text.on { fill: #10151d; } }
"""


def write_profile(
    path: Path, title: str, profile: NetworkProfile, sentences: list[str], rows: list[list[str]]
) -> None:
    """Write the page; its folder is made.

    Args:
        path: The file.
        title: The measurements.
        profile: The numbers.
        sentences: A sentence that says what bounds the network.
        rows: The table, its head first.
    """
    times = f"forward {profile.forward_ms:,.1f} ms, backward {profile.backward_ms:,.1f} ms"
    keys = "".join(
        f'<span class="key"><i style="background:{color}"></i>{name}</span>'
        for name, color in _PARTS
    )
    head, *body = rows
    table = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    table = f"<tr>{table}</tr>" + "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body
    )
    words = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>"
        f'<p class="about">{escape(profile.device)}; a free-running pass: {times}</p>'
        f"<h2>What bounds it</h2><ul>{words}</ul>"
        f"<h2>Where the time goes, forward</h2><p>{keys}</p>{_whole(profile.layers)}"
        f"{_bars(profile.layers)}"
        f'<h2>Layers</h2><p class="about">{_ABOUT}</p>'
        f'<div class="wide"><table>{table}</table></div></body></html>\n',
        encoding="utf-8",
    )


def _whole(layers: list[LayerProfile]) -> str:
    """Return one bar: the shares of all layers together."""
    totals = [sum(parts) for parts in zip(*(p for _, p in _groups(layers)), strict=True)]
    whole = sum(totals) or 1.0
    x, lines = 0.0, []
    for (label, color), ms in zip(_PARTS, totals, strict=True):
        length = ms / whole * 1040
        lines.append(
            f'<rect class="whole" x="{x:.1f}" y="0" width="{length:.1f}" height="26" '
            f'fill="{color}"><title>{label} {ms:.2f} ms</title></rect>'
        )
        if length > 60:
            text = f"{100 * ms / whole:.0f} %"
            lines.append(f'<text class="on" x="{x + 8:.1f}" y="18">{text}</text>')
        x += length
    return f'<svg viewBox="0 0 1040 34" {_FONT} font-size="13">' + "".join(lines) + "</svg>"


def _bars(layers: list[LayerProfile]) -> str:
    """Return a picture of one bar for each sparse layer and the dense modules behind it."""
    groups = _groups(layers)
    longest = max((sum(parts) for _, parts in groups), default=1.0) or 1.0
    height = 18
    # Room for the longest name, at some six units a letter.
    left = 20 + 6.2 * max((len(name) for name, _ in groups), default=0)
    width = 1040 - left - 80
    lines = []
    for number, (name, parts) in enumerate(groups):
        y, x = number * height, float(left)
        lines.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        for (label, color), ms in zip(_PARTS, parts, strict=True):
            length = ms / longest * width
            tip = f"{name}: {label} {ms:.2f} ms"
            lines.append(
                f'<rect x="{x:.1f}" y="{y + 2}" width="{length:.1f}" height="{height - 4}" '
                f'fill="{color}"><title>{escape(tip)}</title></rect>'
            )
            x += length
        lines.append(f'<text x="{x + 5:.1f}" y="{y + 13}">{sum(parts):.2f} ms</text>')
    total = max(1, len(groups)) * height + 4
    return f'<svg viewBox="0 0 1040 {total}" {_FONT} font-size="11">' + "".join(lines) + "</svg>"


def _groups(layers: list[LayerProfile]) -> list[tuple[str, list[float]]]:
    groups: list[tuple[str, list[float]]] = []
    for layer in layers:
        if layer.role == "sparse" or not groups:
            groups.append((layer.name, [0.0] * len(_PARTS)))
        parts = groups[-1][1]
        if layer.role == "sparse":
            parts[0] += layer.map_ms
            parts[1] += layer.product_ms
        else:
            parts[2 if layer.role == "norm" else 3] += layer.ms
    return groups
