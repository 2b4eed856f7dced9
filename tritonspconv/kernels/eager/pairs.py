"""Pair lists: the (input row, output row) pairs of a table, tap by tap (vectorised torch)."""

from __future__ import annotations

import torch
from torch import Tensor


def pair_lists(
    rows: Tensor, order: Tensor | None, taps: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """List the pairs of the first ``taps`` taps of a table; exactly sized, ``capacity`` unused.

    See :func:`tritonspconv.kernels.triton.pairs.pair_lists`.
    """
    tap, column = torch.nonzero(rows[:taps] >= 0, as_tuple=True)
    out = column if order is None else order[column]
    pairs = torch.stack([rows[tap, column], out.to(torch.int32)])
    tap_ptr = torch.zeros(taps + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(tap, minlength=taps), dim=0, out=tap_ptr[1:])
    return pairs, tap_ptr
