"""The keys of all cells that a set of rows reaches, each once and in order.

A key is a sum of one part for the sample and one for each axis. A block of rows therefore computes
the parts of every step of every axis once, and adds these parts up for every step of the window.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tritonspconv.kernels.index import CellGrid
from tritonspconv.kernels.numba._compile import compiled
from tritonspconv.kernels.numba._sorted_keys import WORD_BITS, box_of, sort_words
from tritonspconv.kernels.window import IntTuple, Window, reach_steps

# A bitmap of the grid is cleared and read at 64 cells a word. It takes less time than a sort of the
# reached cells if it has at most this many words for each of them.
_WORDS_PER_CELL = 8
# Rows of a block; their parts stay in the first cache.
_BLOCK = 512


class Steps(NamedTuple):
    """The steps of a window, made of steps along its axes.

    Attributes:
        offsets: int64 [S], the offsets of the steps along an axis, axis by axis.
        limits: int64 [S], their limits; see :func:`reach_steps`.
        ends: int64 [D + 1], where the steps along each axis begin.
        steps: int64 [K, D], the step along each axis that each step of the window takes.
    """

    offsets: NDArray[np.int64]
    limits: NDArray[np.int64]
    ends: NDArray[np.int64]
    steps: NDArray[np.int64]


@functools.lru_cache(maxsize=512)
def window_steps(offsets: Window, stride: IntTuple, divide: bool) -> Steps:
    """Return the distinct steps from a row to the cells that its window reaches."""
    steps = sorted(set(reach_steps(offsets, stride, divide)))
    axes = [sorted({(o[d], limit[d]) for o, limit in steps}) for d in range(len(stride))]
    ends = np.cumsum([0, *map(len, axes)])
    places = [
        {pair: at for at, pair in enumerate(axis, int(ends[d]))} for d, axis in enumerate(axes)
    ]
    taken = [
        [place[pair] for place, pair in zip(places, zip(*step, strict=True), strict=True)]
        for step in steps
    ]
    offset, limit = np.array([pair for axis in axes for pair in axis], np.int64).T.copy()
    return Steps(offset, limit, ends, np.array(taken, np.int64))


class Reached(NamedTuple):
    """The cells that a set of rows reaches.

    Attributes:
        keys: int64 [M], their keys, ascending.
        reached: int32 [N], the place among them of the cell that each row reaches, or -1. None if
            the window has several steps, or a key and a row together do not fit 63 bits.
    """

    keys: NDArray[np.int64]
    reached: NDArray[np.int32] | None


def reached_keys(
    coords: NDArray[np.int32],
    own_grid: CellGrid,
    steps: Steps,
    stride: IntTuple,
    divide: bool,
    grid: CellGrid,
) -> Reached | None:
    """Return the cells of ``grid`` that rows [N, 1 + D] of ``own_grid`` reach.

    If a row reaches one cell at most, keys are sorted together with their rows. Otherwise, if the
    grid is small, a bitmap of the grid collects the keys; if not, a list collects the keys and is
    sorted. The function returns None if a sum of parts does not fit an int64. A cell that does not
    exist has a large negative part, and such parts count in the sum.
    """
    ndim, cells = len(stride), int(grid.num_cells)
    nowhere = -(2**63 // (ndim + 1))
    if cells > -nowhere:
        return None
    n = coords.shape[0]
    most = n * steps.steps.shape[0]
    key_bits, row_bits = cells.bit_length(), max(n - 1, 0).bit_length()
    is_single = len(steps.steps) == 1 and key_bits + row_bits <= WORD_BITS
    words = -(-cells // 64)
    is_map = not is_single and words <= _WORDS_PER_CELL * most
    bitmap = np.zeros(words if is_map else 0, np.uint64)
    # The additional entry receives the writes for cells that do not exist.
    listed = np.empty(0 if is_map else most + 1, np.int64)
    shifts = [step.bit_length() - 1 if step & (step - 1) == 0 else -1 for step in stride]
    batch_size = min(own_grid.batch_size, grid.batch_size)
    count = _reach(
        coords, batch_size, *box_of(own_grid), *box_of(grid), np.array(stride), np.array(shifts),
        divide, *steps, nowhere, is_single, bitmap, listed,
    )  # fmt: skip
    if is_single:
        return _numbered(listed[:n], row_bits, key_bits)
    if is_map:
        keys = np.empty(_count_bits(bitmap), np.int64)
        _list_bits(bitmap, keys)
        return Reached(keys, None)
    return Reached(_distinct(sort_words(listed[:count], 0, key_bits)), None)


def _numbered(listed: NDArray[np.int64], row_bits: int, key_bits: int) -> Reached:
    """Return the distinct keys of ``listed`` [N], and the place of each row's key among them.

    Args:
        listed: A key for each row, negative where the row reaches nothing.
        row_bits: Bits of a row.
        key_bits: Bits of a key.
    """
    words, reached = np.empty(listed.shape[0], np.int64), np.empty(listed.shape[0], np.int32)
    count, ascend = _write_words(listed, row_bits, words, reached)
    words = words[:count] if ascend else sort_words(words[:count], row_bits, key_bits)
    keys = np.empty(count, np.int64)
    return Reached(keys[: _number_words(words, row_bits, keys, reached)], reached)


@compiled
def _write_words(listed, row_bits, words, reached):
    """Write ``key << row_bits | row`` of rows that have a key; return their number, and if sorted.

    Write -1 to all of ``reached``.
    """
    count, ascend, before = 0, True, np.int64(-1)
    for row in range(listed.shape[0]):
        reached[row] = -1
        if listed[row] >= 0:
            word = listed[row] << row_bits | row
            ascend &= before < word
            before = word
            words[count] = word
            count += 1
    return count, ascend


@compiled
def _number_words(words, row_bits, keys, reached):
    """Write distinct keys and, for each row, the place of its key; return the number of keys."""
    mask = np.int64((1 << row_bits) - 1)
    count, before = 0, np.int64(-1)
    for word in words:
        key = word >> row_bits
        count += key != before
        before = key
        keys[count - 1] = key
        reached[word & mask] = count - 1
    return count


@compiled
def _reach(
    coords, batch_size, own_lower, own_shape, lower, shape, stride, shift, divide,
    offsets, limits, ends, steps, nowhere, every, bitmap, listed,
):  # fmt: skip
    """Set the bits of reached cells, or list their keys; return the number of listed ones.

    With ``every``, what does not exist is listed too, as a negative number.
    A part is ``nowhere`` if there is no cell: any sum with such a part is negative. The loops over
    the rows of a block have no branches, because a processor could not predict them.
    """
    ndim = shape.shape[0]
    samples, sums = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.int64)
    parts = np.empty((offsets.shape[0], _BLOCK), np.int64)
    count = 0
    for first in range(0, coords.shape[0], _BLOCK):
        rows = coords[first : first + _BLOCK]
        size = rows.shape[0]
        unit = np.int64(1)
        for axis in range(ndim - 1, -1, -1):
            for at in range(ends[axis], ends[axis + 1]):
                _axis_parts(
                    rows[:, 1 + axis], offsets[at], limits[at], stride[axis], shift[axis], divide,
                    lower[axis], shape[axis], unit, nowhere, parts[at],
                )  # fmt: skip
            unit *= shape[axis]
        _sample_parts(rows, batch_size, own_lower, own_shape, unit, nowhere, samples)
        for number in range(steps.shape[0]):
            for i in range(size):
                sums[i] = samples[i]
            for axis in range(ndim):
                part = parts[steps[number, axis]]
                for i in range(size):
                    sums[i] += part[i]
            if bitmap.shape[0]:
                for i in range(size):
                    key = max(sums[i], 0)
                    bitmap[key >> 6] |= np.uint64(sums[i] >= 0) << np.uint64(key & 63)
            else:
                for i in range(size):
                    listed[count] = sums[i]
                    count += every | (sums[i] >= 0)
    return count


@compiled
def _sample_parts(rows, batch_size, own_lower, own_shape, unit, nowhere, parts):
    """Write the part of each row's sample; ``nowhere`` for rows outside their own grid."""
    for i in range(rows.shape[0]):
        inside = 0 <= rows[i, 0] < batch_size
        for axis in range(own_lower.shape[0]):
            inside &= 0 <= rows[i, 1 + axis] - own_lower[axis] < own_shape[axis]
        parts[i] = rows[i, 0] * unit if inside else nowhere


