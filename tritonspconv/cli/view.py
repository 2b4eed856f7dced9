"""Show a scan, its voxels, and the sites of coarser levels.

  tritonspconv view scan.bin --out scan.html    # turn it in a browser; the file needs nothing else
  tritonspconv view scan.bin --out scan.png     # from above, one panel for each level

Level n has the sites of n convolutions of 2x2x2 with stride 2: the cells of 2**n voxels that hold
one. Without a file a street is simulated.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonspconv.cli.errors import CommandError
from tritonspconv.cli.point_page import Cloud, height_colors, height_range, write_page
from tritonspconv.demo.level_picture import Level, draw_levels
from tritonspconv.demo.scenes import add_scan_arguments
from tritonspconv.ops import voxelize
from tritonspconv.points import Scan, VoxelGrid, read_scan, voxel_range
from tritonspconv.testing.lidar import simulate_sweep

MOST_POINTS = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_scan_arguments(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("view.html"), help=".html or .png (default view.html)"
    )
    parser.add_argument(
        "--voxel", type=float, metavar="M", help="side of a voxel in metres (default: by the scan)"
    )
    parser.add_argument(
        "--levels", type=int, default=4, choices=range(1, 9), help="levels to show (default 4)"
    )


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Write the page or the picture; return the exit status and the report."""
    if args.out.suffix.lower() not in (".html", ".png"):
        raise CommandError(f"--out must end in .html or .png; got {args.out.name!r}")
    if args.voxel is not None and args.voxel <= 0:
        raise CommandError(f"--voxel must be positive metres; got {args.voxel}")
    scan = _scan(args)
    print(*scan.describe(), sep="\n", flush=True)
    grid = _grid(scan.points, args.voxel)
    sites = _levels(scan.points, grid, args.levels)
    title = f"{scan.name}: {len(scan.points):,} points"
    if args.out.suffix.lower() == ".png":
        levels = [
            Level(f"level {n}", (2**n,) * 3, cells, ((2**n - 1) // 2,) * 3)
            for n, cells in enumerate(sites)
        ]
        draw_levels(args.out, grid, levels, title)
    else:
        write_page(args.out, title, _clouds(scan, grid, sites))
    counts = [len(cells) for cells in sites]
    print(f"voxels of each level: {', '.join(f'{count:,}' for count in counts)}")
    print(f"wrote {args.out}")
    report = {
        "scan": scan.name,
        "points": len(scan.points),
        "columns": scan.columns,
        "origin": scan.origin,
        "remarks": scan.remarks,
        "voxel_size": grid.voxel_size,
        "spatial_shape": grid.spatial_shape,
        "voxels": counts,
        "written": args.out,
    }
    return 0, report


def _scan(args: argparse.Namespace) -> Scan:
    if args.scan is not None:
        return read_scan(args.scan, args.columns, scale=args.scale)
    points = simulate_sweep(args.seed).points
    columns = ("x", "y", "z", "intensity")
    return Scan(f"simulated street {args.seed}", points, columns, (0.0, 0.0, 0.0), False, ())


def _grid(points: Tensor, side: float | None) -> VoxelGrid:
    grid = voxel_range(points)
    if side is None:
        return grid
    lower, upper = grid.point_range[:3], grid.point_range[3:]
    # At least the voxels that hold the first grid; it need not divide evenly.
    high = [
        low + side * max(1, -int(-(up - low) // side)) for low, up in zip(lower, upper, strict=True)
    ]
    return VoxelGrid((*lower, high[0], high[1], high[2]), (side, side, side))


def _levels(points: Tensor, grid: VoxelGrid, count: int) -> list[Tensor]:
    """Return int32 ``[N, 4]`` (batch, z, y, x) of each level."""
    cells = voxelize(points, grid.voxel_size, grid.point_range).coords
    levels = [cells]
    for _ in range(count - 1):
        halved = torch.cat([cells[:, :1], cells[:, 1:] >> 1], dim=1)
        cells = halved.unique(dim=0)
        levels.append(cells)
    return levels


def _clouds(scan: Scan, grid: VoxelGrid, sites: list[Tensor]) -> list[Cloud]:
    points = scan.points
    if len(points) > MOST_POINTS:
        points = points[torch.linspace(0, len(points) - 1, MOST_POINTS).long()]
    own = _own_colors(points, scan.columns)
    if own is None:
        clouds = [_by_height("points", points[:, :3], 0.0)]
    else:
        clouds = [Cloud("points", points[:, :3], own, 0.0)]
    origin, size = torch.tensor(grid.point_range[:3]), torch.tensor(grid.voxel_size)
    for number, cells in enumerate(sites):
        side = size * 2**number
        places = origin + (cells[:, [3, 2, 1]] + 0.5) * side
        name = f"level {number}: {len(cells):,} voxels of {100 * float(side[0]):.0f} cm"
        clouds.append(_by_height(name, places, float(side[0])))
    return clouds


def _by_height(name: str, places: Tensor, side: float) -> Cloud:
    heights = places[:, 2]
    return Cloud(name, places, height_colors(heights), side, height_range(heights))


def _own_colors(points: Tensor, columns: tuple[str, ...]) -> Tensor | None:
    """Return the scan's own colours, uint8 ``[N, 3]``; None if it has none."""
    names = ("red", "green", "blue")
    if not set(names) <= set(columns):
        return None
    own = points[:, [columns.index(name) for name in names]]
    # Files hold 0..1, 0..255 or 0..65535.
    largest = max(1.0, float(own.max()))
    whole = 1.0 if largest <= 1 else 255.0 if largest <= 255 else 65535.0
    return (255 * own / whole).clamp(0, 255).to(torch.uint8)
