"""Export networks on one scan, run the files on others, and report the differences.

    python scripts/tools/check_onnx.py frame.bin sweep.npz --voxels 20000

Every scan gives as many other scans as ``--others`` says: the cloud turned about the vertical axis.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2])]

import compat.minkowski as ME  # noqa: E402
import compat.spconv.pytorch as spconv  # noqa: E402
import tritonspconv as ts  # noqa: E402
from tests.export._scans import trained  # noqa: E402
from tritonspconv.models import lidar  # noqa: E402
from tritonspconv.models.minkowski import mink_unet  # noqa: E402
from tritonspconv.points import SURROUND, read_scan  # noqa: E402


def main() -> None:
    """Run the check."""
    parser = argparse.ArgumentParser(
        description="Export networks, and run the files on other scans."
    )
    parser.add_argument("scans", nargs="+", type=Path, help="files with points")
    parser.add_argument("--voxels", type=int, default=20_000, help="most voxels of a scan")
    parser.add_argument("--others", type=int, default=3, help="further scans of each file")
    parser.add_argument("--width", type=int, default=4, help="divides the U-Nets' channels")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    print("| scan | network | file | nodes | voxels | max error | max value | export, s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for path in args.scans:
        points = read_scan(path).points
        clouds = [
            _turned(points, 2 * math.pi * n / (args.others + 1)) for n in range(args.others + 1)
        ]
        scans = [_voxels(cloud, args.voxels) for cloud in clouds]
        for name, (net, tensor) in _networks(args.width).items():
            _check(path.name, name, trained(net), [tensor(*scan) for scan in scans])


def _check(scan: str, name: str, net: nn.Module, tensors: list[Any]) -> None:
    settings: dict[str, dict[str, Any]] = {"plain": {}, "folded": {"fold": True}}
    if name in ("SECOND", "residual encoder"):
        settings |= {key: {"dialect": key} for key in ("libspconv", "autoware")}
    for kind, options in settings.items():
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            try:
                report = ts.export_onnx(
                    net, tensors[0], Path(folder) / "net.onnx", check=tensors[1:], **options
                )
            except ts.OnnxExportError as error:
                sys.exit(f"{scan}, {name}, {kind}: {error}")
            seconds = time.perf_counter() - start
        rows = [check.rows[0] for check in report.checks]
        largest = max(check.max_value for check in report.checks)
        print(
            f"| {scan} | {name} | {kind} | {sum(report.operators.values())} "
            f"| {min(rows):,} to {max(rows):,} | {report.max_error:.1e} | {largest:.2g} "
            f"| {seconds:.1f} |"
        )


def _networks(width: int) -> dict[str, tuple[nn.Module, Callable[..., Any]]]:
    """Return networks, and functions that make their input from features and coordinates."""
    shape = [SURROUND.spatial_shape[0] + 1, *SURROUND.spatial_shape[1:]]

    def bounded(feats: Tensor, coords: Tensor) -> Any:
        return spconv.SparseConvTensor(feats, coords, shape, 1)

    return {
        "SECOND": (lidar.second_encoder(spconv), bounded),
        "residual encoder": (lidar.residual_encoder(spconv), bounded),
        "SpUNet-34": (lidar.sparse_unet(spconv, channel_divisor=width), bounded),
        "MinkUNet-34": (mink_unet(ME, channel_divisor=width), ME.SparseTensor),
    }


def _turned(points: Tensor, angle: float) -> Tensor:
    cosine, sine = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]], dtype=points.dtype)
    return torch.cat([points[:, :3] @ turn, points[:, 3:]], dim=1)


def _voxels(points: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return features [N, 4] and coordinates int32 [N, 4] of the voxels of a scan.

    Of a scan with more than ``most`` voxels, those that are nearest to the sensor are taken.
    """
    lower = torch.tensor(SURROUND.point_range[:3])
    cells = ((points[:, :3] - lower) / torch.tensor(SURROUND.voxel_size)).floor().long().flip(1)
    inside = ((cells >= 0) & (cells < torch.tensor(SURROUND.spatial_shape))).all(1)
    points, cells = points[inside], cells[inside]
    cells, voxel = torch.unique(cells, dim=0, return_inverse=True)
    values = torch.nn.functional.pad(points, (0, 1))[:, :4].float()
    feats = torch.zeros(len(cells), 4).index_reduce_(0, voxel, values, "mean", include_self=False)
    near = feats[:, :3].norm(dim=1).argsort()[:most].sort().values
    return feats[near] * 0.1, torch.nn.functional.pad(cells[near], (1, 0)).int()


if __name__ == "__main__":
    main()
