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

from compat.cumm import tensorview as tv
from compat.spconv._names import module_getattr
from compat.spconv.pytorch._errors import SpconvError
from compat.spconv.pytorch.utils import PointToVoxel, voxel_grid

__all__ = [
    "Point2VoxelCPU1d",
    "Point2VoxelCPU2d",
    "Point2VoxelCPU3d",
    "Point2VoxelCPU4d",
    "Point2VoxelGPU1d",
    "Point2VoxelGPU2d",
    "Point2VoxelGPU3d",
    "Point2VoxelGPU4d",
    "non_max_suppression_cpu",
    "nullcontext",
    "rbbox_intersection",
    "rbbox_iou",
    "rbbox_iou_loss",
    "rotate_non_max_suppression_cpu",
]


class _Point2Voxel:
    """The base of the generators for both kinds of device.

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
        self._arguments = (
            vsize_xyz,
            coors_range_xyz,
            num_point_features,
            max_num_voxels,
            max_num_points_per_voxel,
        )
        self._generator = PointToVoxel(*self._arguments)

    @property
    def grid_size(self) -> list[int]:
        """Cells along each axis, zyx."""
        return self._generator.grid_size


class _Point2VoxelCPU(_Point2Voxel):
    """Group the points of one sample by voxel, on the CPU.

    Arguments are arrays, tensors, or objects with ``.numpy()``. Results are CPU tensors, whose
    ``.numpy()`` and ``.numpy_view()`` give arrays; ``torch.from_numpy`` may replace
    ``cumm.tensorview.from_numpy``.

    The static methods write into the caller's buffers and return their filled parts.
    """

    @staticmethod
    def calc_meta_data(
        vsize_xyz: Sequence[float], coors_range_xyz: Sequence[float]
    ) -> tuple[list[float], list[int], list[int], list[float]]:
        """Return voxel size, grid size, grid strides and range, all in zyx order."""
        return voxel_grid(vsize_xyz, coors_range_xyz)

    @staticmethod
    def point_to_voxel_static(
        points: Any,
        voxels: Any,
        indices: Any,
        num_per_voxel: Any,
        densehashdata: Any,
        points_voxel_id: Any,
        vsize: Sequence[float],
        grid_size: Sequence[int],
        grid_stride: Sequence[int],
        coors_range: Sequence[float],
        clear_voxels: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Group points into buffers; see :func:`_fill_buffers`. ``densehashdata`` is not used."""
        return _fill_buffers(
            points, voxels, indices, num_per_voxel, points_voxel_id,
            vsize, grid_size, coors_range, clear_voxels,
        )  # fmt: skip

    @staticmethod
    def point_to_voxel_empty_mean_static(
        points: Any,
        voxels: Any,
        indices: Any,
        num_per_voxel: Any,
        densehashdata: Any,
        points_voxel_id: Any,
        vsize: Sequence[float],
        grid_size: Sequence[int],
        grid_stride: Sequence[int],
        coors_range: Sequence[float],
        clear_voxels: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do the same, and fill unused slots of a voxel with its mean."""
        return _fill_buffers(
            points, voxels, indices, num_per_voxel, points_voxel_id,
            vsize, grid_size, coors_range, clear_voxels, empty_mean=True,
        )  # fmt: skip

    def point_to_voxel(
        self, points: Any, clear_voxels: bool = True
    ) -> tuple[tv.Tensor, tv.Tensor, tv.Tensor]:
        """Return voxels ``[V, P, F]``, indices ``[V, ndim]`` in zyx order and counts ``[V]``."""
        return _with_views(self._generator(_as_tensor(points), clear_voxels))

    def point_to_voxel_empty_mean(
        self, points: Any, clear_voxels: bool = True
    ) -> tuple[tv.Tensor, tv.Tensor, tv.Tensor]:
        """Return the same, with the voxel's mean in its unused slots."""
        return _with_views(self._generator(_as_tensor(points), clear_voxels, empty_mean=True))


class _Point2VoxelGPU(_Point2Voxel):
    """Group the points of one sample by voxel, on the device of the points.

    Arguments are tensors, or objects that can become numpy arrays. Results are tensors on the same
    device. Voxels come in the order of their first points and keep their first points, as on the
    CPU.
    """

    def point_to_voxel_hash(
        self,
        points: Any,
        clear_voxels: bool = True,
        empty_mean: bool = False,
        stream_int: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return voxels ``[V, P, F]``, indices ``[V, ndim]`` in zyx order and counts ``[V]``.

        Args:
            points: ``[N, num_point_features]``.
            clear_voxels: Accepted; every call starts from empty voxels.
            empty_mean: Fill the unused slots of a voxel with its mean instead of zeros.
            stream_int: Accepted; the work runs on torch's current stream.
        """
        points = _as_tensor(points)
        return PointToVoxel(*self._arguments, points.device)(points, clear_voxels, empty_mean)

    @staticmethod
    def point_to_voxel_hash_static(
        points: Any,
        voxels: Any,
        indices: Any,
        num_per_voxel: Any,
        hashdata: Any,
        point_indice_data: Any,
        points_voxel_id: Any,
        vsize: Sequence[float],
        grid_size: Sequence[int],
        grid_stride: Sequence[int],
        coors_range: Sequence[float],
        clear_voxels: bool = True,
        empty_mean: bool = False,
        stream_int: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Group points into buffers; see :func:`_fill_buffers`. The hash data are not used."""
        return _fill_buffers(
            points, voxels, indices, num_per_voxel, points_voxel_id,
            vsize, grid_size, coors_range, clear_voxels, empty_mean,
        )  # fmt: skip


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


class Point2VoxelGPU1d(_Point2VoxelGPU):
    """Voxels along one axis."""

    _ndim = 1


class Point2VoxelGPU2d(_Point2VoxelGPU):
    """Voxels in the plane."""

    _ndim = 2


class Point2VoxelGPU3d(_Point2VoxelGPU):
    """Voxels in space."""

    _ndim = 3


class Point2VoxelGPU4d(_Point2VoxelGPU):
    """Voxels in four dimensions."""

    _ndim = 4


def _as_tensor(points: Any) -> Tensor:
    if isinstance(points, Tensor):
        return points
    return torch.as_tensor(points.numpy() if hasattr(points, "numpy") else points)


def _fill_buffers(
    points: Any,
    voxels: Any,
    indices: Any,
    num_per_voxel: Any,
    points_voxel_id: Any,
    vsize: Sequence[float],
    grid_size: Sequence[int],
    coors_range: Sequence[float],
    clear_voxels: bool,
    empty_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Group points and write the result into the caller's buffers.

    Args:
        points: ``[N, F]``.
        voxels: ``[max voxels, max points per voxel, F]``, written in place, like the next three.
        indices: ``[max voxels, ndim]``, zyx.
        num_per_voxel: ``[max voxels]``.
        points_voxel_id: ``[N]``, the voxel of each point or -1.
        vsize: Edge lengths of a voxel, zyx.
        grid_size: Cells along each axis, zyx.
        coors_range: Lower corner, then upper corner, zyx.
        clear_voxels: Zero ``voxels`` first; otherwise slots without a point keep their old values.
        empty_mean: Fill the unused slots of a voxel with its mean.

    Returns:
        The filled parts of ``voxels``, ``indices`` and ``num_per_voxel``.

    Raises:
        SpconvError: ``grid_size`` does not fit the range.
    """
    points, voxels, indices = _as_tensor(points), _as_tensor(voxels), _as_tensor(indices)
    num_per_voxel, points_voxel_id = _as_tensor(num_per_voxel), _as_tensor(points_voxel_id)
    ndim = len(vsize)
    generator = PointToVoxel(
        list(vsize)[::-1],
        [*coors_range[:ndim][::-1], *coors_range[ndim:][::-1]],
        voxels.shape[2],
        voxels.shape[0],
        voxels.shape[1],
        points.device,
    )
    if generator.grid_size != list(grid_size):
        raise SpconvError(
            f"grid_size must be {generator.grid_size}, zyx, for voxels of {list(vsize)} in "
            f"{list(coors_range)}; got {list(grid_size)}. Take it from calc_meta_data."
        )
    found, coords, counts, ids = generator.generate_voxel_with_id(points, empty_mean=empty_mean)
    num_per_voxel.zero_()
    if clear_voxels:
        voxels.zero_()
    n = found.shape[0]
    slots = torch.arange(voxels.shape[1], device=voxels.device)
    filled = torch.ones_like(slots).bool() if empty_mean else slots < counts[:, None]
    voxels[:n] = torch.where(filled[..., None], found.to(voxels.dtype), voxels[:n])
    indices[:n] = coords
    num_per_voxel[:n] = counts
    points_voxel_id[: ids.shape[0]] = ids
    return _with_views((voxels[:n], indices[:n], num_per_voxel[:n]))


def _with_views(found: tuple[Tensor, Tensor, Tensor]) -> tuple[tv.Tensor, tv.Tensor, tv.Tensor]:
    """Return the tensors as ``cumm.tensorview`` has them, with ``.numpy_view()``."""
    voxels, indices, counts = (tensor.as_subclass(tv.Tensor) for tensor in found)
    return voxels, indices, counts


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

__getattr__ = module_getattr(
    __name__,
    elsewhere={"compat.spconv.cppconstants": "CPU_ONLY_BUILD"},
    refused={
        "BoxOps": "Box operations are no part of this library; use torchvision.ops or mmcv.ops.",
        "VoxelGenerator VoxelGeneratorV2": "It belongs to spconv 1.x; use Point2VoxelCPU3d.",
    },
)
