"""Run layers on more voxels, cells and elements than 32 bits can count, and check sampled rows.

  python -m scripts.tools.scale                    # on a GPU of 80 GB or more
  python -m scripts.tools.scale --share 0.001      # a thousandth of the rows, on a CPU as well

A layer runs forward and backward. Its gradient is zero but for some sampled output rows, so the
gradients of the weight and of the features are sums over the neighbours of these rows, which a
comparison of all coordinates finds. The exit status is 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonspconv import ActiveSites, ConvGeometry, Grid, kernel_map, ops, reference

SAMPLES = 32
TOLERANCE = 1e-2  # of float16 outputs, relative to the largest


@dataclass(frozen=True)
class Problem:
    """A layer on random sites of a box.

    Attributes:
        title: Its name in the table.
        rows: Number of sites.
        channels: In and out.
        geometry: The window.
        shape: The grid.
        batch: Number of samples.
    """

    title: str
    rows: int
    channels: int
    geometry: ConvGeometry
    shape: tuple[int, ...]
    batch: int = 1


def submanifold(kernel_size: int, ndim: int = 3) -> ConvGeometry:
    """Return the geometry of a submanifold layer."""
    return ConvGeometry.submanifold((kernel_size,) * ndim, (1,) * ndim)


STRIDED = ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))
PROBLEMS = (
    Problem("20 million voxels", 20_000_000, 32, submanifold(3), (400, 400, 400)),
    Problem("20 million voxels, strided", 20_000_000, 32, STRIDED, (400, 400, 400)),
    Problem("2.3e9 elements", 18_000_000, 128, submanifold(3), (400, 400, 400)),
    Problem("2^36 cells", 2_000_000, 32, submanifold(3), (4096, 4096, 4096)),
    Problem("2^61 cells", 2_000_000, 32, submanifold(3), (2**20, 2**20, 2**20), 2),
    Problem("2^61 cells, strided", 2_000_000, 32, STRIDED, (2**20, 2**20, 2**20), 2),
    Problem("window of 7x7x7", 1_000_000, 32, submanifold(7), (200, 200, 200)),
    Problem("window of 3x3x3x3", 1_000_000, 32, submanifold(3, 4), (60, 60, 60, 60)),
    Problem("batch of 1,000", 4_000_000, 32, submanifold(3), (40, 40, 40), 1000),
)


def main() -> int:
    """Run every problem; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the rows (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    print("| case | rows | rows out | elements | output error | gradient error | s | peak, GiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    passed = True
    for problem in PROBLEMS:
        rows = max(math.ceil(problem.rows * args.share), SAMPLES)
        passed &= run(problem, rows, device)
    if device.type == "cuda":
        passed &= recovers_from_a_lack_of_memory(device)
    return int(not passed)


def run(problem: Problem, rows: int, device: torch.device) -> bool:
    """Print a line of the table; return whether the results are right."""
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    sites = random_box(problem, rows, device)
    geometry, channels = problem.geometry, problem.channels
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    feats = torch.randn(rows, channels, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(geometry.kernel_volume, channels, channels, device=device, dtype=dtype)
    weight = (weight / math.sqrt(9 * channels)).requires_grad_()
    kmap = kernel_map(sites, geometry)
    out = ops.sparse_conv(feats, weight, kmap)
    sampled = torch.randint(0, len(out), (SAMPLES,), device=device).unique()
    grad = torch.zeros_like(out)
    grad[sampled] = torch.randn(len(sampled), channels, device=device, dtype=dtype)
    out.backward(grad)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else math.nan

    inputs, outputs, taps = neighbours(sites, kmap.out_sites.coords[sampled], geometry)
    assert feats.grad is not None
    assert weight.grad is not None
    triples = torch.stack([torch.arange(len(inputs), device=device), outputs, taps], dim=1)
    exact_feats = feats.detach()[inputs].double().cpu().requires_grad_()
    exact_weight = weight.detach().double().cpu().requires_grad_()
    expected = reference.conv(exact_feats, exact_weight, triples.tolist(), len(sampled))
    expected.backward(grad[sampled].double().cpu())
    error = relative_error(out.detach()[sampled], expected.detach())
    # Several pairs may share an input row.
    found, place = inputs.unique(return_inverse=True)
    summed = torch.zeros(len(found), channels, dtype=torch.float64)
    summed.index_add_(0, place.cpu(), _grad(exact_feats))
    touched = feats.grad.any(dim=1).nonzero().squeeze(1)
    is_local = bool(torch.isin(touched, found).all())
    errors = (
        relative_error(feats.grad[found], summed),
        relative_error(weight.grad, _grad(exact_weight)),
    )
    worst = max(errors) if is_local else math.inf
    print(
        f"| {problem.title} | {rows:,} | {len(out):,} | {rows * channels:,} | {error:.1e} | "
        f"{worst:.1e} | {seconds:.1f} | {peak:.1f} |",
        flush=True,
    )
    return max(error, worst) < TOLERANCE


def random_box(problem: Problem, rows: int, device: torch.device) -> ActiveSites:
    """Return distinct sites: a third of the cells of boxes that lie at both ends of the grid."""
    ndim, batch = len(problem.shape), problem.batch
    grid = Grid((0,) * ndim, problem.shape, batch)
    parts = 2 * batch
    # A box fits half of the grid along the first axis.
    extents = (problem.shape[0] // 2, *problem.shape[1:])
    side: list[int] = []
    left = math.ceil(3 * rows / parts)
    for axis, extent in enumerate(extents):
        side.append(min(extent, math.ceil(left ** (1 / (ndim - axis)))))
        left = math.ceil(left / side[-1])
    room = math.prod(side)
    chosen = torch.randperm(parts * room, device=device)[:rows]
    part, cell = chosen // room, chosen % room
    coords = torch.empty(len(chosen), 1 + ndim, dtype=torch.int32, device=device)
    coords[:, 0] = part // 2
    for axis in reversed(range(ndim)):
        shift = (part % 2) * (problem.shape[axis] - side[axis])
        coords[:, 1 + axis] = cell % side[axis] + shift
        cell = cell // side[axis]
    return ActiveSites(coords, grid)


def neighbours(
    sites: ActiveSites, out_coords: Tensor, geometry: ConvGeometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Return input row, number of the output and tap of every pair of some output sites.

    Every input row is compared with every cell that an output looks at.
    """
    device = out_coords.device
    offsets = torch.tensor(geometry.offsets, device=device)
    stride = torch.tensor(geometry.stride, device=device)
    inputs, outputs, taps = [], [], []
    for number, cell in enumerate(out_coords.long()):
        same = sites.coords[:, 0] == cell[0]
        fine = cell[1:] * stride + offsets  # [V, D]
        near = same
        for axis in range(fine.shape[1]):
            column = sites.coords[:, 1 + axis]
            near = near & (column >= fine[:, axis].min()) & (column <= fine[:, axis].max())
        rows = near.nonzero().squeeze(1)
        meets = (sites.coords[rows, 1:][:, None] == fine[None]).all(dim=2)
        row, tap = meets.nonzero(as_tuple=True)
        inputs.append(rows[row])
        outputs.append(torch.full_like(row, number))
        taps.append(tap)
    return torch.cat(inputs), torch.cat(outputs), torch.cat(taps)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Return the largest difference, relative to the largest exact value."""
    if not exact.numel():
        return math.inf
    return float((ours.double().cpu() - exact).abs().max() / exact.abs().max())


def recovers_from_a_lack_of_memory(device: torch.device) -> bool:
    """Ask for more memory than there is; return whether that raises and the next call is right."""
    sites = random_box(PROBLEMS[0], 100_000, device)
    kmap = kernel_map(sites, submanifold(3))
    feats = torch.ones(100_000, 4, device=device)
    weight = torch.ones(27, 4, 4, device=device)
    before = ops.sparse_conv(feats, weight, kmap)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    wide = weight.new_ones(1).expand(27, 4, math.ceil(free / 100_000 / 4) + 4096)
    try:
        ops.sparse_conv(feats, wide, kmap)
        raised = False
    except torch.OutOfMemoryError:
        raised = True
    right = torch.equal(ops.sparse_conv(feats, weight, kmap), before)
    print(f"\nout of memory: {'raised' if raised else 'not raised'}, "
          f"the next call is {'right' if right else 'WRONG'}")  # fmt: skip
    return raised and right


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


if __name__ == "__main__":
    sys.exit(main())
