"""Run every kernel once on small inputs, with all rows real and with padding, for a memory checker.

python -m scripts.tools.every_kernel      # compiles; then, without torch's own memory pool:
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
compute-sanitizer --tool memcheck python -m scripts.tools.every_kernel
compute-sanitizer --tool racecheck python -m scripts.tools.every_kernel

The race checker takes minutes. Several processes can share the work, each with another ``--only``.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

from tritonspconv import ActiveSites, ConvGeometry, Grid, kernel_map, ops
from tritonspconv.coords.row_tensor import RowBounds
from tritonspconv.coords.site_plan import SitePlan
from tritonspconv.kernel_map import map_from_pairs
from tritonspconv.kernels import order_columns
from tritonspconv.kernels import triton as kernels
from tritonspconv.kernels.triton import _column_order, _launch, half_parts, sites

DEVICE = torch.device("cuda")
SHAPE, BATCH = (21, 33, 40), 2
MOST_SITES = 9_000
GEOMETRIES = {
    "submanifold": ConvGeometry.submanifold((3, 3, 3), (1, 1, 1)),
    "submanifold, 125 taps": ConvGeometry.submanifold((5, 5, 5), (1, 1, 1)),
    "strided": ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "halved": ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1)),
    "transposed": ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1), transposed=True),
}
REST = "rest"
PARTS = (*GEOMETRIES, REST)


def main() -> int:
    """Run everything; return 1 where a kernel was not launched."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    only = parser.parse_args().only
    torch.manual_seed(0)
    ran, call = set(), _launch.BoundKernel.__call__

    def recorded(bound: _launch.BoundKernel, *args: Any) -> None:
        ran.add(bound.kernel.__name__)
        call(bound, *args)

    with mock.patch.object(_launch.BoundKernel, "__call__", recorded):
        run_all(only)
    torch.cuda.synchronize()
    known = known_kernels()
    print(f"ran {len(ran)} of {len(known)} kernels")
    if set(only) != set(PARTS):
        return 0
    if known - ran:
        print(f"every_kernel.py: never launched: {', '.join(sorted(known - ran))}", file=sys.stderr)
    return int(known != ran)


def run_all(only: Sequence[str]) -> None:
    """Run the kernels with each kind of index, with and without ordered columns."""
    for shift, least_ordered_rows in ((0, 0), (4, 2**31), (None, 0)):
        with (
            mock.patch.object(sites, "_choose_shift", return_value=shift),
            mock.patch.object(sites, "_is_affordable", return_value=shift is not None),
            mock.patch.object(_column_order, "MIN_ROWS_TO_ORDER", least_ordered_rows),
            mock.patch.object(order_columns, "_MIN_WORK", 0),
        ):
            for name, geometry in GEOMETRIES.items():
                if name not in only:
                    continue
                run_layers(name, geometry)
                # The sites of strided layers over padding are found in a bitmap.
                if shift is not None:
                    run_layers(f"{name}, bounded", geometry, is_bounded=True)
    if REST not in only:
        return
    with mock.patch.object(half_parts, "_MIN_WORK", 0):
        run_layers("float32 in parts", GEOMETRIES["strided"])
    # AMD multiplies float32 as it is.
    half_parts.split_half(torch.randn(1001, 24, device=DEVICE), with_low=True)
    run_reductions()


def known_kernels() -> set[str]:
    """Return the name of every kernel of the Triton back end."""
    modules = [
        importlib.import_module(f"{kernels.__name__}.{module.name}")
        for module in pkgutil.iter_modules(kernels.__path__)
    ]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def coordinates(n: int) -> torch.Tensor:
    """Return n rows of distinct sites, three repeats and two outside the grid."""
    cells = torch.randperm(BATCH * SHAPE[0] * SHAPE[1] * SHAPE[2])[:n]
    coords = Grid((0, 0, 0), SHAPE, BATCH).coords(cells)
    return torch.cat([coords, coords[:3], coords[:2] + 1000]).to(DEVICE)


def bounded_sites(coords: torch.Tensor, grid: Grid) -> ActiveSites:
    """Return sites with 300 rows of padding, in a run whose layers reach MOST_SITES at most."""
    padding = coords.new_full((300, coords.shape[1]), -1)
    bounds = RowBounds(torch.tensor(len(coords), device=DEVICE), SitePlan([MOST_SITES], DEVICE))
    return ActiveSites(torch.cat([coords, padding]), grid, bounds=bounds)


def run_layers(name: str, geometry: ConvGeometry, *, is_bounded: bool = False) -> None:
    """Convolve and pool along a map and along an inverse map, forward and backward.

    The inverse map is that of listed pairs. Bounded sites, whose pairs cannot be listed, have that
    of the map itself.
    """
    print(name, flush=True)
    coords, grid = coordinates(1001), Grid((0, 0, 0), SHAPE, BATCH)
    sites = bounded_sites(coords, grid) if is_bounded else ActiveSites(coords, grid)
    kmap = kernel_map(sites, geometry)
    listed = kmap if is_bounded else map_from_pairs(*kmap.pairs(), kmap.n_in, kmap.n_out)
    for dtype, channels in ((torch.float16, 17), (torch.bfloat16, 64), (torch.float32, 24)):
        feats = torch.randn(kmap.n_in, channels, device=DEVICE, dtype=dtype, requires_grad=True)
        weight = torch.randn(
            geometry.kernel_volume, channels, 20, device=DEVICE, dtype=dtype, requires_grad=True
        )
        bias = torch.randn(20, device=DEVICE, dtype=dtype, requires_grad=True)
        out = ops.sparse_conv(feats, weight, kmap, bias)
        back = ops.sparse_conv(out, weight.transpose(1, 2), listed.inverse())
        norm = ops.ChannelNorm(bias.detach(), bias.detach() ** 2)
        with torch.no_grad():
            ops.sparse_conv(feats, weight, kmap, bias, norm=norm, residual=out, relu=True)
        count = torch.tensor(0, device=DEVICE)
        vectors = torch.rand(4, 20, device=DEVICE)
        scale, shift = vectors[2:].requires_grad_()
        norm = ops.TrainingNorm(vectors[0], vectors[1], scale, shift, count)
        normed = ops.sparse_conv(feats, weight, kmap, bias, norm=norm, relu=True)
        pooled = [
            ops.sparse_pool(feats, kmap, "max", ties="first"),
            ops.sparse_pool(feats, kmap, "max", ties="all", floor=0.0),
            ops.sparse_pool(feats, kmap, "avg"),
            ops.sparse_pool(feats, kmap, "sum"),
        ]
        (
            normed.float().sum() + back.float().sum() + sum(x.float().sum() for x in pooled)
        ).backward()


def run_reductions() -> None:
    """Voxelise points and pool whole samples, with short and long segments."""
    points = torch.rand(70_001, 5, device=DEVICE, requires_grad=True)
    for reduce in ("mean", "max"):
        voxels = ops.voxelize(points, (0.1, 0.1, 0.1), (0, 0, 0, 1, 1, 1), reduce=reduce)
        assert voxels.feats is not None
        voxels.feats.sum().backward()
    batch = torch.zeros(70_001, dtype=torch.int32, device=DEVICE)
    for mode in ("max", "avg", "sum"):
        ops.global_pool(points, batch, 2, mode).sum().backward()


if __name__ == "__main__":
    sys.exit(main())
