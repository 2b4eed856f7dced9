"""Index of given sites (numba); generated sites are those of torch so far."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels.eager import sites as eager
from tritonspconv.kernels.index import CellGrid, SiteIndex
from tritonspconv.kernels.numba._sorted_keys import sorted_keys

reached_sites = eager.reached_sites


def build_index(coords: Tensor, grid: CellGrid) -> SiteIndex:
    """Sort keys by radix; in grids of some 2**45 cells and more, torch sorts them."""
    found = sorted_keys(coords.contiguous().numpy(), grid)
    if found is None:
        return eager.build_index(coords, grid)
    keys, rows = found
    return SiteIndex("sorted", torch.from_numpy(keys), torch.from_numpy(rows))
