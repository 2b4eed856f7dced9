"""Voxelisation against a loop over the points."""

import itertools

import numpy as np
import pytest
import torch

from tritonspconv.ops.voxelize import Voxels, voxelize
from tritonspconv.testing import assert_close

SIZE = (0.5, 0.4, 1.0)
RANGE = (0.0, -2.0, -1.0, 4.0, 2.0, 3.0)
REDUCTIONS = ["mean", "sum", "max", "first", "none"]


def cloud(n: int, f: int = 5, ndim: int = 3, dtype=torch.float32) -> torch.Tensor:
    """Return points; some lie outside `RANGE`, and many share a voxel."""
    low, high = torch.tensor(RANGE).reshape(2, 3)[:, :ndim]
    points = torch.randn(n, f)
    points[:, :ndim] = low + (high - low) * (torch.rand(n, ndim) * 1.2 - 0.1)
    points[n // 2 :, :ndim] = points[: n - n // 2, :ndim]
    return points.to(dtype)


def expect(points, size, box, batch, max_points, max_voxels, order, row_order):
    """Walk the points in order, as a sequential generator does.

    Returns the site of each voxel, the points that it holds and the voxel of each point.
    """
    ndim = len(size)
    low = np.array(box[:ndim], dtype=np.float32)
    step = np.array(size, dtype=np.float32)
    shape = [round((b - a) / s) for a, b, s in zip(box[:ndim], box[ndim:], size, strict=True)]
    held: dict[tuple, list[int]] = {}
    site_of_point = []
    for row, point in enumerate(points[:, :ndim].float().numpy()):
        cell = np.floor((point - low) / step)
        sample = 0 if batch is None else int(batch[row])
        site = None
        if all(0 <= c < n for c, n in zip(cell, shape, strict=True)) and sample >= 0:
            axes = [int(c) for c in cell]
            site = (sample, *(axes[::-1] if order == "zyx" else axes))
        if site is not None and site not in held:
            if max_voxels is not None and sum(s[0] == sample for s in held) == max_voxels:
                site = None
            else:
                held[site] = []
        if site is not None and (max_points is None or len(held[site]) < max_points):
            held[site].append(row)
        site_of_point.append(site)
    sites = sorted(held) if row_order == "key" else list(held)
    index = {site: i for i, site in enumerate(sites)}
    return sites, [held[s] for s in sites], [index.get(s, -1) for s in site_of_point]


def reduced(points, rows, reduce, max_points):
    """Return the points of each voxel, by torch operations."""
    if reduce == "none":
        padded = [torch.nn.functional.pad(points[r], (0, 0, 0, max_points - len(r))) for r in rows]
        return torch.stack(padded) if rows else points.new_zeros(0, max_points, points.shape[1])
    how = {
        "mean": lambda p: p.mean(0),
        "sum": lambda p: p.sum(0),
        "max": lambda p: p.max(0).values,
        "first": lambda p: p[0],
    }[reduce]
    made = [how(points[r]) for r in rows]
    return torch.stack(made) if rows else points.new_zeros(0, points.shape[1])


def values_of(voxels: Voxels) -> torch.Tensor:
    assert (voxels.feats is None) != (voxels.points is None)
    return voxels.points if voxels.feats is None else voxels.feats


def check(points, device="cpu", size=SIZE, box=RANGE, batch=None, **how):
    """Check all results against the loop, gradients included."""
    settings = {"max_points": None, "max_voxels": None, "order": "zyx", "row_order": "key"} | how
    reduce = settings.pop("reduce", "mean")
    sites, rows, of_point = expect(points, size, box, batch, **settings)
    ours = points.detach().to(device).requires_grad_()
    where = None if batch is None else batch.to(device)
    voxels = voxelize(ours, size, box, batch_index=where, reduce=reduce, **settings)

    assert voxels.coords.dtype == voxels.num_points.dtype == torch.int32
    assert voxels.coords.tolist() == [list(s) for s in sites]
    assert voxels.coords.shape[1] == 1 + len(size)
    assert voxels.num_points.tolist() == [len(r) for r in rows]
    assert voxels.point_to_voxel.dtype == torch.int64
    assert voxels.point_to_voxel.tolist() == of_point

    truth = points.detach().double().requires_grad_()
    expected = reduced(truth, rows, reduce, settings["max_points"])
    values = values_of(voxels)
    assert values.dtype == points.dtype
    eager = expected.to(points.dtype) * (1 + 4 * torch.finfo(points.dtype).eps)
    assert_close(values, expected, eager=eager)
    grad = torch.randn(expected.shape, dtype=torch.float64)
    (expected_grad,) = torch.autograd.grad(expected + 0 * truth.sum(), truth, grad)
    (grad_ours,) = torch.autograd.grad(values, ours, grad.to(device, points.dtype))
    eager = expected_grad.to(points.dtype) * (1 + 4 * torch.finfo(points.dtype).eps)
    assert_close(grad_ours, expected_grad, eager=eager)
    return voxels


@pytest.mark.parametrize("max_points", [None, 2])
@pytest.mark.parametrize("max_voxels", [None, 10])
@pytest.mark.parametrize(
    ("order", "row_order"), list(itertools.product(["zyx", "xyz"], ["key", "first_seen"]))
)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_equals_a_loop(reduce, order, row_order, max_voxels, max_points, device):
    if reduce == "none" and max_points is None:
        max_points = 3
    voxels = check(
        cloud(80), device, reduce=reduce, order=order, row_order=row_order,
        max_voxels=max_voxels, max_points=max_points,
    )  # fmt: skip
    assert voxels.grid_shape == ((8, 10, 4) if order == "xyz" else (4, 10, 8))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("row_order", ["key", "first_seen"])
@pytest.mark.parametrize("max_voxels", [None, 4])
def test_samples_are_apart(max_voxels, row_order, index_dtype, device):
    batch = torch.randint(-1, 3, (90,), dtype=index_dtype)
    check(cloud(90), device, batch=batch, max_voxels=max_voxels, row_order=row_order, max_points=2)


@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_dimensions_and_dtypes(ndim, dtype, device):
    points = torch.rand(60, 5).to(dtype)
    check(points, device, size=(0.3,) * ndim, box=(0.1,) * ndim + (1.0,) * ndim)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("row_order", ["key", "first_seen"])
@pytest.mark.parametrize("n", [0, 1, "outside"])
def test_few_points(n, row_order, reduce, device):
    points = cloud(30) + 100 if n == "outside" else cloud(60)[:n] * 0 + 0.7
    check(points, device, reduce=reduce, row_order=row_order, max_points=2, max_voxels=3)


def test_borders():
    """The lower border belongs to the grid, the upper does not; NaN and infinity are outside."""
    inf, nan = float("inf"), float("nan")
    points = torch.tensor([[0.0], [1.0], [-1e-7], [0.9999], [nan], [inf], [-inf], [1e30]])
    voxels = voxelize(points, (0.25,), (0.0, 1.0))
    assert voxels.point_to_voxel.tolist() == [0, -1, -1, 1, -1, -1, -1, -1]
    assert voxels.coords.tolist() == [[0, 0], [0, 3]]


def test_half_a_voxel_more_makes_a_cell():
    points = torch.tensor([[2.4]])
    assert voxelize(points, (1.0,), (0.0, 2.5)).grid_shape == (3,)
    assert voxelize(points, (1.0,), (0.0, 2.4)).grid_shape == (2,)


def test_grid_beyond_32_bits(device):
    size, box = (1e-4,) * 3, (-50.0,) * 3 + (50.0,) * 3
    points = torch.tensor([[49.0, 49.0, 49.0, 1.0], [-49.0, -49.0, -49.0, 2.0]], device=device)
    voxels = voxelize(points, size, box)
    assert voxels.grid_shape == (1_000_000,) * 3
    assert voxels.point_to_voxel.tolist() == [1, 0]


def test_gradcheck():
    points = torch.rand(20, 3, dtype=torch.float64).requires_grad_()
    for reduce in ("mean", "sum", "max"):
        assert torch.autograd.gradcheck(
            lambda p, how=reduce: (
                voxelize(p, (0.3, 0.3), (0, 0, 1, 1), reduce=how, max_points=3).feats
            ),
            points,
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"points": torch.ones(4, 3).int()}, TypeError, "floating point; got torch.int32"),
        ({"points": torch.ones(4, 2)}, ValueError, r"\[P, F\] with F >= 3.*got \[4, 2\]"),
        ({"voxel_size": (1.0, 0.0, 1.0)}, ValueError, "1 to 4 positive lengths"),
        ({"voxel_size": ()}, ValueError, "1 to 4 positive lengths"),
        ({"point_range": (0, 0, 1, 1)}, ValueError, "6 numbers for 3 voxel sizes"),
        ({"point_range": (0, 0, 0, 1, 1, 0)}, ValueError, "at least one voxel along every axis"),
        ({"reduce": "median"}, ValueError, "reduce must be one of .*got 'median'"),
        ({"reduce": "none"}, ValueError, "pads to max_points"),
        ({"max_points": 0}, ValueError, "max_points must be at least 1; got 0"),
        ({"max_voxels": 0}, ValueError, "max_voxels must be at least 1; got 0"),
        ({"order": "yxz"}, ValueError, "order must be one of .*got 'yxz'"),
        ({"row_order": "hash"}, ValueError, "row_order must be one of .*got 'hash'"),
        ({"batch_index": torch.zeros(4)}, TypeError, "int32 or int64; got torch.float32"),
        ({"batch_index": torch.zeros(3).int()}, ValueError, r"shape \[4\] .*got \[3\]"),
        ({"batch_index": torch.zeros(4).int().to("meta")}, ValueError, "share a device"),
    ],
)
def test_refuses(change, error, message):
    arguments = {
        "points": torch.ones(4, 3),
        "voxel_size": (1.0, 1.0, 1.0),
        "point_range": (0, 0, 0, 4, 4, 4),
    }
    with pytest.raises(error, match=message):
        voxelize(**(arguments | change))
