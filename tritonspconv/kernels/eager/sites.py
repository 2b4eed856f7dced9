"""Index of given sites, and the sorted unique set of generated ones (vectorised torch)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels.index import SiteIndex

Box = tuple[tuple[int, ...], tuple[int, ...]]

_SORTED_LAST = 2**63 - 1


def linear_keys(
    batch: Tensor,
    cells: list[Tensor],
    lower: tuple[int, ...],
    shape: tuple[int, ...],
    batch_size: int,
) -> Tensor:
    """Return int64 keys of (batch, cells); -1 outside the grid."""
    valid = (batch >= 0) & (batch < batch_size)
    key = batch.long()
    for cell, lo, extent in zip(cells, lower, shape, strict=True):
        inside = cell - lo
        valid &= (inside >= 0) & (inside < extent)
        key = key * extent + inside
    return torch.where(valid, key, -1)


def inside_box(coords: Tensor, lower: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Return which rows have all their spatial coordinates in a box."""
    cells = coords[:, 1:].long() - torch.tensor(lower, device=coords.device)
    return ((cells >= 0) & (cells < torch.tensor(shape, device=coords.device))).all(dim=1)


def tap_keys(
    coords: Tensor,
    offset: tuple[int, ...],
    stride: tuple[int, ...],
    divide: bool,
    lower: tuple[int, ...],
    shape: tuple[int, ...],
    batch_size: int,
    own_box: Box | None = None,
) -> Tensor:
    """Return the key of the site that one tap relates to each row; -1 where there is none.

    ``divide=False``: ``fine = stride * coarse + offset``. ``divide=True``: rows are fine and the
    coarse site exists only where the division leaves no remainder. Rows outside ``own_box`` relate
    to nothing.
    """
    cells = []
    whole = None if own_box is None else inside_box(coords, *own_box)
    for axis, (off, step) in enumerate(zip(offset, stride, strict=True), start=1):
        cell = coords[:, axis].long()
        if not divide:
            cells.append(cell * step + off)
            continue
        moved = cell - off
        quotient = torch.div(moved, step, rounding_mode="floor")
        exact = moved == quotient * step
        whole = exact if whole is None else whole & exact
        cells.append(quotient)
    keys = linear_keys(coords[:, 0], cells, lower, shape, batch_size)
    return keys if whole is None else torch.where(whole, keys, -1)


def build_index(
    coords: Tensor, lower: tuple[int, ...], shape: tuple[int, ...], batch_size: int
) -> SiteIndex:
    """Index ``coords`` [N, 1 + D] by key; rows outside the grid are left out.

    A stable sort puts the lowest of repeated rows first, where a left-sided search finds it.
    """
    cells = [coords[:, axis].long() for axis in range(1, coords.shape[1])]
    keys = linear_keys(coords[:, 0], cells, lower, shape, batch_size)
    keys, rows = torch.sort(torch.where(keys < 0, _SORTED_LAST, keys), stable=True)
    return SiteIndex("sorted", keys, rows)


def find_rows(index: SiteIndex, keys: Tensor) -> Tensor:
    """Return the int64 row of each key, -1 where it is negative or not in the index."""
    if index.table.shape[0] == 0:
        return torch.full_like(keys, -1)
    at = torch.searchsorted(index.table, keys).clamp_(max=index.table.shape[0] - 1)
    assert index.rows is not None, "a sorted index has rows"
    return torch.where((index.table[at] == keys) & (keys >= 0), index.rows[at], -1)


def reached_sites(
    coords: Tensor,
    offsets: tuple[tuple[int, ...], ...],
    stride: tuple[int, ...],
    divide: bool,
    lower: tuple[int, ...],
    shape: tuple[int, ...],
    batch_size: int,
    own_box: Box | None = None,
) -> tuple[Tensor, SiteIndex]:
    """Find every site of the target grid that some row of ``coords`` reaches through a tap.

    See :func:`tritonspconv.kernels.triton.sites.reached_sites` for the arguments.
    """
    reached = [
        tap_keys(coords, offset, stride, divide, lower, shape, batch_size, own_box)
        for offset in offsets
    ]
    keys = torch.unique(torch.cat(reached))
    keys = keys[keys >= 0]
    out = torch.empty(keys.shape[0], coords.shape[1], dtype=torch.int32, device=coords.device)
    rest = keys
    for axis in range(len(shape), 0, -1):
        extent = max(shape[axis - 1], 1)
        quotient = torch.div(rest, extent, rounding_mode="floor")
        out[:, axis] = (rest - quotient * extent) + lower[axis - 1]
        rest = quotient
    out[:, 0] = rest
    return out, SiteIndex("sorted", keys, torch.arange(keys.shape[0], device=keys.device))
