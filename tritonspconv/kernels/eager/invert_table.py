"""A table seen from its other side, out of nothing but the table (vectorised torch)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels.eager.pairs import PairBlocks

Table = tuple[Tensor, Tensor, Tensor | None, PairBlocks]


def with_mask(rows: Tensor) -> Table:
    """Add the mask words to ``rows`` [V, n], and its pairs; columns stay in row order."""
    volume, n = rows.shape
    mask = torch.zeros(-(-volume // 32), n, dtype=torch.int32, device=rows.device)
    for v, present in enumerate(rows >= 0):
        bit = 1 << (v % 32)
        mask[v // 32].add_(present, alpha=bit if bit < 2**31 else -(2**31))
    return rows, mask, None, PairBlocks(rows)


def invert_table(
    rows: Tensor, order: Tensor | None, n_other: int, offsets: tuple[tuple[int, ...], ...]
) -> Table:
    """Build the table of the other side: rows [V, n] of entries below ``n_other`` -> [V, n_other].

    ``offsets`` steer nothing here.
    """
    inverse = torch.full((rows.shape[0], n_other), -1, dtype=torch.int32, device=rows.device)
    own = torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device)
    own = own if order is None else order
    for v in range(rows.shape[0]):
        present = rows[v] >= 0
        inverse[v, rows[v][present].long()] = own[present]
    return with_mask(inverse)
