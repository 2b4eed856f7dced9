"""Distinct coordinates, in the order in which they appear."""

import math

import torch
from torch import Tensor

_MAX_CELLS = 2**62


def unique_rows(coords: Tensor) -> tuple[Tensor, Tensor]:
    """Find the first row of every distinct coordinate.

    Args:
        coords: int32 or int64 [N, K]; all columns count, any may be negative.

    Returns:
        Ascending rows int64 [U] of the first occurrences, and for every row the position int64 [N]
        of its coordinate among them: ``coords[rows][position] == coords``.

    Deterministic, on every device. Waits for the device.
    """
    ordered, perm = torch.sort(_row_keys(coords), stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    rows, appearance = torch.sort(perm[is_first])
    position = torch.empty_like(appearance)
    position[appearance] = torch.arange(rows.shape[0], device=coords.device)
    inverse = torch.empty_like(perm)
    inverse[perm] = position[is_first.cumsum(0) - 1]
    return rows, inverse


def _row_keys(coords: Tensor) -> Tensor:
    """Return int64 keys [N] that agree where rows of ``coords`` [N, K] do."""
    if coords.numel() == 0:
        return coords.new_zeros(coords.shape[0], dtype=torch.int64)
    lower, upper = torch.stack(torch.aminmax(coords, dim=0)).tolist()
    extents = [hi - lo + 1 for lo, hi in zip(lower, upper, strict=True)]
    if math.prod(extents) > _MAX_CELLS:
        return torch.unique(coords, dim=0, return_inverse=True)[1]
    keys = torch.zeros(coords.shape[0], dtype=torch.int64, device=coords.device)
    for column, lo, extent in zip(coords.unbind(1), lower, extents, strict=True):
        keys = keys * extent + (column.long() - lo)
    return keys
