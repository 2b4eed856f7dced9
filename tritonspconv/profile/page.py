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
_ABOUT = (
    "Each layer alone, with the device synchronised around it. Bandwidth and rate are shares of a "
    "copy and of a large matrix product on this device; rows that stay in a cache go beyond 100 %."
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #1d2430; background: #fff; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.about { color: #5b6575; } li { margin: .3rem 0; }
table { border-collapse: collapse; width: 100%; font-size: 13px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 3px 8px; border-bottom: 1px solid #e4e8ee; }
td { white-space: nowrap; } .minor td { color: #5b6575; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
.wide { overflow-x: auto; }
.key { margin-right: 1.2rem; white-space: nowrap; }
.key i { display: inline-block; width: 11px; height: 11px; margin-right: 5px; border-radius: 2px; }
.bars { display: grid; grid-template-columns: fit-content(22rem) 1fr auto; gap: 3px 8px;
  align-items: center; font-size: 12px; line-height: 16px; }
.name { text-align: right; } .ms { text-align: right; font-variant-numeric: tabular-nums; }
.bar, .whole { display: flex; height: 14px; } .whole { height: 26px; margin-bottom: 1rem; }
.whole i { font: 13px/26px system-ui, sans-serif; color: #10151d; text-indent: 6px;
  overflow: hidden; white-space: nowrap; }
@media (max-width: 40rem) { .bars { grid-template-columns: 1fr auto; }
  .name { grid-column: 1 / -1; text-align: left; margin-top: 4px; } }
@media (prefers-color-scheme: dark) { body { background: #0f131a; color: #d7dce5; }
  th, td { border-color: #2a3140; } .about, .minor td { color: #97a1b3; } }
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
        rows: The table, its head first; then one row for each layer of the profile.
    """
    facts = [profile.device, f"forward {profile.forward_ms:,.1f} ms"]
    if profile.backward_ms:
        facts.append(f"backward {profile.backward_ms:,.1f} ms")
    if profile.peak_bytes:
        facts.append(f"peak memory {profile.peak_bytes / 2**20:,.0f} MiB")
    keys = "".join(
        f'<span class="key"><i style="background:{color}"></i>{name}</span>'
        for name, color in _PARTS
    )
    words = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>"
        f'<p class="about">{escape(", ".join(facts))}</p>'
        f"<h2>What bounds it</h2><ul>{words}</ul>"
        f"<h2>Where the time of the forward pass goes</h2><p>{keys}</p>{_whole(profile.layers)}"
        f"{_bars(profile.layers)}"
        f'<h2>Layers</h2><p class="about">{_ABOUT}</p>'
        f'<div class="wide">{_table(profile.layers, rows)}</div></body></html>\n',
        encoding="utf-8",
    )


def _table(layers: list[LayerProfile], rows: list[list[str]]) -> str:
    """Return the table; rows of layers that are not sparse are paler."""
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for layer, row in zip(layers, body, strict=True):
        start = "<tr>" if layer.role == "sparse" else '<tr class="minor">'
        lines.append(start + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _whole(layers: list[LayerProfile]) -> str:
    """Return one bar: the shares of all layers together."""
    totals = [sum(parts) for parts in zip(*(p for _, p in _groups(layers)), strict=True)]
    whole = sum(totals) or 1.0
    lines = []
    for (label, color), ms in zip(_PARTS, totals, strict=True):
        share = 100 * ms / whole
        text = f"{share:.0f} %" if share > 9 else ""
        lines.append(_segment(share, color, f"{label} {ms:.2f} ms", text))
    return f'<div class="whole">{"".join(lines)}</div>'


def _bars(layers: list[LayerProfile]) -> str:
    """Return one bar for each sparse layer and the dense modules behind it."""
    groups = _groups(layers)
    longest = max((sum(parts) for _, parts in groups), default=1.0) or 1.0
    lines = []
    for name, parts in groups:
        segments = "".join(
            _segment(100 * ms / longest, color, f"{name}: {label} {ms:.2f} ms")
            for (label, color), ms in zip(_PARTS, parts, strict=True)
        )
        lines.append(
            f'<span class="name">{escape(name)}</span><span class="bar">{segments}</span>'
            f'<span class="ms">{sum(parts):.2f} ms</span>'
        )
    return f'<div class="bars">{"".join(lines)}</div>'


def _segment(share: float, color: str, tip: str, text: str = "") -> str:
    return f'<i style="width:{share:.2f}%;background:{color}" title="{escape(tip)}">{text}</i>'


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
