"""MinkowskiEngine's rules in loops over coordinates, in its own units."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

Site = tuple[int, ...]


def taps(kernel_size: Sequence[int]) -> list[Site]:
    """Offsets of a hypercube: axis 0 fastest, odd extents centred, even ones from 0."""
    axes = [[j - k // 2 if k % 2 else j for j in range(k)] for k in kernel_size]
    return [offset[::-1] for offset in itertools.product(*axes[::-1])]


def moved(site: Site, offset: Site, steps: Sequence[int]) -> Site:
    batch, *x = site
    return (batch, *(a + o * s for a, o, s in zip(x, offset, steps, strict=True)))


def cell(site: Site, tensor_stride: Sequence[int]) -> Site:
    batch, *x = site
    return (batch, *(a // s * s for a, s in zip(x, tensor_stride, strict=True)))


def rows_of(coords: Tensor) -> dict[Site, int]:
    return {tuple(c): row for row, c in enumerate(coords.tolist())}


def conv(
    coords: Tensor,
    feats: Tensor,
    kernel: Tensor,
    out_coords: Tensor,
    offsets: Sequence[Site],
    steps: Sequence[int],
    transposed: bool = False,
) -> Tensor:
    """``out[u] = sum_k kernel[k]^T x[u + o_k]``; transposed: of ``x[u - o_k]``."""
    in_rows, out = rows_of(coords), []
    for site in map(tuple, out_coords.tolist()):
        total = feats.new_zeros(kernel.shape[-1])
        for offset, matrix in zip(offsets, kernel, strict=True):
            sign = -1 if transposed else 1
            row = in_rows.get(moved(site, tuple(sign * o for o in offset), steps))
            if row is not None:
                total = total + feats[row] @ matrix
        out.append(total)
    return torch.stack(out) if out else feats.new_zeros(0, kernel.shape[-1])


def sites(coords: Tensor) -> list[list[int]]:
    """Rows of coordinates, ascending."""
    return sorted(coords.tolist())
