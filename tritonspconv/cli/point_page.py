"""Write point clouds into one HTML file that a browser shows without anything else."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor

# Colours of heights from low to high; the palette of the pictures.
_HEIGHTS = (
    (39, 64, 139),
    (31, 122, 140),
    (63, 182, 139),
    (242, 193, 78),
    (242, 120, 75),
    (242, 95, 138),
)


@dataclass(frozen=True)
class Cloud:
    """Points that the page shows together.

    Attributes:
        name: The label of its button.
        places: float32 ``[N, 3]``: x, y, z in metres; N >= 1.
        colors: uint8 ``[N, 3]``: red, green, blue.
        side: Side of a point in metres; 0: two pixels.
        heights: Heights in metres of the first and the last colour; None if the colours are others.
    """

    name: str
    places: Tensor
    colors: Tensor
    side: float
    heights: tuple[float, float] | None = None


def height_range(heights: Tensor) -> tuple[float, float]:
    """Return the heights of the first and the last colour: the 2nd and the 98th percentile."""
    ordered = heights.sort().values
    return float(ordered[len(ordered) // 50]), float(ordered[-1 - len(ordered) // 50])


def height_colors(heights: Tensor) -> Tensor:
    """Return uint8 ``[N, 3]``: the colour of each height, over the range of `height_range`."""
    low, high = height_range(heights)
    palette = torch.tensor(_HEIGHTS, dtype=torch.float32)
    at = ((heights - low) / max(high - low, 1e-3)).clamp(0, 1) * (len(palette) - 1)
    first = at.long().clamp(max=len(palette) - 2)
    part = (at - first)[:, None]
    return ((1 - part) * palette[first] + part * palette[first + 1]).round().to(torch.uint8)


def write_page(path: Path, title: str, clouds: list[Cloud]) -> None:
    """Write the page.

    Coordinates are rounded to 1/65535 of the box around all clouds.

    Args:
        path: The file; its folder is made.
        title: A line over the picture.
        clouds: The choices of the buttons; the first is shown first.
    """
    every = torch.cat([cloud.places for cloud in clouds])
    low, high = every.amin(dim=0), every.amax(dim=0)
    extent = float((high - low).amax().clamp(min=1e-3))
    content = []
    for cloud in clouds:
        cells = ((cloud.places - low) / extent * 65535).round().clamp(0, 65535).int()
        # Little-endian pairs of bytes: browsers and torch agree on it on all usual machines.
        places = torch.stack([cells & 255, cells >> 8], dim=-1).to(torch.uint8)
        content.append(
            {
                "name": cloud.name,
                "side": cloud.side / extent,
                "places": _encoded(places),
                "colors": _encoded(cloud.colors),
                "heights": cloud.heights,
            }
        )
    size = ((high - low) / extent).tolist()
    data = json.dumps({"clouds": content, "size": size, "metres": extent}).replace("<", "\\u003c")
    path.parent.mkdir(parents=True, exist_ok=True)
    stops = ", ".join(f"rgb{color}" for color in _HEIGHTS)
    page = _PAGE.replace("{stops}", stops).replace("{title}", escape(title))
    page = page.replace("{data}", data)
    path.write_text(page, encoding="utf-8")


def _encoded(values: Tensor) -> str:
    return base64.b64encode(bytes(values.contiguous().flatten().tolist())).decode("ascii")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
html, body { margin: 0; height: 100%; background: #0b0e14; color: #d7dce5; overflow: hidden;
  font: 14px system-ui, sans-serif; }
canvas { width: 100%; height: 100%; display: block; cursor: grab; touch-action: none; }
header { position: fixed; top: 12px; left: 16px; right: 16px; pointer-events: none; }
h1 { font-size: 16px; font-weight: 600; margin: 0 0 8px; }
button { pointer-events: auto; background: #1a2130; color: inherit; border: 1px solid #2a3140;
  border-radius: 6px; padding: 5px 10px; margin: 0 6px 6px 0; cursor: pointer; font: inherit; }
button[aria-pressed=true] { background: #2f6f80; border-color: #3fb68b; }
footer, #heights { position: fixed; bottom: 10px; color: #aab3c3; pointer-events: none;
  background: #0b0e14d0; border-radius: 6px; padding: 4px 8px; }
footer { left: 8px; }
#heights { right: 8px; }
#heights i { display: inline-block; width: 90px; height: 10px; margin: 0 6px; border-radius: 2px;
  background: linear-gradient(to right, {stops}); }
.touch { display: none; }
@media (pointer: coarse) { .touch { display: inline; } .mouse { display: none; } }
@media (max-width: 40rem) { button { padding: 3px 8px; font-size: 12px; }
  #heights { bottom: 44px; left: 8px; right: auto; } }
</style></head><body>
<canvas></canvas>
<header><h1>{title}</h1><div id="buttons"></div></header>
<div id="heights" hidden>height (z) <span></span><i></i><span></span></div>
<footer><span class="mouse">drag: turn &middot; shift and drag: move &middot; wheel: nearer
&middot; double click: whole scan</span><span class="touch">a finger: turn &middot; two fingers:
move, nearer &middot; double tap: whole scan</span></footer>
<script>
"use strict";
const data = {data};
const canvas = document.querySelector("canvas");
const gl = canvas.getContext("webgl", {antialias: true, preserveDrawingBuffer: true});
if (!gl) {
  document.querySelector("footer").textContent =
    "This browser has no WebGL. Write a picture instead: tritonspconv view SCAN --out scan.png";
  throw Error("no WebGL");
}
const shader = (kind, text) => {
  const made = gl.createShader(kind);
  gl.shaderSource(made, text);
  gl.compileShader(made);
  if (!gl.getShaderParameter(made, gl.COMPILE_STATUS)) throw gl.getShaderInfoLog(made);
  return made;
};
const program = gl.createProgram();
gl.attachShader(program, shader(gl.VERTEX_SHADER, `
  attribute vec3 place; attribute vec3 color; varying vec3 shade;
  uniform mat4 view; uniform float side; uniform float height;
  void main() {
    gl_Position = view * vec4(place, 1.0);
    gl_PointSize = side > 0.0 ? clamp(1.15 * side * height / gl_Position.w, 1.5, 60.0) : 2.0;
    shade = color;
  }`));
gl.attachShader(program, shader(gl.FRAGMENT_SHADER, `
  precision mediump float; varying vec3 shade;
  void main() { gl_FragColor = vec4(shade, 1.0); }`));
gl.linkProgram(program);
gl.useProgram(program);
gl.enable(gl.DEPTH_TEST);
gl.clearColor(0.043, 0.055, 0.078, 1);
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const buffer = values => {
  const made = gl.createBuffer();
  gl.bindBuffer(gl.ARRAY_BUFFER, made);
  gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
  return made;
};
for (const cloud of data.clouds) {
  cloud.places = new Uint16Array(bytes(cloud.places).buffer);
  cloud.count = cloud.places.length / 3;
  cloud.placeBuffer = buffer(cloud.places);
  cloud.colorBuffer = buffer(bytes(cloud.colors));
}
let shown = data.clouds[0], yaw, pitch, far, isWhole, middle;
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
// Directions of the screen: to the right, up, and towards the viewer.
const directions = () => {
  const [cy, sy, cp, sp] = [Math.cos(yaw), Math.sin(yaw), Math.cos(pitch), Math.sin(pitch)];
  return [[-sy, cy, 0], [-cy * sp, -sy * sp, cp], [cy * cp, sy * cp, sp]];
};
const zoom = 1.8;
const fit = () => {
  [yaw, pitch, isWhole] = [2.8, 0.6, true];
  const {places, count} = data.clouds[0], step = 3 * Math.ceil(count / 4000);
  const sample = [];
  for (let at = 0; at < 3 * count; at += step)
    sample.push([0, 1, 2].map(axis => places[at + axis] / 65535));
  // A few points far from all others do not count.
  const near = (values, part) => values.sort((a, b) => a - b)[Math.floor(part * values.length)];
  const all = axis => sample.map(place => place[axis]);
  middle = [0, 1, 2].map(axis => (near(all(axis), 0.02) + near(all(axis), 0.98)) / 2);
  const [right, up, back] = directions();
  const [wide, tall] = [zoom * innerHeight / innerWidth / 0.95, zoom / 0.8];
  far = near(sample.map(place => {
    const from = place.map((value, axis) => value - middle[axis]);
    const [x, y] = [Math.abs(dot(right, from)), Math.abs(dot(up, from))];
    return dot(back, from) + Math.max(wide * x, tall * y);
  }), 0.98) + 0.01;
};
const draw = () => {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = innerWidth * ratio;
  canvas.height = innerHeight * ratio;
  gl.viewport(0, 0, canvas.width, canvas.height);
  const [right, up, back] = directions();
  const near = 0.001, end = 20, f = zoom, w = f * canvas.height / canvas.width;
  const a = (end + near) / (near - end), b = 2 * end * near / (near - end);
  const [tx, ty, tz] = [-dot(right, middle), -dot(up, middle), -dot(back, middle) - far];
  const view = [];
  for (let axis = 0; axis < 3; axis++)
    view.push(w * right[axis], f * up[axis], a * back[axis], -back[axis]);
  view.push(w * tx, f * ty, a * tz + b, -tz);
  gl.uniformMatrix4fv(gl.getUniformLocation(program, "view"), false, view);
  gl.uniform1f(gl.getUniformLocation(program, "side"), shown.side);
  gl.uniform1f(gl.getUniformLocation(program, "height"), f * canvas.height / 2);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  const bind = (name, from, type) => {
    const at = gl.getAttribLocation(program, name);
    gl.bindBuffer(gl.ARRAY_BUFFER, from);
    gl.enableVertexAttribArray(at);
    gl.vertexAttribPointer(at, 3, type, true, 0, 0);
  };
  bind("place", shown.placeBuffer, gl.UNSIGNED_SHORT);
  bind("color", shown.colorBuffer, gl.UNSIGNED_BYTE);
  gl.drawArrays(gl.POINTS, 0, shown.count);
  const legend = document.getElementById("heights");
  legend.hidden = !shown.heights;
  if (shown.heights)
    legend.querySelectorAll("span").forEach((span, number) => {
      span.textContent = shown.heights[number].toFixed(1) + " m";
    });
};
for (const cloud of data.clouds) {
  const button = document.createElement("button");
  button.textContent = cloud.name;
  button.setAttribute("aria-pressed", cloud === shown);
  button.onclick = () => {
    shown = cloud;
    for (const other of document.querySelectorAll("button"))
      other.setAttribute("aria-pressed", other === button);
    draw();
  };
  document.getElementById("buttons").append(button);
}
const move = (dx, dy) => {
  middle[0] += far * (Math.sin(yaw) * dx - Math.cos(yaw) * dy);
  middle[1] -= far * (Math.cos(yaw) * dx + Math.sin(yaw) * dy);
};
const approach = factor => { far = Math.min(8, Math.max(0.02, far * factor)); };
const fingers = new Map();
const spread = () => {
  const [a, b] = fingers.values();
  return Math.max(1, Math.hypot(a.x - b.x, a.y - b.y));
};
canvas.onpointerdown = event => {
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, {x: event.clientX, y: event.clientY});
};
canvas.onpointerup = canvas.onpointercancel = event => fingers.delete(event.pointerId);
canvas.onpointermove = event => {
  const last = fingers.get(event.pointerId);
  if (!last) return;
  const before = fingers.size === 2 ? spread() : 0;
  const dx = (event.clientX - last.x) / innerHeight, dy = (event.clientY - last.y) / innerHeight;
  [last.x, last.y] = [event.clientX, event.clientY];
  isWhole = false;
  if (fingers.size === 2) {
    move(dx / 2, dy / 2);
    approach(before / spread());
  } else if (event.shiftKey) {
    move(dx, dy);
  } else {
    yaw -= 3 * dx;
    pitch = Math.min(1.57, Math.max(-0.3, pitch + 3 * dy));
  }
  draw();
};
canvas.onwheel = event => {
  isWhole = false;
  approach(Math.exp(event.deltaY / 900));
  draw();
  event.preventDefault();
};
canvas.ondblclick = () => { fit(); draw(); };
addEventListener("resize", () => { if (isWhole) fit(); draw(); });
fit();
draw();
</script></body></html>
"""
