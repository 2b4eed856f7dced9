"""Sets of sites made from others: distinct coordinates, selections and unions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspconv.coords.active_sites import ActiveSites
from tritonspconv.coords.grid import Grid
from tritonspconv.coords.row_tensor import RowwiseError
from tritonspconv.kernels.first_rows import first_rows

if TYPE_CHECKING:
    from jaxtyping import Int32, Int64


def unique_rows(keys: Int64[Tensor, "N"]) -> tuple[Int64[Tensor, "U"], Int64[Tensor, "N"]]:
    """Find the first row of every distinct key.

    Args:
        keys: int64 [N], in any order.

    Returns:
        The rows of first occurrences, int64 [U], ascending; and the position of every row's key
        among them, int64 [N]: ``keys[rows][position] == keys``.

    Deterministic. This call waits for the device once, for U.
    """
    return first_rows(*torch.sort(keys, stable=True))


def unique_sites(
    coords: Int32[Tensor, "N axes"], grid: Grid
) -> tuple[ActiveSites, Int64[Tensor, "U"], Int64[Tensor, "N"]]:
    """Make a set of sites of the distinct rows of a matrix, in the order in which they appear.

    Args:
        coords: int32 [N, 1 + D], all in the grid; copied.
        grid: Their grid.

    Returns:
        The sites; and the two results of :func:`unique_rows` for the rows of ``coords``.

    Deterministic. This call waits for the device. If no row repeats another, the sites keep the
    index of this check, and the next kernel map reads the index.
    """
    sites = ActiveSites(coords.clone(), grid)
    if not sites.has_repeats():
        everything = torch.arange(sites.num_rows, device=coords.device)
        return sites, everything, everything.clone()
    index = sites.index
    if index.kind == "sorted" and index.rows is not None:
        rows, position = first_rows(index.table, index.rows)
    else:
        rows, position = unique_rows(grid.keys(coords))
    return ActiveSites(coords[rows], grid), rows, position


def select_sites(sites: ActiveSites, rows: Int64[Tensor, "M"]) -> ActiveSites:
    """Return the sites at ``rows``, int64 [M], in their order and in the same grid."""
    return ActiveSites(sites.coords[rows], sites.grid)


def union_sites(
    parts: Sequence[ActiveSites], *, ascending: bool = True
) -> tuple[ActiveSites, list[Int64[Tensor, "N"]]]:
    """Return the union of sets of sites in unbounded grids.

    Args:
        parts: One set or more, on one device and of one dimension; every row in its grid.
        ascending: True: rows of the union ascend by key. False: the rows of the first part come
            first, then the new rows of each next part, in their order.

    Returns:
        The union, and for each part the row of the union at which each of its rows is, int64.

    Raises:
        RowwiseError: A part is padded to a capacity.

    Deterministic. This call waits for the device once, for the size of the union.
    """
    if any(part.bounds is not None for part in parts):
        raise RowwiseError(
            "a union of different coordinates cannot run on rows that are padded to a capacity: "
            "its size depends on the data. Combine tensors at the same sites."
        )
    filled = [part.grid for part in parts if part.grid.num_cells] or [parts[0].grid]
    lower = tuple(map(min, zip(*(grid.lower for grid in filled), strict=True)))
    upper = tuple(map(max, zip(*(grid.upper for grid in filled), strict=True)))
    shape = tuple(hi - lo + 1 for lo, hi in zip(lower, upper, strict=True))
    grid = Grid(lower, shape, max(grid.batch_size for grid in filled), bounded=False)
    counts = [part.num_rows for part in parts]
    if not ascending:
        union, _, rows = unique_sites(torch.cat([part.coords for part in parts]), grid)
        return union, list(rows.split(counts))
    keys = torch.cat([grid.keys(part.coords) for part in parts])
    # Torch waits here, for the number of distinct keys.
    distinct, rows = torch.unique(keys, return_inverse=True)
    return ActiveSites(grid.coords(distinct), grid), list(rows.split(counts))