@compiled
def _axis_parts(
    cells, offset, limit, stride, power, divide, lower, extent, unit, nowhere, parts
):  # fmt: skip
    """Take a step along an axis from each of ``cells`` and write the part of the cell reached."""
    if not divide:
        for i in range(cells.shape[0]):
            target = cells[i] * stride + offset - lower
            parts[i] = target * unit if 0 <= target < extent else nowhere
    elif power >= 0:
        # The stride is a power of two, so shift: a division takes as long as all other work.
        for i in range(cells.shape[0]):
            moved = cells[i] - offset
            target = (moved >> power) - lower
            exists = ((moved & (stride - 1)) < limit) & (0 <= target < extent)
            parts[i] = target * unit if exists else nowhere
    else:
        for i in range(cells.shape[0]):
            moved = cells[i] - offset
            quotient = moved // stride
            target = quotient - lower
            exists = (moved - quotient * stride < limit) & (0 <= target < extent)
            parts[i] = target * unit if exists else nowhere


@compiled
def _bits_of(word):
    """Return how many bits are set: the compiler makes one instruction of this loop."""
    count = 0
    while word:
        word &= word - np.uint64(1)
        count += 1
    return count


@compiled
def _count_bits(bitmap):
    """Return how many bits are set in all words."""
    count = 0
    for word in bitmap:
        count += _bits_of(word)
    return count


