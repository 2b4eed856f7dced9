"""The steps of a window: the offsets to try in order to find every site that a site reaches."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

IntTuple = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A window without gaps, given by two corners instead of by all its offsets.

    The corners of a window of a thousand offsets an axis take no memory; the offsets would.

    Attributes:
        first: The smallest offset on every axis.
        last: The largest offset on every axis.
    """

    first: IntTuple
    last: IntTuple

    def __iter__(self) -> Iterator[IntTuple]:
        """Yield the two corners, which have the minima and maxima of all offsets."""
        yield self.first
        yield self.last


# The offsets of a window: all of them in the order of its taps, or its corners.
Window = tuple[IntTuple, ...] | Box


@functools.lru_cache(maxsize=512)
def reach_steps(
    offsets: Window, stride: IntTuple, divide: bool
) -> tuple[tuple[IntTuple, IntTuple], ...]:
    """Return ``(offset, limit)`` pairs that reach the same sites as all taps together.

    With ``divide``, a fine site reaches ``floor((fine - offset) / stride)`` if the remainder is
    below ``limit`` on every axis. A single tap has ``limit = 1``. In a window without gaps,
    consider the taps that differ by less than a stride. At most one of these taps divides without
    remainder, so one step replaces all of them. A 3x3x3 window of stride 2 takes 8 steps instead of
    27.

    Args:
        offsets: V tap offsets, or the corners of the window where ``divide`` is True.
        stride: Fine sites per coarse site.
        divide: True when the sites are fine; False: every tap is a step.
    """
    ndim = len(stride)
    spans = [(min(o[d] for o in offsets), max(o[d] for o in offsets) + 1) for d in range(ndim)]
    if not isinstance(offsets, Box):
        has_gaps = math.prod(stop - start for start, stop in spans) != len(set(offsets))
        if has_gaps or not divide:
            return tuple((offset, (1,) * ndim) for offset in offsets)
    axes = [
        [(start, min(step, stop - start)) for start in range(first, stop, step)]
        for (first, stop), step in zip(spans, stride, strict=True)
    ]
    return tuple(
        (tuple(start for start, _ in steps), tuple(limit for _, limit in steps))
        for steps in itertools.product(*axes)
    )


def window_corner(offsets: Window) -> IntTuple:
    """Return the smallest offset of a window on every axis."""
    return tuple(map(min, zip(*offsets, strict=True)))


@functools.lru_cache(maxsize=512)
def tap_steps(offsets: tuple[IntTuple, ...]) -> IntTuple:
    """Return for each axis by how much the tap's number grows with its offset; 0 for one tap."""
    corner = window_corner(offsets)
    places = {offset: v for v, offset in enumerate(offsets)}
    nexts = [(*corner[:d], x + 1, *corner[d + 1 :]) for d, x in enumerate(corner)]
    return tuple(places.get(offset, 0) for offset in nexts)
