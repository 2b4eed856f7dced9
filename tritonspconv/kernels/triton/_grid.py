"""Host-side helpers of the map launchers: grids, taps and indices as kernel arguments."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonspconv.kernels.index import CellGrid, SiteIndex
from tritonspconv.kernels.triton._blocks import next_power_of_2, num_blocks
from tritonspconv.kernels.window import reach_steps

# In a narrow grid keys are int32, and cells and offsets stay below `_index._FAR`.
_NARROW_CELLS, _NARROW_EXTENT, _NARROW_OFFSET = 2**31, 2**30, 2**29

IntTuple = tuple[int, ...]


class Taps(NamedTuple):
    """Taps on the device.

    Attributes:
        table: int32 [V, 2 * D], offset and limit of each; see ``window.reach_steps``.
        volume: V.
        is_near: True when all offsets are small enough for a narrow grid.
    """

    table: Tensor
    volume: int
    is_near: bool


def _taps(steps: tuple[tuple[IntTuple, IntTuple], ...], device: torch.device) -> Taps:
    table = torch.tensor([[*offset, *limit] for offset, limit in steps], dtype=torch.int32)
    is_near = all(abs(x) < _NARROW_OFFSET for offset, _ in steps for x in offset)
    return Taps(table.to(device), len(steps), is_near)


@functools.lru_cache(maxsize=512)
def device_taps(offsets: tuple[IntTuple, ...], device: torch.device) -> Taps:
    """Return every tap of a window, on the device; made once, never written."""
    return _taps(tuple((offset, (1,) * len(offset)) for offset in offsets), device)


@functools.lru_cache(maxsize=512)
def device_steps(
    offsets: tuple[IntTuple, ...], stride: IntTuple, divide: bool, device: torch.device
) -> Taps:
    """Return the steps that reach what a window reaches; made once, never written."""
    return _taps(reach_steps(offsets, stride, divide), device)


@functools.lru_cache(maxsize=512)
def _seal(values: IntTuple) -> IntTuple:
    return tuple(4 * x + 2 for x in values)


def box_args(grid: CellGrid) -> tuple[IntTuple, IntTuple]:
    """Return a grid's lower corner and shape as kernel arguments, sealed; kernels ``unseal`` them.

    Sealed, Triton does not specialise on them. ``do_not_specialize`` does not reach into tuples: an
    entry that is 1 or a multiple of 16 would compile a kernel of its own, and scenes differ in
    their extents. ``4 * value + 2`` is neither.
    """
    return _seal(grid.lower), _seal(grid.shape)


def is_narrow(grid: CellGrid, taps: Taps) -> bool:
    """Return whether int32 hold the keys of ``grid``, also while they are computed."""
    return (
        taps.is_near and grid.num_cells < _NARROW_CELLS and max(grid.shape) < _NARROW_EXTENT
    )  # fmt: skip


def index_args(index: SiteIndex) -> tuple[Tensor | int | None, ...]:
    """Return an index as kernel arguments: its table, its rows, and its size.

    The size is log2 of a block's cells for a bitmap, and the number of keys for sorted ones.
    """
    return index.table, index.rows, index.shift if index.kind == "bitmap" else len(index.table)


def index_flags(index: SiteIndex, prefix: str = "") -> dict[str, Any]:
    """Return the constexpr flags that say what kind of index a kernel reads."""
    return {
        f"{prefix}BITMAP": index.kind == "bitmap",
        f"{prefix}HAS_ROWS": index.rows is not None,
    }


def tap_grid(n: int, volume: int, block_n: int) -> tuple[tuple[int, int], int]:
    """Return the grid over blocks of rows and of taps, and how many taps a block holds."""
    block_v = min(next_power_of_2(volume), 32)
    return (num_blocks(n, block_n), num_blocks(volume, block_v)), block_v
