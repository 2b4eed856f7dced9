"""Points of any coordinates: the cells they are in, and the corners of linear interpolation."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from compat.minkowski._coordinate_map import CoordinateMap, IntTuple
from compat.minkowski._errors import MinkowskiError
from compat.minkowski._int32 import to_int32
from compat.minkowski._samples import Samples, check_samples, occurring

# No map has a cell at this coordinate.
_BEYOND = 2.0**33


class CoordinateField:
    """Points behind a key.

    Args:
        coordinates: [N, 1 + D], floating point; copied. The batch index is rounded.
        ndim: D.

    Raises:
        MinkowskiError: ``coordinates`` have another shape.
    """

    __slots__ = ("_batch_rows", "_samples", "coordinates")

    def __init__(self, coordinates: Tensor, ndim: int) -> None:
        if coordinates.ndim != 2 or coordinates.shape[1] != 1 + ndim:
            raise MinkowskiError(
                f"points must have shape [N, {1 + ndim}], batch index first, for D={ndim}; got "
                f"{list(coordinates.shape)}."
            )
        # The caller may write to its tensor later.
        self.coordinates = coordinates.detach().clone()
        self._batch_rows: list[Tensor] | None = None
        self._samples: Samples | None = None

    def cells(self, tensor_stride: IntTuple) -> Tensor:
        """Return the coordinates of the cells of a stride that hold the points, int32.

        Raises:
            MinkowskiError: A point is not finite or lies beyond int32.

        This call waits for the device.
        """
        steps = self.coordinates.new_tensor((1, *tensor_stride))
        cells = self.coordinates / steps
        cells[:, 0] = self.coordinates[:, 0].round()
        cells = to_int32(cells)
        if max(tensor_stride) == 1:
            return cells
        # A multiple of the stride may lie below the range of int32.
        return to_int32(cells * cells.new_tensor((1, *tensor_stride), dtype=torch.int64))

    @property
    def batch_index(self) -> Tensor:
        """Sample of each point, int64 [N]."""
        return self.coordinates[:, 0].round().long()

    def samples(self) -> Samples:
        """Return the batch indices that occur. This call waits for the device the first time."""
        if self._samples is None:
            batch_size = self._batch_size()
            check_samples(batch_size)
            self._samples = occurring(self.batch_index, batch_size)
        return self._samples

    def _batch_size(self) -> int:
        """Return one more than the largest batch index. This call waits for the device."""
        batch = self.batch_index
        return int(batch.max()) + 1 if len(batch) else 0

    def batch_rows(self) -> list[Tensor]:
        """Return the rows of each sample's points, int64, ascending.

        This call waits for the device the first time.
        """
        if self._batch_rows is None:
            batch = self.batch_index
            check_samples(self._batch_size())
            counts = torch.bincount(batch).tolist()
            self._batch_rows = list(torch.sort(batch, stable=True)[1].split(counts))
        return self._batch_rows


def corners(found: CoordinateMap, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return the corners of each sample's cell on the grid of the tensor stride.

    Args:
        found: The map to read.
        samples: [M, 1 + D], floating point; the batch index is rounded.

    Returns:
        Rows of the map, int64 [M, 2^D], -1 where a corner is no site; linear weights [M, 2^D]. The
        weights of absent corners are not passed on to the other corners.
    """
    ndim = len(found.tensor_stride)
    if samples.ndim != 2 or samples.shape[1] != 1 + ndim:
        raise MinkowskiError(
            f"samples must have shape [M, {1 + ndim}], batch index first; got "
            f"{list(samples.shape)}."
        )
    samples = samples.detach()
    bits = torch.tensor(list(itertools.product((0, 1), repeat=ndim)), device=samples.device)
    position = samples[:, 1:] / samples.new_tensor(found.tensor_stride)
    base = position.floor()
    upper = (position - base)[:, None]
    # [M, 2^D, D] in int64, because a point near the end of int32 has corners beyond int32.
    cells = base.clamp(-_BEYOND, _BEYOND).long()[:, None] + bits
    weights = torch.where(bits.bool(), upper, 1 - upper).prod(2)
    coords = torch.empty(*cells.shape[:2], 1 + ndim, dtype=torch.int64, device=samples.device)
    coords[..., 0] = samples[:, :1].round().clamp(-_BEYOND, _BEYOND)
    coords[..., 1:] = cells * cells.new_tensor(found.tensor_stride)
    return found.rows_of(coords.flatten(0, 1)).reshape(cells.shape[:2]), weights
