"""Point2VoxelGPU, and the voxel generators that write into the caller's buffers."""

import numpy as np
import pytest
import torch

from compat.spconv import utils
from compat.spconv.pytorch.utils import PointToVoxel

ARGUMENTS = {
    1: ([0.5], [0.0, 4.0]),
    2: ([0.5, 1.0], [0.0, -2.0, 4.0, 2.0]),
    3: ([0.5, 1.0, 0.25], [0.0, -2.0, 0.0, 4.0, 2.0, 1.0]),
    4: ([0.5, 1.0, 0.25, 1.0], [0.0, -2.0, 0.0, 0.0, 4.0, 2.0, 1.0, 2.0]),
}


def generator(kind, ndim, max_voxels=9, max_points=3):
    cls = getattr(utils, f"Point2Voxel{kind}{ndim}d")
    return cls(*ARGUMENTS[ndim], ndim + 1, max_voxels, max_points)


def points_for(ndim, device, n=80):
    lower, upper = (torch.tensor(ARGUMENTS[ndim][1]).view(2, ndim) + 0).unbind()
    cloud = torch.rand(n, ndim + 1)
    cloud[:, :ndim] = lower - 0.2 + cloud[:, :ndim] * (upper - lower + 0.4)
    return cloud.to(device)


def buffers(ndim, device, n=80, fill=7.0):
    return (
        torch.full((9, 3, ndim + 1), fill, device=device),
        torch.full((9, ndim), -5, dtype=torch.int32, device=device),
        torch.full((9,), -5, dtype=torch.int32, device=device),
        torch.empty(0),
        torch.full((n,), -5, dtype=torch.int64, device=device),
    )


@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
@pytest.mark.parametrize("empty_mean", [False, True])
def test_point_to_voxel_hash_is_point_to_voxel(ndim, empty_mean, device):
    cloud = points_for(ndim, device)
    made = generator("GPU", ndim)
    expected = PointToVoxel(*ARGUMENTS[ndim], ndim + 1, 9, 3, device)(cloud, empty_mean=empty_mean)
    for got, want in zip(
        made.point_to_voxel_hash(cloud, True, empty_mean, stream_int=0), expected, strict=True
    ):
        assert torch.equal(got, want)
        assert got.device.type == device.type
    assert made.grid_size == generator("CPU", ndim).grid_size


@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
@pytest.mark.parametrize("empty_mean", [False, True])
def test_static_generators_fill_the_buffers(ndim, empty_mean, device):
    cloud = points_for(ndim, device)
    full = PointToVoxel(*ARGUMENTS[ndim], ndim + 1, 9, 3, device)
    expected = full.generate_voxel_with_id(cloud, empty_mean=empty_mean)
    cls = getattr(utils, f"Point2VoxelCPU{ndim}d")
    meta = cls.calc_meta_data(*ARGUMENTS[ndim])
    voxels, indices, counts, unused, ids = buffers(ndim, device)
    if device.type == "cuda":
        run = getattr(utils, f"Point2VoxelGPU{ndim}d").point_to_voxel_hash_static
        extra = (unused, unused, ids, *meta, True, empty_mean)
    else:
        run = cls.point_to_voxel_empty_mean_static if empty_mean else cls.point_to_voxel_static
        extra = (unused, ids, *meta)
    got = run(cloud, voxels, indices, counts, *extra)
    for filled, want, buffer in zip(got, expected, (voxels, indices, counts), strict=False):
        assert torch.equal(filled, want)
        assert filled.data_ptr() == buffer.data_ptr()
    n = got[0].shape[0]
    assert torch.equal(ids, expected[3])
    assert not voxels[n:].any()
    assert not counts[n:].any()
    assert (indices[n:] == -5).all()


@pytest.mark.parametrize(("options", "rest"), [({}, 0), ({"clear_voxels": False}, 7)])
def test_voxels_that_are_not_cleared_keep_their_other_slots(options, rest):
    cls = utils.Point2VoxelGPU2d
    meta = utils.Point2VoxelCPU2d.calc_meta_data(*ARGUMENTS[2])
    voxels, indices, counts, unused, ids = buffers(2, "cpu", n=1)
    cloud = torch.tensor([[0.1, -1.9, 3.0]])
    cls.point_to_voxel_hash_static(
        cloud, voxels, indices, counts, unused, unused, ids, *meta, **options
    )
    assert torch.equal(voxels[0, 0], cloud[0])
    assert (voxels[0, 1:] == rest).all()
    assert (voxels[1:] == rest).all()


def test_static_generator_takes_arrays_and_writes_into_them():
    meta = utils.Point2VoxelCPU3d.calc_meta_data(*ARGUMENTS[3])
    cloud = points_for(3, "cpu").numpy()
    voxels, indices, counts, unused, ids = (t.numpy() for t in buffers(3, "cpu"))
    got = utils.Point2VoxelCPU3d.point_to_voxel_static(
        cloud, voxels, indices, counts, unused, ids, *meta
    )
    assert np.array_equal(got[2].numpy(), counts[: len(got[2])])
    assert np.array_equal(voxels, got[0].numpy())
    assert (ids >= -1).all()


def test_wrong_grid_size_and_number_of_axes_are_named():
    vsize, grid_size, stride, coors_range = utils.Point2VoxelCPU2d.calc_meta_data(*ARGUMENTS[2])
    voxels, indices, counts, unused, ids = buffers(2, "cpu")
    with pytest.raises(ValueError, match=r"grid_size must be \[4, 8\], zyx"):
        utils.Point2VoxelCPU2d.point_to_voxel_static(
            points_for(2, "cpu"), voxels, indices, counts, unused, ids,
            vsize, grid_size[::-1], stride, coors_range,
        )  # fmt: skip
    with pytest.raises(ValueError, match="Point2VoxelGPU3d needs 3 voxel sizes"):
        utils.Point2VoxelGPU3d(*ARGUMENTS[2], 3, 9, 3)
