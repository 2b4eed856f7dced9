"""Run every kernel once on small inputs, for a memory checker.

python scripts/every_kernel.py      # compiles; then, without torch's own memory pool:
PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python scripts/every_kernel.py
PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python scripts/every_kernel.py
"""

from __future__ import annotations

import argparse
from unittest import mock

import torch

from tritonspconv import ActiveSites, ConvGeometry, Grid, kernel_map, ops
from tritonspconv.kernels.triton import _launch, neighbor_table, sites

SHAPE, BATCH = (21, 33, 40), 2
GEOMETRIES = {
    "submanifold": ConvGeometry.submanifold((3, 3, 3), (1, 1, 1)),
    "submanifold, 125 taps": ConvGeometry.submanifold((5, 5, 5), (1, 1, 1)),
    "strided": ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "transposed": ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1), transposed=True),
}


def main() -> None:
    """Run the kernels with each kind of index, with and without ordered columns."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.manual_seed(0)
    for shift, least_ordered_rows, most_cells in ((0, 0, 2**29), (4, 2**31, 2**29), (None, 0, 8)):
        with (
            mock.patch.object(sites, "_choose_shift", return_value=shift),
            mock.patch.object(sites, "_MAX_BITMAP_CELLS", most_cells),
            mock.patch.object(neighbor_table, "_MIN_ROWS_TO_ORDER", least_ordered_rows),
        ):
            for name, geometry in GEOMETRIES.items():
                run_layers(name, geometry)
    run_reductions()
    torch.cuda.synchronize()
    print(f"ran {len(set(map(id, _launch.compiled_kernels())))} kernels")


def coordinates(n: int) -> torch.Tensor:
    """Return n rows of distinct sites, three repeats and two outside the grid."""
    cells = torch.randperm(BATCH * SHAPE[0] * SHAPE[1] * SHAPE[2])[:n]
    coords = Grid((0, 0, 0), SHAPE, BATCH).coords(cells)
    return torch.cat([coords, coords[:3], coords[:2] + 1000]).cuda()


def run_layers(name: str, geometry: ConvGeometry) -> None:
    """Convolve and pool along a map and its inverse, forward and backward."""
    print(name, flush=True)
    coords = coordinates(1001)
    kmap = kernel_map(ActiveSites(coords, Grid((0, 0, 0), SHAPE, BATCH)), geometry)
    for dtype, channels in ((torch.float16, 17), (torch.bfloat16, 64), (torch.float32, 24)):
        feats = torch.randn(kmap.n_in, channels, device="cuda", dtype=dtype, requires_grad=True)
        weight = torch.randn(
            geometry.kernel_volume, channels, 20, device="cuda", dtype=dtype, requires_grad=True
        )
        bias = torch.randn(20, device="cuda", dtype=dtype, requires_grad=True)
        out = ops.sparse_conv(feats, weight, kmap, bias)
        back = ops.sparse_conv(out, weight.transpose(1, 2), kmap.inverse())
        pooled = [
            ops.sparse_pool(feats, kmap, "max", ties="first"),
            ops.sparse_pool(feats, kmap, "max", ties="all", floor=0.0),
            ops.sparse_pool(feats, kmap, "avg"),
            ops.sparse_pool(feats, kmap, "sum"),
        ]
        (back.float().sum() + sum(x.float().sum() for x in pooled)).backward()


def run_reductions() -> None:
    """Voxelise points and pool whole samples, with short and long segments."""
    points = torch.rand(70_001, 5, device="cuda", requires_grad=True)
    for reduce in ("mean", "max"):
        voxels = ops.voxelize(points, (0.1, 0.1, 0.1), (0, 0, 0, 1, 1, 1), reduce=reduce)
        voxels.feats.sum().backward()
    batch = torch.zeros(70_001, dtype=torch.int32, device="cuda")
    for mode in ("max", "avg", "sum"):
        ops.global_pool(points, batch, 2, mode).sum().backward()


if __name__ == "__main__":
    main()
