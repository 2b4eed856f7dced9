"""Voxel generators, sizes, pair functions and the hash table of spconv."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.parity.case import FAILS, GRAD, Case, Quirk, Run
from tests.parity.cases.spconv_run import CUDA_ONLY, SINGLE

EXACT = {"cpu": ("float32",)}
RANGES = {
    1: ([0.5], [0.0, 4.0]),
    2: ([0.5, 1.0], [0.0, -2.0, 4.0, 2.0]),
    3: ([0.5, 1.0, 0.25], [0.0, -2.0, 0.0, 4.0, 2.0, 1.0]),
    4: ([0.5, 1.0, 0.25, 1.0], [0.0, -2.0, 0.0, 0.0, 4.0, 2.0, 1.0, 2.0]),
}
LIMITS = {"": (1000, 50), "-few-voxels": (9, 50), "-few-points": (1000, 2)}
SHAPE, BATCH = [9, 8, 10], 2


def cloud(run: Run, ndim: int, n: int = 120) -> Tensor:
    """Return points ``[n, ndim + 1]``, some of them out of range."""
    low, high = torch.tensor(RANGES[ndim][1], device=run.device).view(2, ndim)
    unit = (run.values("points", n, ndim + 1) + 1) / 2
    unit[:, :ndim] = low - 0.25 + unit[:, :ndim] * (high - low + 0.5)
    return unit


def voxelize(run: Run, ndim: int, limits: tuple[int, int], empty_mean: bool = False) -> None:
    """Run `PointToVoxel`; on a GPU the order of voxels and of points in a voxel is free."""
    made = run.module("pytorch.utils").PointToVoxel(
        *RANGES[ndim], ndim + 1, *limits, device=run.device
    )
    voxels, indices, counts, ids = made.generate_voxel_with_id(
        cloud(run, ndim), empty_mean=empty_mean
    )
    for name in ("grid_size", "vsize", "coors_range", "grid_stride", "ndim"):
        run.fact(name, getattr(made, name))
    if run.target == "cuda":
        run.rows("sums", indices, voxels.sum(1))
        run.rows("counts", indices, counts)
        run.tensor("cells", torch.where(ids[:, None] < 0, -1, indices[ids.clamp(min=0).long()]))
        return
    run.rows("voxels", indices, voxels, kept=True)
    run.tensor("counts", counts)
    run.tensor("ids", ids)


def voxelize_arrays(run: Run, ndim: int) -> None:
    """Run ``Point2VoxelCPU*d`` through cumm.tensorview, as datasets do."""
    tensorview = importlib.import_module(f"{'' if run.original else 'compat.'}cumm.tensorview")
    cls = getattr(run.module("utils"), f"Point2VoxelCPU{ndim}d")
    made = cls(
        vsize_xyz=RANGES[ndim][0],
        coors_range_xyz=RANGES[ndim][1],
        num_point_features=ndim + 1,
        max_num_points_per_voxel=3,
        max_num_voxels=9,
    )
    points = cloud(run, ndim).numpy()  # cumm's tensors do not keep the memory that they view
    found = made.point_to_voxel(tensorview.from_numpy(points))
    voxels, indices, counts = (torch.from_numpy(value.numpy().copy()) for value in found)
    run.rows("voxels", indices, voxels, kept=True)
    run.tensor("counts", counts)
    run.fact("grid_size", list(made.grid_size))


def gathered(run: Run) -> None:
    """Gather features of voxels back to points."""
    ids = run.integers("ids", 12, 30) - 1
    gather = run.module("pytorch.utils").gather_features_by_pc_voxel_id
    run.tensor("out", gather(run.values("feats", 11, 4), ids, invalid_value=7))
    run.tensor("out of one axis", gather(run.values("feats", 11), ids))


def sizes(run: Run) -> None:
    """Record output sizes over kernel, stride, padding and dilation."""
    ops = run.module("pytorch.ops")
    found = []
    for k in (-1, 1, 2, 3, 5):
        for s, p, d in ((1, 0, 1), (2, 1, 1), (3, 2, 2), (2, 0, 2)):
            window = ([k] * 2, [s] * 2, [p] * 2, [d] * 2)
            found.append(list(ops.get_conv_output_size([21, 30], *window)))
            if k > 0:
                found.append(list(ops.get_deconv_output_size([21, 30], *window, [1, 0])))
    run.fact("sizes", found)


def pairs(run: Run, stride: int, subm: bool = False, transpose: bool = False) -> Any:
    """Call `ops.get_indice_pairs` with the Native algorithm."""
    library = run.module("pytorch")
    coords = run.sites(SHAPE, 60, BATCH)
    made = library.ops.get_indice_pairs(
        coords, BATCH, SHAPE, library.ConvAlgo.Native, [3] * 3, [stride] * 3, [1] * 3, [1] * 3,
        [0] * 3, subm=subm, transpose=transpose,
    )  # fmt: skip
    return coords, *made


def listed(run: Run, transpose: bool) -> None:
    """Return every pair once: tap, input row and output site."""
    _, out_coords, found, counts = pairs(run, 2, transpose=transpose)
    rows = []
    for tap, count in enumerate(counts.tolist()):
        inputs, outputs = found[:, tap, :count].long()
        rows.append(torch.cat([torch.full_like(inputs, tap)[:, None], inputs[:, None],
                               out_coords[outputs].long()], 1))  # fmt: skip
    every = torch.cat(rows).int()
    run.rows("pairs", every, torch.zeros(len(every), device=run.device))
    run.fact("shapes", [list(found.shape[:2]), counts.tolist()])


def convolved(run: Run, name: str) -> None:
    """Convolve along pair lists, forward and backward."""
    library = run.module("pytorch")
    subm = name == "indice_subm_conv"
    coords, out_coords, found, counts = pairs(run, 1 if subm else 2, subm)
    back = name == "indice_inverse_conv"
    site, out_site = (out_coords, coords) if back else (coords, out_coords)
    rows = torch.argsort(torch.argsort(_keys(site)))  # place of each row in ascending order
    feats = run.values("feats", len(site), 4)[rows].requires_grad_()
    weight = run.values("weight", 5, 3, 3, 3, 4, scale=0.125).requires_grad_()
    out = getattr(library.functional, name)(
        feats, weight, found, counts, len(out_site), library.ConvAlgo.Native
    )
    run.rows("out", out_site, out)
    run.backward(out_site, out, weight=weight)
    assert feats.grad is not None
    run.rows(f"{GRAD}input", site, feats.grad)


def _keys(coords: Tensor) -> Tensor:
    """Return a number per row that ascends with batch and coordinates."""
    return (coords.long() * torch.tensor([1000, 100, 10, 1], device=coords.device)).sum(1)


def maximum(run: Run) -> None:
    """Pool along pair lists."""
    _, out_coords, found, counts = pairs(run, 2)
    feats = run.values("feats", 60, 4)
    out = run.module("pytorch").ops.indice_maxpool(feats, found, counts, len(out_coords))
    run.rows("out", out_coords, out)


def table(run: Run) -> None:
    """Insert, look up, overwrite and list keys."""
    made = run.module("pytorch.hash").HashTable(run.device, torch.int64, torch.int64, 200)
    keys = (run.integers("keys", 1000, 60) * 7).unique()
    made.insert(keys, keys * 2)
    values, absent = made.query(torch.cat([keys[:10], keys[:10] + 1]))
    run.tensor("absent", absent)
    run.tensor("values", values[:10])
    run.tensor("exists", made.insert_exist_keys(keys[:5], keys[:5] * 3))
    found, held, count = made.items()
    n = int(count)
    order = found[:n].argsort()
    run.tensor("keys", found[:n][order])
    run.tensor("held", held[:n][order])


MEAN = Quirk("`empty_mean` fills a voxel with its own mean", ("voxels",), targets=("cpu",))
HASH = Quirk("`HashTable` is sorted", FAILS, targets=("cpu",))

CASES = [
    *(
        Case(f"voxels-{ndim}d{tag}", partial(voxelize, ndim=ndim, limits=limits), EXACT, exact=True)
        for ndim in RANGES
        for tag, limits in LIMITS.items()
    ),
    *(
        Case(f"voxels-on-gpu-{n}d", partial(voxelize, ndim=n, limits=(1000, 50)), CUDA_ONLY,
             exact=True)
        for n in RANGES
    ),
    Case("voxels-empty-mean", partial(voxelize, ndim=3, limits=(9, 5), empty_mean=True), EXACT,
         exact=True, quirks=(MEAN,)),
    *(
        Case(f"voxels-arrays-{n}d", partial(voxelize_arrays, ndim=n), EXACT, exact=True)
        for n in RANGES
    ),
    Case("voxels-gather", gathered, {"cpu": ("float32",), "cuda": ("float32",)}, exact=True),
    Case("output-sizes", sizes, EXACT, exact=True),
    Case("pairs-strided", partial(listed, transpose=False), EXACT | CUDA_ONLY, exact=True),
    Case("pairs-transposed", partial(listed, transpose=True), EXACT | CUDA_ONLY, exact=True),
    *(
        Case(name.replace("_", "-"), partial(convolved, name=name), SINGLE)
        for name in ("indice_conv", "indice_subm_conv", "indice_inverse_conv")
    ),
    Case("indice-maxpool", maximum, SINGLE),
    Case("hash-table", table, EXACT | CUDA_ONLY, exact=True, quirks=(HASH,)),
]  # fmt: skip
