"""Host-side helpers of the map launchers: grids as kernel arguments, offsets on the device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tritonspconv.kernels.index import CellGrid, SiteIndex
from tritonspconv.kernels.triton._blocks import next_power_of_2, num_blocks


@functools.lru_cache(maxsize=512)
def int32_constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return ``values`` as an int32 tensor on ``device``; made once, never written."""
    return torch.tensor(values, dtype=torch.int32, device=device)


def flatten_offsets(offsets: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Return tap offsets as one int32 tensor [V * D]."""
    return int32_constant(tuple(x for offset in offsets for x in offset), device)


def box_args(grid: CellGrid) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a grid's lower corner and shape as kernel arguments, sealed; kernels ``_unseal`` them.

    Sealed, Triton does not specialise on them. ``do_not_specialize`` does not reach into tuples: an
    entry that is 1 or a multiple of 16 would compile a kernel of its own, and scenes differ in
    their extents. ``4 * value + 2`` is neither.
    """
    return tuple(4 * x + 2 for x in grid.lower), tuple(4 * x + 2 for x in grid.shape)


def index_args(index: SiteIndex) -> tuple[Tensor | int | None, ...]:
    """Return an index as kernel arguments.

    They are its table, ranks, block_rank and row_of_rank, and log2 of a hash table's capacity.
    """
    bits = index.table.shape[0].bit_length() - 1 if index.kind == "hash" else 0
    return index.table, index.rows, index.block_rank, index.row_of_rank, bits


def index_flags(index: SiteIndex) -> dict[str, bool]:
    """Return the constexpr flags that say what kind of index a kernel reads."""
    return {
        "BITMAP": index.kind == "bitmap",
        "HAS_ROW_OF_RANK": index.row_of_rank is not None,
    }


def tap_grid(n: int, volume: int, block_n: int) -> tuple[tuple[int, int], int]:
    """Return the grid over blocks of rows and of taps, and how many taps a block holds."""
    block_v = min(next_power_of_2(volume), 32)
    return (num_blocks(n, block_n), num_blocks(volume, block_v)), block_v
