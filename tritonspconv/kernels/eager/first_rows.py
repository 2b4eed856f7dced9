"""The first row of every distinct key, from keys that are sorted (torch)."""

from __future__ import annotations

import torch
from torch import Tensor


def first_rows(keys: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mark the first of equal keys, and sort their rows."""
    is_first = torch.ones_like(keys, dtype=torch.bool)
    is_first[1:] = keys[1:] != keys[:-1]
    firsts = rows[is_first]
    if firsts.shape[0] == keys.shape[0]:
        everything = torch.arange(keys.shape[0], device=keys.device)
        return everything, everything.clone()
    ordered, by_appearance = torch.sort(firsts)
    position = torch.empty_like(by_appearance)
    position[by_appearance] = torch.arange(ordered.shape[0], device=keys.device)
    position_of_row = torch.empty_like(rows)
    position_of_row[rows] = position[is_first.cumsum(0) - 1]
    return ordered, position_of_row
