"""The table of a map whose inputs feed one output at most: each input writes itself."""

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


def scatter_table(
    in_coords: Int32[Tensor, "n_in axes"],
    offsets: tuple[IntTuple, ...],
    stride: IntTuple,
    divide: bool,
    out_index: SiteIndex,
    in_grid: CellGrid,
    out_grid: CellGrid,
    n_out: int,
    *,
    count: Int64[Tensor, ""] | None = None,
    reached: Int32[Tensor, "n_in"] | None = None,
) -> tuple[NeighborTable, Int32[Tensor, "1"]]:
    """Build the table of a geometry whose inputs feed one output at most, such as 2x2x2 / 2.

    No index of the inputs is needed, and every input is looked up once, not once for every tap.

    Args:
        in_coords: int32 [n_in, 1 + D].
        offsets: V tap offsets of a window without gaps, no wider than the stride; or one.
        stride: Fine sites per coarse site.
        divide: True when inputs are fine.
        out_index: Index of the output sites.
        in_grid: Grid of the input sites. Rows outside it, and repeated rows, reach nothing.
        out_grid: Grid of the output sites.
        n_out: Number of output rows.
        count: int64 [], how many of them are real; None: all.
        reached: int32 [n_in], the output that each input reaches, or -1; see ``ReachedSites``.
            With it, numba looks nothing up. None: not known.

    Returns:
        The table of the outputs; and int32 [1], not zero where inputs that reach an output repeat
        one another.
    """
    return _back_end(in_coords.device, len(stride)).scatter_table(
        in_coords, offsets, stride, divide, out_index, in_grid, out_grid, n_out, count=count,
        reached=reached,
    )  # fmt: skip


def scatters(device: torch.device) -> bool:
    """Return whether :func:`scatter_table` is the faster way to such a table on ``device``.

    On a CPU it is faster only if the caller knows which output each input reaches. Otherwise
    outputs look inputs up: a search there finds a run of taps.
    """
    return device.type != "cpu"


@functools.lru_cache(maxsize=1024)
def _back_end(device: torch.device, ndim: int):
    if has_triton_maps(device, ndim):
        from tritonspconv.kernels.triton import scatter_table as back_end
    elif has_numba(device):
        from tritonspconv.kernels.numba import scatter_table as back_end
    else:
        from tritonspconv.kernels.eager import scatter_table as back_end
    return back_end
