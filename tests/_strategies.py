"""Strategies of property tests: geometries, sites that their windows reach, and counts of pairs."""

import math
import os

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.geometry import ConvGeometry

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# The time of brute force grows with rows times taps.
MAX_VOLUME = 125
MAX_ROWS = 24

# Extents by the number of axes. Boxes have few cells, so that rows are neighbours of each other.
_BOX_SIDE = {1: 12, 2: 6, 3: 4, 4: 3, 5: 2}
_WINDOW_SIDE = {1: 6, 2: 4, 3: 4, 4: 3, 5: 3}

# A window is a box of taps, or a list of them, for which no dense layer exists.
BOX_KINDS = ("same, mirrored", "same, not mirrored", "reached", "transposed", "cells")
KINDS = (*BOX_KINDS, "same, taps", "reached, taps", "transposed, taps")


@st.composite
def geometries(draw, ndim: int | None = None, kinds=BOX_KINDS) -> ConvGeometry:
    """Draw a geometry of one of some kinds, with at most `MAX_VOLUME` taps.

    Args:
        draw: Hypothesis's.
        ndim: Number of axes; None: 1 to 5, mostly 3. The interpreter runs kernels of 1 to 4 axes;
            maps of 5 axes are made by the launchers in torch.
        kinds: Members of `KINDS`.
    """
    ndim = ndim or draw(st.sampled_from([3, 2, 1, 3, 4] + [5] * (not INTERPRETED)))
    per_axis = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * ndim))  # noqa: E731
    kind = draw(st.sampled_from(kinds))
    if kind.endswith("taps"):
        return draw(_windows_of_taps(ndim, kind))
    kernel_size = draw(_kernel_sizes(ndim, kind))
    dilation = per_axis(1, 2)
    tap_order = draw(st.sampled_from(["last_axis_fastest", "first_axis_fastest"]))
    if kind.startswith("same"):
        centred = ConvGeometry.submanifold(kernel_size, dilation, tap_order)
        if kind == "same, mirrored" or draw(st.booleans()):
            return centred
        # An even window begins at its row, as in MinkowskiEngine.
        padding = tuple(
            p if k % 2 else 0 for k, p in zip(kernel_size, centred.padding, strict=True)
        )
        return ConvGeometry(
            kernel_size, (1,) * ndim, padding, dilation, sites="same", tap_order=tap_order
        )
    transposed = kind == "transposed"
    # Offsets from one cell before the window to one cell behind it.
    padding = tuple(
        draw(st.integers(-1, d * (k - 1) + 1)) for k, d in zip(kernel_size, dilation, strict=True)
    )
    return ConvGeometry(
        kernel_size,
        per_axis(1, 3),
        padding,
        dilation,
        transposed=transposed,
        sites="cells" if kind == "cells" else "reached",
        tap_order=tap_order,
        output_padding=per_axis(0, 1) if transposed else (),
    )


@st.composite
def _kernel_sizes(draw, ndim: int, kind: str) -> tuple[int, ...]:
    """Draw the extents of a window of at least two taps: all odd, or with an even side.

    "Not mirrored" means that a window is even along one axis.
    """
    sides = st.integers(1, _WINDOW_SIDE[ndim])
    size = list(draw(st.tuples(*[sides] * ndim)))
    longest = draw(st.integers(0, ndim - 1))
    if kind == "same, mirrored":
        size = [2 * (k // 2) + 1 for k in size]
        size[longest] = max(size[longest], 3)
    elif kind == "same, not mirrored":
        size[longest] = draw(st.sampled_from([2, 4] if ndim < 4 else [2]))
    else:
        size[longest] = max(size[longest], 2)
    while math.prod(size) > MAX_VOLUME:
        axis = size.index(max(size))
        size[axis] -= 2
    return tuple(size)


@st.composite
def _windows_of_taps(draw, ndim: int, kind: str) -> ConvGeometry:
    """Draw a window of three to nine taps, in any order, around the row."""
    position = st.tuples(*[st.integers(-1, 1)] * ndim) | st.tuples(*[st.integers(-2, 2)] * ndim)
    taps = draw(st.lists(position, min_size=3, max_size=9, unique=True))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * ndim))
    if kind == "same, taps":
        return ConvGeometry.of_taps(taps, (1,) * ndim, dilation, sites="same")
    stride = draw(st.tuples(*[st.integers(1, 3)] * ndim))
    return ConvGeometry.of_taps(taps, stride, dilation, transposed=kind == "transposed, taps")


