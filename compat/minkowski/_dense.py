"""Dense and torch sparse tensors from coordinates and features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compat.minkowski._errors import MinkowskiError
from tritonspconv import ops
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.coords.row_tensor import RowwiseError, reads_values


def to_dense(
    features: Tensor,
    coordinates: Tensor,
    tensor_stride: Sequence[int],
    shape: torch.Size | None,
    min_coordinate: Tensor | int | None,
    contract_stride: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensor of ``SparseTensor.dense``; see there."""
    ndim = len(tensor_stride)
    if shape is not None and len(shape) != ndim + 2:
        raise MinkowskiError(
            f"dense: shape must be [B, C, {ndim} spatial extents]; got {list(shape)}."
        )
    if shape is None and not len(features):
        raise MinkowskiError("dense: a tensor without rows needs shape=[B, C, *spatial].")
    corner = _corner(min_coordinate, ndim)
    if corner is not None:
        _check_on_grid("min_coordinate", corner, tensor_stride)
    steps = list(tensor_stride) if contract_stride else [1] * ndim
    if reads_values(coordinates):
        least, shape = _box_of_values(coordinates, features.shape[1], shape, corner, steps)
    elif shape is None or corner is None:
        raise RowwiseError(
            "dense: the size of the result must not depend on the coordinates; pass "
            "shape=[B, C, *spatial] and min_coordinate="
        )
    else:
        # The run reports coordinates outside the shape.
        least = corner
    cells = _cells(coordinates, corner or [0] * ndim, steps)
    sites = ActiveSites(cells, Grid((0,) * ndim, tuple(shape[2:]), shape[0]))
    return (
        ops.to_dense(features, sites),
        torch.tensor([least], dtype=torch.int32, device=coordinates.device),
        torch.tensor(tensor_stride, dtype=torch.int32, device="cpu"),
    )


def to_torch_sparse(
    features: Tensor,
    coordinates: Tensor,
    tensor_stride: Sequence[int],
    min_coords: Tensor | None,
    max_coords: Tensor | None,
    contract_coords: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensor of ``SparseTensor.sparse``; see there."""
    ndim = len(tensor_stride)
    low, high = _bounds(coordinates)
    first = _corner(min_coords, ndim) or low[1:]
    last = _corner(max_coords, ndim) or high[1:]
    _check_on_grid("min_coords", first, tensor_stride)
    _check_on_grid("max_coords", last, tensor_stride)
    steps = list(tensor_stride) if contract_coords else [1] * ndim
    extent = [(hi - lo) // step + 1 for hi, lo, step in zip(last, first, steps, strict=True)]
    made = torch.sparse_coo_tensor(
        _cells(coordinates, first, steps).t().long(),
        features,
        [high[0] + 1, *extent, features.shape[1]],
        device=features.device,
        check_invariants=True,
    )
    first_cell = [lo // step for lo, step in zip(first, steps, strict=True)]
    return (
        made,
        torch.tensor([first_cell], dtype=torch.int32, device="cpu"),
        torch.tensor(tensor_stride, dtype=torch.int32, device="cpu"),
    )


def _corner(given: Tensor | int | None, ndim: int) -> list[int] | None:
    """Return a corner given as a tensor of ``ndim`` ints, or as 0."""
    if given is None:
        return None
    if isinstance(given, int) and given == 0:
        return [0] * ndim
    if not isinstance(given, Tensor) or given.is_floating_point() or given.numel() != ndim:
        raise MinkowskiError(f"a corner must be an integer tensor of {ndim} entries; got {given}.")
    return given.flatten().tolist()


def _box_of_values(
    coordinates: Tensor,
    channels: int,
    shape: torch.Size | None,
    corner: list[int] | None,
    steps: list[int],
) -> tuple[list[int], torch.Size]:
    """Return the coordinate that ``dense`` reports, and the shape ``[B, C, *spatial]``.

    Args:
        coordinates: int32 [N, 1 + D], whose values the host reads.
        channels: C.
        shape: The shape that the caller wants; None: up to the largest coordinate.
        corner: Coordinate of the first cell; None: the origin.
        steps: Input units of a cell, per axis.

    Raises:
        MinkowskiError: A coordinate lies outside.
    """
    low, high = _bounds(coordinates)
    if corner is None and min(low[1:]) < 0:
        raise MinkowskiError(
            f"dense: coordinates are negative, down to {low[1:]}; pass min_coordinate=, a "
            "multiple of the tensor stride."
        )
    first = corner or [0] * len(steps)
    last = [(hi - lo) // step for hi, lo, step in zip(high[1:], first, steps, strict=True)]
    if shape is None:
        shape = torch.Size([high[0] + 1, channels, *(end + 1 for end in last)])
    if len(coordinates) and (
        any(lo < f for lo, f in zip(low[1:], first, strict=True))
        or high[0] >= shape[0]
        or any(end >= n for end, n in zip(last, shape[2:], strict=True))
    ):
        raise MinkowskiError(
            f"dense: coordinates {low} to {high} (batch first) do not fit shape {list(shape)} from "
            f"min_coordinate {first} in steps of {steps}."
        )
    return corner or low[1:], shape


def _bounds(coordinates: Tensor) -> tuple[list[int], list[int]]:
    """Return the least and the largest entry of each column; -1 above 0 where there are no rows."""
    if not len(coordinates):
        return [0] * coordinates.shape[1], [-1] * coordinates.shape[1]
    low, high = torch.stack(torch.aminmax(coordinates, dim=0)).tolist()
    return low, high


def _cells(coordinates: Tensor, first: Sequence[int], steps: Sequence[int]) -> Tensor:
    """Return batch index and cell of each row, counted from ``first`` in ``steps``."""
    kind = {"dtype": coordinates.dtype, "device": coordinates.device}
    shifted = coordinates - torch.tensor([0, *first], **kind)
    return shifted.div(torch.tensor([1, *steps], **kind), rounding_mode="floor")


def _check_on_grid(name: str, corner: Sequence[int], tensor_stride: Sequence[int]) -> None:
    if any(x % step for x, step in zip(corner, tensor_stride, strict=True) if step):
        raise MinkowskiError(
            f"{name} must be a multiple of the tensor stride {list(tensor_stride)}; got "
            f"{list(corner)}."
        )
