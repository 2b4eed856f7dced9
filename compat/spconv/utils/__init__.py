"""Voxel generators of ``spconv.utils``.

``VoxelGenerator`` and ``VoxelGeneratorV2`` of spconv 1.x are absent on purpose: downstream code
takes its 1.x path where it finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from compat.spconv.pytorch._errors import missing_names
from compat.spconv.pytorch.utils import PointToVoxel, voxel_grid

__all__ = [
    "Point2VoxelCPU1d",
    "Point2VoxelCPU2d",
    "Point2VoxelCPU3d",
    "Point2VoxelCPU4d",
    "non_max_suppression_cpu",
    "nullcontext",
    "rbbox_intersection",
    "rbbox_iou",
    "rbbox_iou_loss",
    "rotate_non_max_suppression_cpu",
]


class _Point2VoxelCPU:
    """Group the points of one sample by voxel, on the CPU.

    Takes anything that is or turns into a numpy array: arrays, tensors, objects with ``.numpy()``.
    Returns CPU tensors, whose ``.numpy()`` gives arrays; ``torch.from_numpy`` can stand in for
    ``cumm.tensorview.from_numpy``.

    Args:
        vsize_xyz: Edge lengths of a voxel along x, y, z, ...
        coors_range_xyz: Lower corner, then upper corner.
        num_point_features: Columns of a point cloud; positions first.
        max_num_voxels: Voxels beyond this number are rejected.
        max_num_points_per_voxel: Points that a voxel holds.
    """

    _ndim: ClassVar[int]

    def __init__(
        self,
        vsize_xyz: Sequence[float],
        coors_range_xyz: Sequence[float],
        num_point_features: int,
        max_num_voxels: int,
        max_num_points_per_voxel: int,
    ) -> None:
        if len(vsize_xyz) != self._ndim:
            raise ValueError(
                f"{type(self).__name__} needs {self._ndim} voxel sizes; got {list(vsize_xyz)}."
            )
        self._generator = PointToVoxel(
            vsize_xyz,
            coors_range_xyz,
            num_point_features,
            max_num_voxels,
            max_num_points_per_voxel,
        )

    @property
    def grid_size(self) -> list[int]:
        """Cells along each axis, zyx."""
        return self._generator.grid_size

    @staticmethod
    def calc_meta_data(
        vsize_xyz: Sequence[float], coors_range_xyz: Sequence[float]
    ) -> tuple[list[float], list[int], list[int], list[float]]:
        """Return voxel size, grid size, grid strides and range, all in zyx order."""
        return voxel_grid(vsize_xyz, coors_range_xyz)

    def point_to_voxel(
        self, points: Any, clear_voxels: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return voxels ``[V, P, F]``, indices ``[V, ndim]`` in zyx order and counts ``[V]``."""
        return self._generator(_as_tensor(points), clear_voxels)

    def point_to_voxel_empty_mean(
        self, points: Any, clear_voxels: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same with unused slots of a voxel filled with its mean."""
        return self._generator(_as_tensor(points), clear_voxels, empty_mean=True)


class Point2VoxelCPU1d(_Point2VoxelCPU):
    """Voxels along one axis."""

    _ndim = 1


class Point2VoxelCPU2d(_Point2VoxelCPU):
    """Voxels in the plane."""

    _ndim = 2


class Point2VoxelCPU3d(_Point2VoxelCPU):
    """Voxels in space."""

    _ndim = 3


class Point2VoxelCPU4d(_Point2VoxelCPU):
    """Voxels in four dimensions."""

    _ndim = 4


def _as_tensor(points: Any) -> Tensor:
    if isinstance(points, Tensor):
        return points
    return torch.as_tensor(points.numpy() if hasattr(points, "numpy") else points)


def _box_operation(name: str, alternative: str) -> Any:
    def absent(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"spconv.utils.{name} is not provided: box operations are no part of this library. "
            f"Use {alternative}."
        )

    absent.__name__ = absent.__qualname__ = name
    absent.__doc__ = f"Importable, but not provided; use {alternative}."
    return absent


_ROTATED_IOU = "mmcv.ops.box_iou_rotated or the box operations of your detection framework"
_NMS = "torchvision.ops.nms, mmcv.ops.nms_rotated or those of your detection framework"

rbbox_iou = _box_operation("rbbox_iou", _ROTATED_IOU)
rbbox_intersection = _box_operation("rbbox_intersection", _ROTATED_IOU)
rbbox_iou_loss = _box_operation("rbbox_iou_loss", _ROTATED_IOU)
non_max_suppression_cpu = _box_operation("non_max_suppression_cpu", _NMS)
rotate_non_max_suppression_cpu = _box_operation("rotate_non_max_suppression_cpu", _NMS)

__getattr__ = missing_names(
    __name__,
    {
        **{
            f"Point2VoxelGPU{ndim}d": "Use compat.spconv.pytorch.utils.PointToVoxel(device=...)."
            for ndim in (1, 2, 3, 4)
        },
        "BoxOps": "Box operations are no part of this library.",
        "VoxelGenerator": "It belongs to spconv 1.x; use Point2VoxelCPU3d.",
        "VoxelGeneratorV2": "It belongs to spconv 1.x; use Point2VoxelCPU3d.",
    },
)
