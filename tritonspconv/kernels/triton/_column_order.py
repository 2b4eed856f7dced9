"""The order of a table's columns: similar masks side by side, so that tiles skip taps."""

from __future__ import annotations

import functools
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.triton._grid import Offsets

_KEY_BITS: tl.constexpr = tl.constexpr(16)
# The groups of 3x3x3 windows, from the key's highest bit on. Each group is a box: a range of taps
# on each axis, the slowest axis of the tap's number first. `scripts/tools/search_column_groups.py`
# found them.
CUBE_GROUPS = (
    ("+", "*", "*"),
    ("*", "-", "0"),
    ("*", "0", "+"),
    ("-", "*", "*"),
    ("0", "*", "*"),
    ("*", "+", "+"),
    ("*", "-", "-"),
    ("*", "+", "-"),
    ("0+", "-", "+"),
    ("-0", "+", "0"),
    ("-0", "0", "-"),
    ("-", "-", "+"),
    ("+", "0", "-"),
    ("+", "+", "0"),
    ("-", "0", "0"),
    ("+", "0", "0"),
)
AXIS_RANGES: dict[str, tuple[int, ...]] = {
    "-": (0,),
    "0": (1,),
    "+": (2,),
    "-0": (0, 1),
    "0+": (1, 2),
    "*": (0, 1, 2),
}
# Below this many rows, the host needs longer for a sort than the GPU for the taps that it saves.
MIN_ROWS_TO_ORDER = 131072


@triton.jit
def sort_key(mask, groups_ptr):
    """Return the int16 key of int32 masks; masks with similar keys have similar taps.

    Bit g is set where a tap of group g is present; rare groups come first. The bits are read as a
    Gray code, so neighbours in the order differ in few groups.
    """
    key = tl.zeros_like(mask)
    for g in tl.static_range(_KEY_BITS):
        group = tl.load(groups_ptr + g)
        key = (key << 1) | ((mask & group) != 0).to(tl.int32)
    key = key ^ (key >> 8)
    key = key ^ (key >> 4)
    key = key ^ (key >> 2)
    key = key ^ (key >> 1)
    return (key - 2**15).to(tl.int16)


def box_mask(box: tuple[str, str, str]) -> int:
    """Return the mask of the taps of a 3x3x3 window that lie in one of ``CUBE_GROUPS``."""
    taps = itertools.product(*(AXIS_RANGES[axis] for axis in box))
    return sum(1 << (9 * slow + 3 * middle + fast) for slow, middle, fast in taps)


def _is_cube(offsets: Offsets) -> bool:
    """Return whether taps fill a box of 3x3x3, in the order of the axes or in the opposite one."""
    if len(offsets) != 27 or len(offsets[0]) != 3:
        return False
    axes = [sorted(set(axis)) for axis in zip(*offsets, strict=True)]
    last_fastest = tuple(itertools.product(*axes))
    first_fastest = tuple(offset[::-1] for offset in itertools.product(*axes[::-1]))
    return offsets in (last_fastest, first_fastest)


@functools.lru_cache(maxsize=512)
def tap_groups(offsets: Offsets, device: torch.device) -> Tensor:
    """Return the masks of the groups of taps, int32, rare groups first.

    Each of up to 16 taps is a group. A 3x3x3 window has ``CUBE_GROUPS``. Other windows have lines
    of taps along the middle axis and along the first axis, corners before edges: a surface runs
    along a line, so the taps of a line occur together.
    """
    if _is_cube(offsets):
        masks = [box_mask(box) for box in CUBE_GROUPS]
        return torch.tensor(masks, dtype=torch.int32, device=device)
    ndim, bits = len(offsets[0]), _KEY_BITS.value
    middle = [sum(o[d] for o in offsets) / len(offsets) for d in range(ndim)]
    everything = range(ndim)

    def lines(axes: tuple[int, ...]) -> list[int]:
        """Return the masks of taps that agree on ``axes``; masks far from the middle come first."""
        masks: dict[tuple[int, ...], int] = {}
        for v, offset in enumerate(offsets):
            place = tuple(offset[d] for d in axes)
            masks[place] = masks.get(place, 0) | 1 << v
        far = {
            place: sum(abs(x - middle[d]) for x, d in zip(place, axes, strict=True))
            for place in masks
        }
        return [masks[place] for place in sorted(masks, key=lambda place: (-far[place], place))]

    groups = lines(tuple(everything))
    if len(offsets) > bits:
        split = [lines(tuple(d for d in everything if d != axis)) for axis in (ndim // 2, 0)]
        # Leave out the line through the middle, because nearly every column has an entry of it.
        groups = [mask for some in split for mask in some[:-1]] + groups
    groups = [0] * (bits - len(groups)) + groups[:bits]
    return torch.tensor(groups, dtype=torch.int64, device=device).to(torch.int32)


def has_order(n: int, volume: int) -> bool:
    """Return whether a table of ``n`` columns and ``volume`` taps is put in order."""
    return 1 < volume <= 32 and n >= MIN_ROWS_TO_ORDER
