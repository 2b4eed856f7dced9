"""Sets of sites made from others: distinct coordinates, selections and unions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonspconv.coords.active_sites import ActiveSites
from tritonspconv.coords.grid import Grid


def unique_rows(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Find the first row of every distinct key.

    Args:
        keys: int64 [N], in any order.

    Returns:
        The rows of first occurrences, int64 [U], ascending; and the position of every row's key
        among them, int64 [N]: ``keys[rows][position] == keys``.

    Deterministic. Waits for the device once, for U.
    """
    ordered, perm = torch.sort(keys, stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    firsts = perm[is_first]
    if firsts.shape[0] == keys.shape[0]:
        everything = torch.arange(keys.shape[0], device=keys.device)
        return everything, everything.clone()
    rows, by_appearance = torch.sort(firsts)
    position = torch.empty_like(by_appearance)
    position[by_appearance] = torch.arange(rows.shape[0], device=keys.device)
    position_of_row = torch.empty_like(perm)
    position_of_row[perm] = position[is_first.cumsum(0) - 1]
    return rows, position_of_row


def select_sites(sites: ActiveSites, rows: Tensor) -> ActiveSites:
    """Return the sites at ``rows``, int64 [M], in their order and in the same grid."""
    return ActiveSites(sites.coords[rows], sites.grid)


def union_sites(parts: Sequence[ActiveSites]) -> tuple[ActiveSites, list[Tensor]]:
    """Return the union of sets of sites in unbounded grids, ascending by key.

    Args:
        parts: One set or more, on one device and of one dimension; every row in its grid.

    Returns:
        The union, and for each part the row of the union at which each of its rows is, int64.

    Deterministic. Waits for the device once, for the size of the union.
    """
    filled = [part.grid for part in parts if part.grid.num_cells] or [parts[0].grid]
    lower = tuple(map(min, zip(*(grid.lower for grid in filled), strict=True)))
    upper = tuple(map(max, zip(*(grid.upper for grid in filled), strict=True)))
    shape = tuple(hi - lo + 1 for lo, hi in zip(lower, upper, strict=True))
    grid = Grid(lower, shape, max(grid.batch_size for grid in filled), bounded=False)
    keys = torch.cat([grid.keys(part.coords) for part in parts])
    union, rows = torch.unique(keys, return_inverse=True)
    return ActiveSites(grid.coords(union), grid), list(rows.split([p.num_rows for p in parts]))
