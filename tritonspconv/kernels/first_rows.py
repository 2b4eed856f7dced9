"""The first row of every distinct key, from keys that are sorted."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspconv.kernels import has_numba

if TYPE_CHECKING:
    from jaxtyping import Int64


def first_rows(
    keys: Int64[Tensor, "n"], rows: Int64[Tensor, "n"]
) -> tuple[Int64[Tensor, "u"], Int64[Tensor, "n"]]:
    """Find the first row of every distinct key.

    Args:
        keys: int64 [N], ascending.
        rows: int64 [N], the row of each key, a permutation; ascending where keys are equal.

    Returns:
        The rows of first occurrences, int64 [U], ascending; and the position of every row's key
        among them, int64 [N]. This call waits for the device once, for U.
    """
    return _back_end(keys.device).first_rows(keys, rows)


@functools.lru_cache(maxsize=1024)
def _back_end(device: torch.device):
    if has_numba(device):
        from tritonspconv.kernels.numba import first_rows as back_end
    else:
        from tritonspconv.kernels.eager import first_rows as back_end
    return back_end