@st.composite
def site_sets(draw, ndim: int, bounded: bool | None = None, device="cpu") -> ActiveSites:
    """Draw up to 24 cells of a small box, mostly half of its cells or more, in any order.

    Up to three rows more repeat a cell; in a bounded grid up to two lie outside. Without a bound
    the box lies anywhere around the origin.
    """
    bounded = draw(st.booleans()) if bounded is None else bounded
    sides = st.integers(2, _BOX_SIDE[ndim]) | st.sampled_from([_BOX_SIDE[ndim], 1])
    shape = draw(st.tuples(*[sides] * ndim))
    batch_size = draw(st.integers(1, 2))
    lower = (0,) * ndim if bounded else draw(st.tuples(*[st.integers(-3, 1)] * ndim))
    box = Grid(lower, shape, batch_size)
    most = min(box.num_cells, MAX_ROWS)
    least = draw(st.sampled_from([most // 2, most, most // 2, most // 2, 0]))
    cells = draw(
        st.lists(st.integers(0, box.num_cells - 1), min_size=least, max_size=most, unique=True)
    )
    coords = box.coords(torch.tensor(cells, dtype=torch.int64))
    if cells:
        repeats = draw(st.lists(st.integers(0, len(cells) - 1), max_size=3))
        coords = torch.cat([coords, coords[repeats]])
    grid = None
    if bounded:
        room = draw(st.tuples(*[st.integers(0, 2)] * ndim))
        grid = Grid(lower, tuple(n + r for n, r in zip(shape, room, strict=True)), batch_size)
        coords = torch.cat([coords, draw(_rows_outside(grid))])
    turn = draw(st.integers(0, max(len(coords) - 1, 0)))
    coords = coords.roll(turn, 0)
    return ActiveSites(coords.to(device), grid or Grid.around(coords))


@st.composite
def _rows_outside(draw, grid: Grid) -> Tensor:
    """Draw up to two rows that miss a bounded grid along one axis, the batch included."""
    rows = []
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        row = [0, *grid.lower]
        axis = draw(st.integers(0, grid.ndim))
        ends = (-1, grid.batch_size) if axis == 0 else (-1, grid.shape[axis - 1])
        row[axis] = draw(st.sampled_from(ends))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), 1 + grid.ndim)


def fits(sites: ActiveSites, geometry: ConvGeometry) -> bool:
    """Return whether ``geometry`` can make output sites from ``sites``.

    A bounded grid too small for the window, and a window of taps in a bounded grid, are errors.
    """
    if not sites.grid.bounded or geometry.sites == "same":
        return True
    return not geometry.taps and min(geometry.output_shape(sites.grid.shape)) > 0


@st.composite
def problems(draw, kinds=KINDS, device="cpu") -> tuple[ActiveSites, ConvGeometry]:
    """Draw a geometry, and sites from which it has a kernel map.

    In most examples one row is put where the window around another row's cell sees it.
    """
    geometry = draw(geometries(kinds=kinds))
    bounded = False if geometry.taps and geometry.sites != "same" else None
    sites = draw(site_sets(geometry.ndim, bounded))
    coords, grid = sites.coords, sites.grid
    if not fits(sites, geometry):
        grid = Grid(grid.lower, (24,) * grid.ndim, grid.batch_size)
    if len(coords) and draw(st.integers(0, 3)):
        batch, *cell = coords[draw(st.integers(0, len(coords) - 1))].tolist()
        offset = draw(st.sampled_from([o for o in geometry.offsets if any(o)] or geometry.offsets))
        axes = zip(cell, geometry.stride, offset, strict=True)
        seen = torch.tensor([[batch, *(x // s * s + o for x, s, o in axes)]], dtype=torch.int32)
        if not grid.bounded or grid.contains(seen):
            coords = torch.cat([coords, seen])
            grid = grid if grid.bounded else Grid.around(coords)
    return ActiveSites(coords.to(device), grid), geometry


def a_few(examples: int) -> settings:
    """Return settings for that many examples; a fifth of them where kernels are interpreted."""
    return settings(max_examples=max(examples // 5, 5) if INTERPRETED else examples)


class Share:
    """Counts the examples of a property test that have pairs.

    A property that holds because there are no pairs shows nothing. The property calls `note`, which
    counts. The test then calls `check`, which fails if too few examples had pairs.
    """

    def __init__(self) -> None:
        self.seen = self.real = 0

    def note(self, triples: list[tuple[int, int, int]], same: bool = False) -> None:
        """Count one example; with ``same``, pairs of a row with itself do not count."""
        self.seen += 1
        self.real += any(not same or i != o for i, o, _ in triples)

    def check(self, least: float = 0.2) -> None:
        """Fail if less than the share ``least`` of the examples had pairs.

        The interpreter has time for a few examples only, which may all lack pairs.
        """
        assert self.seen >= (4 if INTERPRETED else 10), f"only {self.seen} examples"
        if INTERPRETED:
            return
        assert self.real >= least * self.seen, f"only {self.real} of {self.seen} have pairs"
