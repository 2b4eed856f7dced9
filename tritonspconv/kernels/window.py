"""Which of a window's taps must be tried to find everything that a site reaches."""

from __future__ import annotations

import functools
import itertools
import math

IntTuple = tuple[int, ...]


@functools.lru_cache(maxsize=512)
def reach_steps(
    offsets: tuple[IntTuple, ...], stride: IntTuple, divide: bool
) -> tuple[tuple[IntTuple, IntTuple], ...]:
    """Return ``(offset, limit)`` pairs that reach what all taps reach.

    Dividing, a fine site reaches ``floor((fine - offset) / stride)`` if the remainder is below
    ``limit`` on every axis. A tap is ``limit = 1``. In a window without gaps, taps that differ by
    less than a stride are alternatives, of which at most one divides without remainder: one step
    stands for all of them. A 3x3x3 window of stride 2 then takes 8 steps, not 27.

    Args:
        offsets: V tap offsets.
        stride: Fine sites per coarse site.
        divide: True when the sites are fine; False: every tap is a step.
    """
    ndim = len(stride)
    spans = [(min(o[d] for o in offsets), max(o[d] for o in offsets) + 1) for d in range(ndim)]
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


def window_corner(offsets: tuple[IntTuple, ...]) -> IntTuple:
    """Return the smallest offset of a window on every axis."""
    return tuple(map(min, zip(*offsets, strict=True)))


@functools.lru_cache(maxsize=512)
def tap_steps(offsets: tuple[IntTuple, ...]) -> IntTuple:
    """Return for each axis how far apart taps stand whose offsets differ there by one; or 0."""
    corner = window_corner(offsets)
    places = {offset: v for v, offset in enumerate(offsets)}
    nexts = [(*corner[:d], x + 1, *corner[d + 1 :]) for d, x in enumerate(corner)]
    return tuple(places.get(offset, 0) for offset in nexts)
