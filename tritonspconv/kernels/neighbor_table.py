"""Tables by lookup: every row looks up the rows that it meets."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspconv.kernels import has_numba, has_triton_maps

if TYPE_CHECKING:
    from jaxtyping import Int32, Int64

    from tritonspconv.kernels.index import CellGrid, SiteIndex
    from tritonspconv.kernels.table import NeighborTable
    from tritonspconv.kernels.window import IntTuple


def lookup_table(
    coords: Int32[Tensor, "n axes"],
    offsets: tuple[IntTuple, ...],
    index: SiteIndex,
    grid: CellGrid,
    *,
    distinct: bool = False,
    count: Int64[Tensor, ""] | None = None,
) -> NeighborTable:
    """Build the table of a submanifold geometry: every row looks its own neighbours up.

    Args:
        coords: int32 [n, 1 + D], the sites.
        offsets: V tap offsets, one of them zero.
        index: Index of the sites.
        grid: Their grid.
        distinct: No row repeats another. False: repeated rows are left out.
        count: int64 [], number of real rows; None: all.
    """
    return _back_end(coords.device, len(grid.shape)).lookup_table(
        coords, offsets, index, grid, distinct=distinct, count=count
    )


def reach_table(
    out_coords: Int32[Tensor, "n_out axes"],
    offsets: tuple[IntTuple, ...],
    stride: IntTuple,
    divide: bool,
    in_index: SiteIndex,
    in_grid: CellGrid,
    out_grid: CellGrid,
    out_index: SiteIndex | None = None,
    *,
    count: Int64[Tensor, ""] | None = None,
) -> NeighborTable:
    """Build the table of any geometry: every output looks up the inputs that reach it.

    Args:
        out_coords: int32 [n_out, 1 + D].
        offsets: V tap offsets.
        stride: Fine sites per coarse site.
        divide: True when inputs are fine.
        in_index: Index of the input sites.
        in_grid: Grid of the input sites.
        out_grid: Grid of the output sites; rows outside it are reached by nothing.
        out_index: Index of the output sites, to leave repeated rows out; None: none repeats.
        count: int64 [], number of real outputs; None: all.
    """
    return _back_end(out_coords.device, len(stride)).reach_table(
        out_coords, offsets, stride, divide, in_index, in_grid, out_grid, out_index, count=count
    )


def reads_every_index(device: torch.device) -> bool:
    """Return whether :func:`reach_table` needs ``out_index`` even if no output repeats.

    It does on a CPU, whose search walks through both indices. Without ``out_index`` it would make
    the index again.
    """
    return device.type == "cpu"


def reverse_table(
    rows: Int32[Tensor, "V n_out"],
    in_coords: Int32[Tensor, "n_in axes"],
    offsets: tuple[IntTuple, ...],
    stride: IntTuple,
    divide: bool,
    in_index: SiteIndex | None,
    out_index: SiteIndex,
    in_grid: CellGrid,
    out_grid: CellGrid,
    order: Int32[Tensor, "n_out"] | None = None,
    *,
    count: Int64[Tensor, ""] | None = None,
    in_count: Int64[Tensor, ""] | None = None,
) -> NeighborTable:
    """Build the table of a map's inputs: for every input the outputs that it reaches.

    Triton looks the outputs up; torch inverts ``rows``.

    Args:
        rows: int32 [V, n_out], the table of the outputs.
        in_coords: int32 [n_in, 1 + D].
        offsets: V tap offsets.
        stride: Fine sites per coarse site.
        divide: True when inputs are fine.
        in_index: Index of the input sites, to leave repeated rows out; None: none repeats.
        out_index: Index of the output sites.
        in_grid: Grid of the input sites; rows outside it reach nothing.
        out_grid: Grid of the output sites.
        order: Order of the columns of ``rows``, or None.
        count: int64 [], number of real columns of ``rows``; None: all.
        in_count: int64 [], number of real inputs; None: all.
    """
    return _back_end(in_coords.device, len(stride)).reverse_table(
        rows, in_coords, offsets, stride, divide, in_index, out_index, in_grid, out_grid, order,
        count=count, in_count=in_count,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _back_end(device: torch.device, ndim: int):
    if has_triton_maps(device, ndim):
        from tritonspconv.kernels.triton import neighbor_table as back_end
    elif has_numba(device):
        from tritonspconv.kernels.numba import neighbor_table as back_end
    else:
        from tritonspconv.kernels.eager import neighbor_table as back_end
    return back_end
