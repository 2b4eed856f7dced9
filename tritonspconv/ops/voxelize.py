"""Points to voxels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from tritonspconv.arguments import check_tensor, whole_number
from tritonspconv.coords import Grid
from tritonspconv.graph_capture import refuse_capture
from tritonspconv.ops.global_pool import reduce_segments

if TYPE_CHECKING:
    from jaxtyping import Float, Int

VoxelReduce = Literal["mean", "sum", "max", "first", "none"]
AxisOrder = Literal["zyx", "xyz"]
RowOrder = Literal["key", "first_seen"]

_MAX_BATCH = 2**31 - 1
_MAX_CELLS = 2**62


@dataclass(frozen=True)
class Voxels:
    """Voxels and the points in them.

    Attributes:
        feats: [N, F], the points of each voxel reduced; None with ``reduce="none"``.
        coords: int32 [N, 1 + D], batch index first.
        point_to_voxel: int64 [P], voxel of each point; -1 if the point is outside the range, or
            if its voxel was rejected by ``max_voxels``. A point beyond ``max_points`` keeps its
            voxel.
        num_points: int32 [N], points that each voxel holds, at most ``max_points``.
        grid_shape: Cells along each axis, in the order of ``coords``.
        points: [N, max_points, F], the points of each voxel, then zeros, with ``reduce="none"``.
    """

    feats: Tensor | None
    coords: Tensor
    point_to_voxel: Tensor
    num_points: Tensor
    grid_shape: tuple[int, ...]
    points: Tensor | None = None


def voxelize(
    points: Float[Tensor, "P F"],
    voxel_size: Sequence[float],
    point_range: Sequence[float],
    *,
    batch_index: Int[Tensor, "P"] | None = None,
    reduce: VoxelReduce = "mean",
    max_points: int | None = None,
    max_voxels: int | None = None,
    order: AxisOrder = "zyx",
    row_order: RowOrder = "key",
) -> Voxels:
    """Group points by voxel.

    The voxel of a point is ``floor((p - lower) / voxel_size)`` in float32; the grid has
    ``round((upper - lower) / voxel_size)`` cells along each axis. Points outside are dropped.

    Args:
        points: [P, F], floating point; the first D columns are positions x, y, z, ...
        voxel_size: Edge lengths along x, y, z, ... in the unit of the points; D = 1 to 4 of them.
        point_range: Lower corner, then upper corner: ``(x0, y0, z0, x1, y1, z1)``.
        batch_index: Sample of each point, int32 or int64 [P]; None: all belong to sample 0. Points
            with a negative index are dropped.
        reduce: The contents of ``feats``: ``"mean"``, ``"sum"`` or ``"max"`` of all columns, the
            ``"first"`` point, or ``"none"``: the points themselves, in ``Voxels.points``.
        max_points: The most points that a voxel holds. Further points, in the order of
            ``points``, are not reduced.
        max_voxels: The most voxels of each sample. Further voxels, in the order of their first
            points, are rejected.
        order: Axis order of the coordinates: ``"zyx"``, reversed, or ``"xyz"``, as the points.
        row_order: ``"key"``: voxels ascend by batch index, then by coordinates. ``"first_seen"``:
            voxels have the order of their first points.

    Returns:
        The voxels.

    Raises:
        TypeError: ``points`` is not floating point or ``batch_index`` not integral.
        ValueError: Shapes or devices disagree, or an option is unknown or out of range.

    Deterministic on every device, because the sorts are stable. This call waits for the device
    once, for the number of voxels, and again if samples reach ``max_voxels``. Differentiable in
    ``points``.

    Example:
        >>> points = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [1.5, 0.5, 0.5]])
        >>> voxels = voxelize(points, (1, 1, 1), (0, 0, 0, 2, 2, 2))
        >>> voxels.coords.tolist()  # batch, z, y, x
        [[0, 0, 0, 0], [0, 0, 0, 1]]
        >>> voxels.num_points.tolist()
        [2, 1]
    """
    refuse_capture("voxelize")
    _check(points, voxel_size, point_range, batch_index, reduce, max_points, max_voxels)
    _check_orders(order, row_order)
    grid, coords = _cells(points, voxel_size, point_range, batch_index, order)
    n_points, device = points.shape[0], points.device
    # Points outside have key -1, so they come first.
    keys, perm = torch.sort(grid.keys(coords), stable=True)
    is_first = keys >= 0
    is_first[1:] &= keys[1:] != keys[:-1]
    start = is_first.nonzero().squeeze(1)
    end = torch.cat([start[1:], start.new_full((min(start.shape[0], 1),), n_points)])
    voxel = is_first.cumsum(0) - 1
    if max_voxels is not None or row_order == "first_seen":
        sample = None if batch_index is None else coords[perm[start], 0]
        kept = _first_seen(perm[start], sample, max_voxels)
        if row_order == "key":
            kept = kept.sort().values
        # The last entry is for the -1 of points outside.
        new_voxel = start.new_full((start.shape[0] + 1,), -1)
        new_voxel[kept] = torch.arange(kept.shape[0], device=device)
        voxel, start, end = new_voxel[voxel], start[kept], end[kept]
    point_to_voxel = torch.empty_like(voxel)
    point_to_voxel[perm] = voxel
    reduced_to = point_to_voxel
    if max_points is not None:
        end = torch.minimum(end, start + max_points)
        position = torch.arange(n_points, device=device)
        held = position < torch.cat([end, end.new_zeros(1)])[voxel]
        reduced_to = torch.empty_like(voxel)
        reduced_to[perm] = torch.where(held, voxel, -1)
    feats = padded = None
    if reduce == "none":
        assert max_points is not None
        padded = _padded(points, perm, start, end, max_points)
    elif reduce == "first":
        feats = points[perm[start]]
    else:
        feats = reduce_segments(points, reduced_to, perm, start, end, reduce)
    return Voxels(
        feats=feats,
        coords=grid.coords(keys[start]),
        point_to_voxel=point_to_voxel,
        num_points=(end - start).int(),
        grid_shape=grid.shape,
        points=padded,
    )


def _check(
    points: Tensor,
    voxel_size: Sequence[float],
    point_range: Sequence[float],
    batch_index: Tensor | None,
    reduce: str,
    max_points: int | None,
    max_voxels: int | None,
) -> None:
    check_tensor("voxelize: points", points)
    ndim = len(voxel_size)
    if not points.is_floating_point():
        raise TypeError(f"voxelize: points must be floating point; got {points.dtype}.")
    if not 1 <= ndim <= 4 or min(voxel_size) <= 0:
        raise ValueError(
            f"voxelize: voxel_size must be 1 to 4 positive lengths; got {tuple(voxel_size)}."
        )
    if len(point_range) != 2 * ndim:
        raise ValueError(
            f"voxelize: point_range must be a lower and an upper corner, {2 * ndim} numbers for "
            f"{ndim} voxel sizes; got {tuple(point_range)}."
        )
    if points.ndim != 2 or points.shape[1] < ndim:
        raise ValueError(
            f"voxelize: points must have shape [P, F] with F >= {ndim}, positions first; got "
            f"{list(points.shape)}."
        )
    if reduce not in get_args(VoxelReduce):
        raise ValueError(
            f"voxelize: reduce must be one of {get_args(VoxelReduce)}; got {reduce!r}."
        )
    if reduce == "none" and max_points is None:
        raise ValueError('voxelize: reduce="none" pads to max_points; got max_points=None.')
    for name, value in (("max_points", max_points), ("max_voxels", max_voxels)):
        if value is not None:
            whole_number(f"voxelize: {name}", value, least=1)
    if batch_index is None:
        return
    if batch_index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"voxelize: batch_index must be int32 or int64; got {batch_index.dtype}.")
    if batch_index.shape != points.shape[:1]:
        raise ValueError(
            f"voxelize: batch_index must have shape [{points.shape[0]}] to match points; got "
            f"{list(batch_index.shape)}."
        )
    if batch_index.device != points.device:
        raise ValueError(
            f"voxelize: points and batch_index must share a device; got {points.device} and "
            f"{batch_index.device}."
        )


def _check_orders(order: str, row_order: str) -> None:
    if order not in get_args(AxisOrder):
        raise ValueError(f"voxelize: order must be one of {get_args(AxisOrder)}; got {order!r}.")
    if row_order not in get_args(RowOrder):
        raise ValueError(
            f"voxelize: row_order must be one of {get_args(RowOrder)}; got {row_order!r}."
        )


def _cells(
    points: Tensor,
    voxel_size: Sequence[float],
    point_range: Sequence[float],
    batch_index: Tensor | None,
    order: AxisOrder,
) -> tuple[Grid, Tensor]:
    """Return the grid, and the cell of each point [P, 1 + D]: outside the grid if dropped."""
    ndim = len(voxel_size)
    axes = list(zip(point_range[:ndim], point_range[ndim:], voxel_size, strict=True))
    # Half rounds up, where Python would round it to even.
    shape = tuple(math.floor((high - low) / size + 0.5) for low, high, size in axes)
    if min(shape) < 1:
        raise ValueError(
            f"voxelize: point_range must hold at least one voxel along every axis; got "
            f"{tuple(point_range)} with voxel_size {tuple(voxel_size)}."
        )
    lower, _, size = torch.tensor(axes, dtype=torch.float32, device=points.device).unbind(1)
    # The divisor is a tensor, because a GPU would replace a number by its reciprocal, which rounds
    # differently.
    cell = ((points.detach()[:, :ndim].float() - lower) / size).floor()
    extent = torch.tensor(shape, device=points.device)
    cell = torch.where((cell >= 0) & (cell < extent), cell, -1).int()
    if order == "zyx":
        cell, shape = cell.flip(1), shape[::-1]
    if batch_index is None:
        batch_index = torch.zeros(points.shape[0], dtype=torch.int32, device=points.device)
    batch_size = max(min(_MAX_BATCH, _MAX_CELLS // math.prod(shape)), 1)
    grid = Grid((0,) * ndim, shape, batch_size)
    return grid, torch.cat([batch_index.int()[:, None], cell], dim=1)


def _first_seen(first_point: Tensor, sample: Tensor | None, limit: int | None) -> Tensor:
    """Return voxels in the order of their first points, at most ``limit`` of each sample."""
    by_point = first_point.argsort()
    if limit is None or sample is None:
        return by_point[:limit]
    by_sample = by_point[sample[by_point].argsort(stable=True)]
    ordered = sample[by_sample]
    rank = torch.arange(ordered.shape[0], device=ordered.device)
    rank = rank - torch.searchsorted(ordered, ordered)
    kept = by_sample[rank < limit]
    return kept[first_point[kept].argsort()]


def _padded(points: Tensor, perm: Tensor, start: Tensor, end: Tensor, max_points: int) -> Tensor:
    """Return the points of every voxel [N, max_points, F], zeros behind them."""
    position = start[:, None] + torch.arange(max_points, device=points.device)
    held = position < end[:, None]
    taken = points[perm[torch.where(held, position, start[:, None])]]
    return torch.where(held[..., None], taken, 0)
