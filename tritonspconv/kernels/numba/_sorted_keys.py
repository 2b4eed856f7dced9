"""Keys of coordinates, sorted by radix together with their rows."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from tritonspconv.kernels.index import CellGrid
from tritonspconv.kernels.numba._compile import compiled

# A pass sorts by this many bits at most: its counters stay in the first cache.
_MOST_BITS = 11
# Bits of a word that is not negative.
WORD_BITS = 63


@functools.lru_cache(maxsize=1024)
def box_of(grid: CellGrid) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the lower corner and the shape of a grid, int64 [D] each; do not write to them."""
    return np.array(grid.lower, np.int64), np.array(grid.shape, np.int64)


def sorted_keys(
    coords: NDArray[np.int32], grid: CellGrid
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Return the keys of ``coords`` [N, 1 + D] in ascending order, and the row of each.

    Returns:
        int64 [N], the keys, ``grid.num_cells`` for rows outside the grid; and int64 [N], the rows,
        which ascend where keys are equal. None if a key and a row together do not fit 63 bits.
    """
    n = coords.shape[0]
    key_bits, row_bits = int(grid.num_cells).bit_length(), max(n - 1, 0).bit_length()
    if key_bits + row_bits > WORD_BITS:
        return None
    words = np.empty(n, np.int64)
    if not _write_words(coords, *box_of(grid), grid.batch_size, grid.num_cells, row_bits, words):
        words = sort_words(words, row_bits, key_bits)
    keys, rows = np.empty(n, np.int64), np.empty(n, np.int64)
    _split_words(words, row_bits, keys, rows)
    return keys, rows


def sort_words(words: NDArray[np.int64], first_bit: int, bits: int) -> NDArray[np.int64]:
    """Return ``words`` [N] stably sorted by ``bits`` bits from ``first_bit`` on, in new memory."""
    passes = max(-(-bits // _MOST_BITS), 1)
    return _sort_words(words.copy(), first_bit, passes, -(-bits // passes))


@compiled
def _write_words(coords, lower, shape, batch_size, num_cells, row_bits, words):
    """Write ``key << row_bits | row`` of every row; return whether the words ascend."""
    n, ndim = coords.shape[0], lower.shape[0]
    ascend = True
    before = np.int64(-1)
    for row in range(n):
        key = np.int64(coords[row, 0])
        inside = 0 <= key < batch_size
        for axis in range(ndim):
            cell = np.int64(coords[row, 1 + axis]) - lower[axis]
            inside &= 0 <= cell < shape[axis]
            key = key * shape[axis] + cell
        word = (key if inside else num_cells) << row_bits | row
        ascend &= before < word
        before = word
        words[row] = word
    return ascend


@compiled
def _sort_words(words, first_bit, passes, bits):
    """Return ``words`` stably sorted by ``passes * bits`` bits from ``first_bit`` on."""
    n = words.shape[0]
    other = np.empty_like(words)
    mask = np.int64((1 << bits) - 1)
    for turn in range(passes):
        shift = first_bit + turn * bits
        starts = np.zeros((1 << bits) + 1, np.int64)
        for i in range(n):
            starts[(words[i] >> shift & mask) + 1] += 1
        for digit in range(1 << bits):
            starts[digit + 1] += starts[digit]
        for i in range(n):
            digit = words[i] >> shift & mask
            other[starts[digit]] = words[i]
            starts[digit] += 1
        words, other = other, words
    return words


@compiled
def _split_words(words, row_bits, keys, rows):
    """Undo the packing of :func:`_write_words`."""
    mask = np.int64((1 << row_bits) - 1)
    for i in range(words.shape[0]):
        keys[i] = words[i] >> row_bits
        rows[i] = words[i] & mask
