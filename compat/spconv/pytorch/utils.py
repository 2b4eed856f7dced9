"""Point clouds to voxels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compat.spconv._names import module_getattr
from compat.spconv.pytorch._errors import SpconvError
from tritonspconv import ops

__all__ = ["PointToVoxel", "gather_features_by_pc_voxel_id"]

__getattr__ = module_getattr(
    __name__,
    modules={"tv": "compat.cumm.tensorview"},
    elsewhere={"compat.spconv.pytorch.cppcore": "get_current_stream torch_tensor_to_tv"},
    refused={"SpconvOps": "It is spconv's C++; use PointToVoxel."},
)


def voxel_grid(
    vsize_xyz: Sequence[float], coors_range_xyz: Sequence[float]
) -> tuple[list[float], list[int], list[int], list[float]]:
    """Return voxel size, grid size, strides of a flat voxel index and range, all in zyx order."""
    ndim = len(vsize_xyz)
    if len(coors_range_xyz) != 2 * ndim:
        raise SpconvError(
            f"coors_range_xyz must hold {2 * ndim} numbers, lower then upper corner, for "
            f"{ndim} voxel sizes; got {list(coors_range_xyz)}."
        )
    vsize = [float(v) for v in vsize_xyz][::-1]
    if min(vsize) <= 0:
        raise SpconvError(f"voxel sizes must be positive; got {vsize[::-1]} along x, y, z, ...")
    lower = [float(v) for v in coors_range_xyz[:ndim]][::-1]
    upper = [float(v) for v in coors_range_xyz[ndim:]][::-1]
    axes = zip(lower, upper, vsize, strict=True)
    # Half rounds up, where Python would round it to even.
    grid_size = [int((high - low) / size + 0.5) for low, high, size in axes]
    grid_stride = [1] * ndim
    for axis in range(ndim - 2, -1, -1):
        grid_stride[axis] = grid_stride[axis + 1] * grid_size[axis + 1]
    return vsize, grid_size, grid_stride, lower + upper


class PointToVoxel:
    """Group the points of one sample by voxel.

    Voxels come in the order of their first points and keep the first
    ``max_num_points_per_voxel`` of them, on every device.

    Args:
        vsize_xyz: Edge lengths of a voxel along x, y, z, ...
        coors_range_xyz: Lower corner, then upper corner.
        num_point_features: Columns of a point cloud; positions first.
        max_num_voxels: Voxels beyond this number are rejected. The voxels of later points are
            rejected first.
        max_num_points_per_voxel: Points that a voxel holds.
        device: Device of the point clouds.

    Attributes:
        vsize, grid_size, grid_stride, coors_range: The grid, in zyx order like ``indices``.
    """

    def __init__(
        self,
        vsize_xyz: Sequence[float],
        coors_range_xyz: Sequence[float],
        num_point_features: int,
        max_num_voxels: int,
        max_num_points_per_voxel: int,
        device: torch.device = torch.device("cpu:0"),  # noqa: B008 - immutable
    ) -> None:
        self.ndim = len(vsize_xyz)
        self.device = torch.device(device)
        self.num_point_features = num_point_features
        self.max_num_voxels = max_num_voxels
        self.max_num_points_per_voxel = max_num_points_per_voxel
        grid = voxel_grid(vsize_xyz, coors_range_xyz)
        self.vsize, self.grid_size, self.grid_stride, self.coors_range = grid
        self._vsize_xyz = tuple(vsize_xyz)
        self._range_xyz = tuple(coors_range_xyz)

    def __call__(
        self, pc: Tensor, clear_voxels: bool = True, empty_mean: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return voxels, indices and counts; see :meth:`generate_voxel_with_id`."""
        return self.generate_voxel_with_id(pc, clear_voxels, empty_mean)[:3]

    def generate_voxel_with_id(
        self, pc: Tensor, clear_voxels: bool = True, empty_mean: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Group points.

        Args:
            pc: Points ``[N, num_point_features]``.
            clear_voxels: Accepted; every call starts from empty voxels.
            empty_mean: Fill the unused slots of a voxel with its mean instead of zeros.

        Returns:
            Voxels, float32 ``[V, max_num_points_per_voxel, num_point_features]``; indices, int32
            ``[V, ndim]`` in zyx order, without batch column; points per voxel, int32 ``[V]``; the
            voxel of each point, int64 ``[N]``, -1 for points out of range or in rejected voxels.

        Raises:
            TypeError: ``pc`` is no tensor.
            SpconvError: ``pc`` has another number of columns or is on another kind of device.
        """
        if not isinstance(pc, Tensor):
            raise TypeError(
                f"PointToVoxel: pc must be a torch.Tensor; got {type(pc).__name__}. Use "
                "torch.from_numpy, or Point2VoxelCPU3d for arrays."
            )
        if pc.ndim != 2 or pc.shape[1] != self.num_point_features:
            raise SpconvError(
                f"PointToVoxel: pc must be [N, {self.num_point_features}]; got {list(pc.shape)}."
            )
        if pc.device.type != self.device.type:
            raise SpconvError(
                f"PointToVoxel was made for {self.device}; got points on {pc.device}. Pass "
                "device= to PointToVoxel."
            )
        found = ops.voxelize(
            pc.float(),
            self._vsize_xyz,
            self._range_xyz,
            reduce="none",
            max_points=self.max_num_points_per_voxel,
            max_voxels=self.max_num_voxels,
            row_order="first_seen",
        )
        voxels, counts = found.points, found.num_points
        assert voxels is not None
        if empty_mean:
            mean = voxels.sum(1, keepdim=True) / counts[:, None, None]
            slots = torch.arange(voxels.shape[1], device=voxels.device)
            voxels = torch.where((slots < counts[:, None])[..., None], voxels, mean)
        return voxels, found.coords[:, 1:].contiguous(), counts, found.point_to_voxel


def gather_features_by_pc_voxel_id(
    seg_res_features: Tensor, pc_voxel_id: Tensor, invalid_value: int | float = 0
) -> Tensor:
    """Give every point the features of its voxel.

    Args:
        seg_res_features: Features by voxel ``[V, C]``.
        pc_voxel_id: Voxel of each point ``[N]``; negative: none.
        invalid_value: The value for points without a voxel.

    Returns:
        ``[N, C]``.
    """
    valid = pc_voxel_id >= 0
    out = seg_res_features.new_full(
        (pc_voxel_id.shape[0], *seg_res_features.shape[1:]), invalid_value
    )
    out[valid] = seg_res_features[pc_voxel_id[valid]]
    return out
