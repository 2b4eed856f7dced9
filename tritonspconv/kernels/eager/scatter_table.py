"""The table of a map whose inputs feed one output at most: each input writes itself (torch)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels.eager.invert_table import table_of
from tritonspconv.kernels.eager.pairs import taps_of_table
from tritonspconv.kernels.eager.sites import find_rows, tap_keys, without_outsiders
from tritonspconv.kernels.index import CellGrid, SiteIndex
from tritonspconv.kernels.table import NeighborTable

_ABSENT = 2**31 - 1


def scatter_table(
    in_coords: Tensor,
    offsets: tuple[tuple[int, ...], ...],
    stride: tuple[int, ...],
    divide: bool,
    out_index: SiteIndex,
    in_grid: CellGrid,
    out_grid: CellGrid,
    n_out: int,
    *,
    count: Tensor | None = None,
    reached: Tensor | None = None,
) -> tuple[NeighborTable, Tensor]:
    """Write the lowest row of each output and tap, tap by tap."""
    coords, device = without_outsiders(in_coords, in_grid), in_coords.device
    rows = torch.full((len(offsets), n_out), _ABSENT, dtype=torch.int32, device=device)
    reaching = 0
    for column, offset in zip(rows, offsets, strict=True):
        out = find_rows(out_index, tap_keys(coords, offset, stride, divide, out_grid))
        row = torch.nonzero(out >= 0).squeeze(1)
        reaching += row.shape[0]
        column.scatter_reduce_(0, out.index_select(0, row), row.int(), "amin")
    rows.masked_fill_(rows == _ABSENT, -1)
    repeats = ((rows >= 0).sum() < reaching).int().reshape(1)
    return table_of(taps_of_table(rows), n_out, count), repeats
