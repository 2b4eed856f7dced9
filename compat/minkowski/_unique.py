"""Distinct rows of a matrix, in the order in which they appear."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonspconv.coords import Grid, unique_rows


def unique_coordinates(coords: Tensor) -> tuple[Tensor, Tensor]:
    """Find the first row of every distinct coordinate.

    Args:
        coords: int32 [N, K]; all columns count, any may be negative.

    Returns:
        Ascending rows int64 [U] of the first occurrences, and for every row the position int64 [N]
        of its coordinate among them: ``coords[rows][position] == coords``.

    Deterministic, on every device. This call waits for the device.
    """
    without_batch = F.pad(coords, (1, 0))
    try:
        grid = Grid.around(without_batch)
    except ValueError:
        # The box has more cells than int64 keys can number.
        return unique_rows(torch.unique(coords, dim=0, return_inverse=True)[1])
    return unique_rows(grid.keys(without_batch))