@compiled
def _list_bits(bitmap, keys):
    """Write the places of all bits that are set, ascending."""
    count = 0
    for number in range(bitmap.shape[0]):
        word = bitmap[number]
        while word:
            rest = word & (word - np.uint64(1))
            keys[count] = (number << 6) + _bits_of((word ^ rest) - np.uint64(1))
            count += 1
            word = rest


@compiled
def _distinct(keys):
    """Return sorted keys without repeats."""
    kept = np.empty_like(keys)
    count = 0
    before = np.int64(-1)
    for key in keys:
        # A key that equals the key before overwrites it.
        count += key != before
        before = key
        kept[count - 1] = key
    return kept[:count].copy()


def coords_of(keys: NDArray[np.int64], grid: CellGrid, rows: int) -> NDArray[np.int32]:
    """Return int32 [rows, 1 + D], the coordinates of ascending keys, then rows of -1."""
    coords = np.full((rows, 1 + len(grid.shape)), -1, np.int32)
    _write_coords(keys, *box_of(grid), coords)
    return coords


@compiled
def _write_coords(keys, lower, shape, coords):
    """Write the coordinates of ``keys``; the rows of one line share all but the last."""
    last = shape.shape[0] - 1
    line = np.int64(-1)
    for row in range(keys.shape[0]):
        key = keys[row]
        if line < 0 or key >= line + shape[last]:
            rest = key // shape[last]
            line = rest * shape[last]
            for axis in range(last - 1, -1, -1):
                quotient = rest // shape[axis]
                coords[row, 1 + axis] = rest - quotient * shape[axis] + lower[axis]
                rest = quotient
            coords[row, 0] = rest
        else:
            for axis in range(1 + last):
                coords[row, axis] = coords[row - 1, axis]
        coords[row, 1 + last] = key - line + lower[last]
