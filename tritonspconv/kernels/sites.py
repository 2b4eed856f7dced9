"""Index of given sites, and the sorted unique set of generated ones."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspconv.kernels import has_numba, has_triton_maps
from tritonspconv.kernels.eager import sites as _torch_sites

if TYPE_CHECKING:
    from jaxtyping import Int32, Int64

    from tritonspconv.kernels.index import CellGrid, ReachedSites, SiteIndex
    from tritonspconv.kernels.window import IntTuple, Window


def build_index(coords: Int32[Tensor, "n axes"], grid: CellGrid) -> SiteIndex:
    """Index ``coords`` by key; rows outside the grid are left out.

    Args:
        coords: int32 [N, 1 + D].
        grid: Their grid.

    Returns:
        An index of the kind that the map kernels of this device read: ``"pages"`` for Triton,
        sorted keys for torch and for grids whose blocks would take too much memory.
    """
    return _back_end(coords.device, len(grid.shape)).build_index(coords, grid)


def sorted_index(coords: Int32[Tensor, "n axes"], grid: CellGrid) -> SiteIndex:
    """Index ``coords`` by sorted keys, on every device; arguments as for :func:`build_index`."""
    return _torch_sites.build_index(coords, grid)


def find_rows(index: SiteIndex, keys: Int64[Tensor, "m"]) -> Int64[Tensor, "m"]:
    """Find keys in an index of sorted keys, by binary search.

    Args:
        index: An index of kind ``"sorted"``.
        keys: int64 [M]; see :mod:`tritonspconv.kernels.keys`.

    Returns:
        int64 [M], the lowest row of each key; -1 where it is negative or not in the index.
    """
    return _torch_sites.find_rows(index, keys)


def reached_sites(
    coords: Int32[Tensor, "n axes"],
    offsets: Window,
    stride: IntTuple,
    divide: bool,
    grid: CellGrid,
    own_grid: CellGrid,
    flag: Int64[Tensor, ""] | None = None,
    capacity: int | None = None,
    overflow: Int32[Tensor, ""] | None = None,
) -> ReachedSites:
    """Find every site of ``grid`` that some row of ``coords`` reaches through a tap.

    Args:
        coords: int32 [N, 1 + D].
        offsets: V tap offsets, ``fine - stride * coarse``; or the corners of the window where
            ``divide`` is True.
        stride: Fine sites per coarse site.
        divide: True when ``coords`` are fine and the target is coarse.
        grid: The target grid.
        own_grid: The grid of ``coords``; rows outside it reach nothing.
        flag: int64 [], to be read together with the number of sites; or None.
        capacity: Number of rows to return, padding included; the host then does not wait. None: as
            many rows as there are sites. The host then waits once for this number.
        overflow: int32 [], set to whether there are more sites than ``capacity``. Sites that do
            not fit are left out.
    """
    return _back_end(coords.device, len(stride)).reached_sites(
        coords, offsets, stride, divide, grid, own_grid, flag, capacity, overflow
    )


@functools.lru_cache(maxsize=1024)
def _back_end(device: torch.device, ndim: int):
    if has_triton_maps(device, ndim):
        from tritonspconv.kernels.triton import sites as back_end
    elif has_numba(device):
        from tritonspconv.kernels.numba import sites as back_end
    else:
        from tritonspconv.kernels.eager import sites as back_end
    return back_end
