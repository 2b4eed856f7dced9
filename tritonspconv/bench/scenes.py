"""The sets of voxels to measure on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tritonspconv.points import FINE, FRONT_CROP, SURROUND, VoxelGrid, read_scan
from tritonspconv.testing import surface_sites
from tritonspconv.testing.lidar import simulate_sweep
from tritonspconv.testing.rooms import simulate_room


@dataclass(frozen=True)
class Scene:
    """Active voxels of a batch.

    Attributes:
        name: Its name in the tables.
        indices: int32 ``[N, 4]``: batch, z, y, x; distinct rows.
        spatial_shape: Extents along z, y, x.
        batch_size: Number of samples.
    """

    name: str
    indices: Tensor
    spatial_shape: tuple[int, int, int]
    batch_size: int

    def first(self, n: int) -> Scene:
        """Return the first ``n`` voxels as a scene of their own."""
        indices = self.indices[:n].contiguous()
        return Scene(f"first {n:,}", indices, self.spatial_shape, self.batch_size)

    def feats(self, channels: int, dtype: torch.dtype) -> Tensor:
        """Return normal random features; equal calls return equal values."""
        return normal(len(self.indices), channels, self.indices.device, dtype)


def normal(rows: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return normal random values ``[rows, channels]``, the same for the same arguments."""
    generator = torch.Generator(device).manual_seed(rows + channels)
    return torch.randn(rows, channels, generator=generator, device=device).to(dtype)


# Rooms begin less than 5 cm from zero; extents that sixteen divides, for U-Nets.
_ROOMS = VoxelGrid((-0.1, -0.1, -0.1, 12.7, 12.7, 4.7), (0.05, 0.05, 0.05))


class SceneStore:
    """Makes scenes when they are first asked for.

    Args:
        device: Device of the voxels.
        waymo: Scan of a sensor that looks around; simulated if None.
        kitti: Scan cropped to the view to the front; simulated if None.
        sphere_radius: Thickness of the sphere's shell, in voxels.
        max_points: Use a run of this many points of a scan; None: all.
    """

    def __init__(
        self,
        device: torch.device,
        waymo: Path | None,
        kitti: Path | None,
        sphere_radius: int,
        max_points: int | None,
    ) -> None:
        self.device = device
        self.waymo = waymo
        self.kitti = kitti
        self.sphere_radius = sphere_radius
        self.max_points = max_points
        self._made: dict[str, Scene] = {}

    def __getitem__(self, name: str) -> Scene:
        """Return a scene.

        There are ``rooms_b4``, ``waymo_b4``, ``waymo_5cm_b4``, ``waymo_unet``, ``sphere``,
        ``kitti`` and ``kitti_b4``.

        ``kitti`` and ``kitti_b4`` have the shape that the SECOND encoder wants, one voxel more
        along z than the points fill; ``waymo_unet`` is ``waymo_b4`` with extents divisible by 16,
        as those of ``waymo_5cm_b4`` are.
        """
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    @property
    def made(self) -> list[Scene]:
        """The scenes asked for so far."""
        return list(self._made.values())

    def _make(self, name: str) -> Scene:
        if name == "sphere":
            sites = surface_sites(self.sphere_radius, device=self.device)
            z, y, x = sites.grid.shape
            return Scene(f"sphere_r{self.sphere_radius}", sites.coords, (z, y, x), 1)
        if name == "rooms_b4":
            rooms = [simulate_room(seed).points[:, :3] for seed in range(4)]
            return self._scene(name, rooms, _ROOMS, extra_z=0)
        if name == "waymo_unet":
            base = self["waymo_b4"]
            z, y, x = (-(-extent // 16) * 16 for extent in base.spatial_shape)
            return Scene(base.name, base.indices, (z, y, x), base.batch_size)
        if name in ("waymo_b4", "waymo_5cm_b4"):
            points = self._points(self.waymo, 0)
            turned = [_turned(points, number) for number in range(4)]
            grid = SURROUND if name == "waymo_b4" else FINE
            return self._scene(name, turned, grid, extra_z=0)
        points = self._points(self.kitti, 1)
        copies = [_mirrored(points, number) for number in range(4 if name == "kitti_b4" else 1)]
        return self._scene(name, copies, FRONT_CROP, extra_z=1)

    def _points(self, path: Path | None, seed: int) -> Tensor:
        points = simulate_sweep(seed).points if path is None else read_scan(path).points
        if self.max_points is not None and len(points) > self.max_points:
            # A run of neighbours, so that the voxels keep their density; a simulated sweep looks
            # ahead in its middle.
            start = (len(points) - self.max_points) // 2
            points = points[start : start + self.max_points]
        return points[:, :3]

    def _scene(self, name: str, clouds: list[Tensor], grid: VoxelGrid, extra_z: int) -> Scene:
        parts = [
            torch.nn.functional.pad(voxels_of(points, grid), (1, 0), value=number)
            for number, points in enumerate(clouds)
        ]
        z, y, x = grid.spatial_shape
        if not all(map(len, parts)):
            raise ValueError(f"scene {name}: no point lies in {grid.point_range}. Check the scan.")
        indices = torch.cat(parts).to(self.device, torch.int32).contiguous()
        return Scene(name, indices, (z + extra_z, y, x), len(clouds))


def voxels_of(points: Tensor, grid: VoxelGrid) -> Tensor:
    """Return the occupied voxels int64 ``[N, 3]`` (z, y, x), in the order of their first points."""
    lower = points.new_tensor(grid.point_range[:3])
    size = points.new_tensor(grid.voxel_size)
    extents = torch.tensor(grid.spatial_shape[::-1])
    cells = ((points - lower) / size).floor().long()
    cells = cells[((cells >= 0) & (cells < extents)).all(dim=1)]
    keys = (cells[:, 2] * extents[1] + cells[:, 1]) * extents[0] + cells[:, 0]
    unique, group = keys.unique(return_inverse=True)
    first = torch.full((len(unique),), len(keys)).scatter_reduce(
        0, group, torch.arange(len(keys)), "amin"
    )
    return cells[first.sort().values].flip(1)


def _turned(points: Tensor, number: int) -> Tensor:
    """Return the cloud rotated about z and shifted; number 0 is the cloud itself."""
    angle = 0.7 * number
    cos, sin = math.cos(angle), math.sin(angle)
    x, y, z = points.unbind(1)
    shifted = [cos * x - sin * y + 1.3 * number, sin * x + cos * y - 0.9 * number, z]
    return torch.stack(shifted, dim=1)


def _mirrored(points: Tensor, number: int) -> Tensor:
    """Return the cloud shifted forward, every second one mirrored; number 0 is the cloud itself."""
    x, y, z = points.unbind(1)
    return torch.stack([x + 0.37 * number, -y if number % 2 else y, z], dim=1)
