"""A plain convolution in float32, the reference for every library before it is timed.

Shares no code with the libraries: coordinates are looked up by binary search, tap by tap.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Largest ‖result - reference‖ / ‖reference‖ of one layer. The reference multiplies the same rounded
# inputs in float32, so the remaining error is the rounding of results and, in the original, of
# partial sums in half precision. The float32 limit lies below the error of TF32, about 3e-4.
LAYER_TOLERANCE = {"float32": 1e-4, "tf32": 2e-3, "float16": 1e-2, "bfloat16": 2e-2}
# A weight gradient sums over all voxels, in float16 where a library does so.
GRADIENT_SLACK = 2.0


@dataclass(frozen=True)
class Window:
    """Geometry of a layer, equal along all axes: ``fine = stride * coarse - padding + tap``.

    Attributes:
        size: Taps along an axis.
        stride: Fine voxels between coarse ones.
        padding: The layer's argument ``padding``.
        to_fine: The layer reads coarse voxels and writes fine ones.
    """

    size: int
    stride: int = 1
    padding: int = 0
    to_fine: bool = False

    @property
    def taps(self) -> Iterator[tuple[int, ...]]:
        """The taps, the last axis fastest."""
        return itertools.product(range(self.size), repeat=3)

    def step(self, cells: Tensor, tap: tuple[int, ...], *, to_fine: bool) -> tuple[Tensor, Tensor]:
        """Return the cells on the other side of a tap, and which of them exist."""
        shift = cells.new_tensor(tap) - self.padding
        if to_fine:
            fine = self.stride * cells + shift
            return fine, torch.ones_like(fine[:, 0], dtype=torch.bool)
        scaled = cells - shift
        divisible = (scaled % self.stride == 0).all(dim=1)
        return scaled.div(self.stride, rounding_mode="floor"), divisible


class Lookup:
    """Finds the rows of cells by binary search.

    Args:
        indices: int32 ``[N, 4]``, distinct.
        shape: Extents of the grid.
    """

    def __init__(self, indices: Tensor, shape: Sequence[int]) -> None:
        self.shape = shape
        self.keys, self.rows = keys_of(indices, shape).sort()

    def find(self, batch: Tensor, cells: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions of existing cells, and their rows."""
        extents = cells.new_tensor(list(self.shape))
        exists = exists & ((cells >= 0) & (cells < extents)).all(dim=1)
        keys = keys_of(torch.cat([batch[:, None], cells], dim=1), self.shape)
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        found = (exists & (self.keys[place] == keys)).nonzero().squeeze(1)
        return found, self.rows[place[found]]


def keys_of(indices: Tensor, shape: Sequence[int]) -> Tensor:
    """Return int64 keys that ascend with (batch, z, y, x)."""
    batch, z, y, x = indices.long().unbind(1)
    return ((batch * shape[0] + z) * shape[1] + y) * shape[2] + x


def cells_of(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the int32 indices ``[N, 4]`` of keys."""
    z, y, x = shape
    parts = [keys // (z * y * x), keys // (y * x) % z, keys // x % y, keys % x]
    return torch.stack(parts, dim=1).int()


def reached_keys(indices: Tensor, window: Window, out_shape: Sequence[int]) -> Tensor:
    """Return the keys, ascending, of every output voxel that an input reaches."""
    batch, cells = indices[:, :1].long(), indices[:, 1:].long()
    extents = cells.new_tensor(list(out_shape))
    keys = []
    for tap in window.taps:
        out, exists = window.step(cells, tap, to_fine=window.to_fine)
        exists = exists & ((out >= 0) & (out < extents)).all(dim=1)
        keys.append(keys_of(torch.cat([batch, out], dim=1)[exists], out_shape).unique())
    return torch.cat(keys).unique()


def count_pairs(
    in_indices: Tensor, in_shape: Sequence[int], out_indices: Tensor, window: Window
) -> int:
    """Return the number of pairs of the kernel map."""
    lookup = Lookup(in_indices, in_shape)
    batch, cells = out_indices[:, 0].long(), out_indices[:, 1:].long()
    total = 0
    for tap in window.taps:
        found, _ = lookup.find(batch, *window.step(cells, tap, to_fine=not window.to_fine))
        total += len(found)
    return total


def convolve(
    feats: Tensor,
    weight: Tensor,
    in_indices: Tensor,
    in_shape: Sequence[int],
    out_indices: Tensor,
    window: Window,
) -> Tensor:
    """Return the output rows for ``out_indices``, differentiable in ``feats`` and ``weight``.

    Args:
        feats: float32 ``[n_in, c_in]``.
        weight: float32 ``[c_out, k, k, k, c_in]``.
        in_indices: Voxels of the input.
        in_shape: Grid of the input.
        out_indices: Voxels of the output.
        window: The geometry.
    """
    lookup = Lookup(in_indices, in_shape)
    batch, cells = out_indices[:, 0].long(), out_indices[:, 1:].long()
    matrices = weight.flatten(1, 3).permute(1, 2, 0)
    out = feats.new_zeros(len(out_indices), weight.shape[0])
    for number, tap in enumerate(window.taps):
        found, rows = lookup.find(batch, *window.step(cells, tap, to_fine=not window.to_fine))
        out.index_add_(0, found, feats[rows] @ matrices[number])
    return out


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Return ‖result - reference‖ / ‖reference‖; infinite where the shapes differ."""
    if result.shape != reference.shape:
        return float("inf")
    result, reference = result.detach().double(), reference.detach().double()
    scale = reference.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return float((result - reference).norm() / scale)
