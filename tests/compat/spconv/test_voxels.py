"""Voxel generators: zyx indices, first-touch order, limits, ids."""

import numpy as np
import pytest
import torch

import compat.spconv.pytorch as spconv
from compat.spconv import utils
from compat.spconv.pytorch.utils import PointToVoxel, gather_features_by_pc_voxel_id

VSIZE, RANGE = [0.5, 1.0, 1.0], [0, 0, 0, 4, 3, 2]


def brute_force(points, max_voxels, max_points):
    order, ids = {}, []
    for point in points.tolist():
        cell = tuple(int((p - 0) // v) for p, v in zip(point, VSIZE, strict=False))
        inside = all(0 <= c < n for c, n in zip(cell, (8, 3, 2), strict=True))
        if inside and (cell in order or len(order) < max_voxels):
            ids.append(order.setdefault(cell, len(order)))
        else:
            ids.append(-1)
    voxels = torch.zeros(len(order), max_points, points.shape[1])
    counts = torch.zeros(len(order), dtype=torch.int32)
    for point, voxel in zip(points, ids, strict=True):
        if voxel >= 0 and counts[voxel] < max_points:
            voxels[voxel, counts[voxel]] = point
            counts[voxel] += 1
    indices = torch.tensor([cell[::-1] for cell in order], dtype=torch.int32).reshape(-1, 3)
    return voxels, indices, counts, torch.tensor(ids)


@pytest.mark.parametrize(("max_voxels", "max_points"), [(100, 10), (9, 10), (100, 2)])
def test_point_to_voxel_matches_a_loop_over_points(device, max_voxels, max_points):
    points = torch.rand(200, 4) * 5 - 0.5
    generator = PointToVoxel(
        vsize_xyz=VSIZE,
        coors_range_xyz=RANGE,
        num_point_features=4,
        max_num_voxels=max_voxels,
        max_num_points_per_voxel=max_points,
        device=device,
    )
    expected = brute_force(points, max_voxels, max_points)
    found = generator.generate_voxel_with_id(points.to(device))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)
        assert ours.dtype == theirs.dtype
    for ours, theirs in zip(generator(points.to(device)), expected[:3], strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_attributes_are_in_zyx_order():
    generator = PointToVoxel(VSIZE, RANGE, 4, 10, 3)
    assert generator.ndim == 3
    assert generator.vsize == [1.0, 1.0, 0.5]
    assert generator.grid_size == [2, 3, 8]
    assert generator.grid_stride == [24, 8, 1]
    assert generator.coors_range == [0, 0, 0, 2, 3, 4]
    assert generator.max_num_voxels == 10
    assert generator.max_num_points_per_voxel == 3
    assert generator.num_point_features == 4
    assert generator.device.type == "cpu"


def test_empty_mean_fills_unused_slots(device):
    points = torch.tensor([[0.1, 0.1, 0.1, 2.0], [0.2, 0.1, 0.1, 4.0], [3.0, 0.1, 0.1, 7.0]])
    generator = PointToVoxel(VSIZE, RANGE, 4, 10, 3, device)
    voxels, _, counts = generator(points.to(device), empty_mean=True)
    assert counts.tolist() == [2, 1]
    torch.testing.assert_close(voxels[0, 2].cpu(), points[:2].mean(0))
    torch.testing.assert_close(voxels[1].cpu(), points[2].expand(3, 4))


def test_no_points_give_no_voxels(device):
    voxels, indices, counts = PointToVoxel(VSIZE, RANGE, 4, 10, 3, device)(
        torch.zeros(0, 4, device=device)
    )
    assert (voxels.shape, indices.shape, counts.shape) == ((0, 3, 4), (0, 3), (0,))


def test_wrong_points_raise():
    generator = PointToVoxel(VSIZE, RANGE, 4, 10, 3)
    with pytest.raises(RuntimeError, match=r"\[N, 4\]"):
        generator(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="device="):
        generator(torch.zeros(2, 4, device="meta"))
    with pytest.raises(ValueError, match="6 numbers"):
        PointToVoxel(VSIZE, [0, 0, 0], 4, 10, 3)
    with pytest.raises(ValueError, match=r"must be positive; got \[0\.0, 1\.0, 1\.0\]"):
        PointToVoxel([0, 1, 1], RANGE, 4, 10, 3)
    with pytest.raises(TypeError, match=r"got ndarray\. Use torch\.from_numpy"):
        generator(np.zeros((2, 4), np.float32))


def test_gather_features_by_pc_voxel_id():
    features = torch.arange(6.0).reshape(3, 2)
    ids = torch.tensor([2, -1, 0])
    out = gather_features_by_pc_voxel_id(features, ids, invalid_value=7)
    assert out.tolist() == [[4, 5], [7, 7], [0, 1]]
    assert gather_features_by_pc_voxel_id(features[:, 0], ids).tolist() == [4, 0, 0]


class TvTensor:
    """Stands in for a tensor of another library that only knows ``.numpy()``."""

    def __init__(self, array):
        self.array = array

    def numpy(self):
        return self.array


@pytest.mark.parametrize(
    "wrap", [torch.as_tensor, lambda t: t.numpy(), lambda t: TvTensor(t.numpy())]
)
def test_point2voxel_cpu_takes_arrays_and_returns_what_numpy_reads(wrap):
    points = torch.rand(50, 4) * 4
    generator = utils.Point2VoxelCPU3d(
        vsize_xyz=VSIZE,
        coors_range_xyz=RANGE,
        num_point_features=4,
        max_num_points_per_voxel=3,
        max_num_voxels=10,
    )
    assert generator.grid_size == [2, 3, 8]
    voxels, indices, counts = generator.point_to_voxel(wrap(points))
    expected = PointToVoxel(VSIZE, RANGE, 4, 10, 3)(points)
    for ours, theirs in zip((voxels, indices, counts), expected, strict=True):
        assert (ours.numpy() == theirs.numpy()).all()
    assert generator.point_to_voxel_empty_mean(wrap(points))[0].shape == voxels.shape


def test_results_of_one_call_outlive_the_next():
    generator = utils.Point2VoxelCPU3d(np.array(VSIZE), np.float32(RANGE), 4, 10, 3)
    points = torch.rand(50, 4) * 4
    first = [result.numpy_view() for result in generator.point_to_voxel(points)]
    kept = [array.copy() for array in first]
    generator.point_to_voxel(points.flip(0))
    for array, expected in zip(first, kept, strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("ndim", [1, 2, 4])
def test_point2voxel_cpu_of_other_dimensions(ndim):
    kind = getattr(utils, f"Point2VoxelCPU{ndim}d")
    generator = kind([1.0] * ndim, [0] * ndim + [3] * ndim, 5, 10, 3)
    assert generator.point_to_voxel(torch.rand(20, 5) * 3)[1].shape[1] == ndim
    with pytest.raises(ValueError, match="voxel sizes"):
        kind([1.0] * 3 if ndim != 3 else [1.0], RANGE, 5, 10, 3)


def test_calc_meta_data():
    expected = ([1.0, 1.0, 0.5], [2, 3, 8], [24, 8, 1], [0, 0, 0, 2, 3, 4])
    assert utils.Point2VoxelCPU3d.calc_meta_data(VSIZE, RANGE) == expected


def test_voxels_feed_a_network():
    points = torch.rand(300, 4) * 4
    voxels, indices, counts = PointToVoxel(VSIZE, RANGE, 4, 100, 5)(points)
    mean = voxels.sum(1) / counts[:, None]
    batched = torch.nn.functional.pad(indices, (1, 0))
    x = spconv.SparseConvTensor(mean, batched, [2, 3, 8], 1)
    assert spconv.SubMConv3d(4, 8, 3)(x).features.shape == (len(mean), 8)
