"""The first row of every distinct key, from keys that are sorted (numba)."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernels.numba._compile import compiled


def first_rows(keys: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Write to each row the first row of its key, then number those in order: nothing is sorted."""
    firsts, position = torch.empty_like(rows), torch.empty_like(rows)
    operands = (x.contiguous().numpy() for x in (keys, rows))
    found = _number_firsts(*operands, firsts.numpy(), position.numpy())
    return firsts[:found].clone(), position


@compiled
def _number_firsts(keys, rows, firsts, position):
    """Write both results, and return how many keys are distinct."""
    first = 0
    for place in range(keys.shape[0]):
        if place == 0 or keys[place] != keys[place - 1]:
            first = rows[place]
        position[rows[place]] = first
    count = 0
    for row in range(position.shape[0]):
        first = position[row]
        # A first row comes before the other rows of its key, so its own number is there.
        if first == row:
            firsts[count] = row
            position[row] = count
            count += 1
        else:
            position[row] = position[first]
    return count
