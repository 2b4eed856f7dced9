"""Scans with boxes around the cars: simulated streets, and folders in KITTI's format."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tritonspconv.points import VoxelGrid
from tritonspconv.testing.lidar import simulate_sweep
from tritonspconv.training.boxes import points_inside
from tritonspconv.training.data import FIRST_VAL_SEED, Split

# 64 m around the sensor, with 10 cm voxels.
STREET_GRID = VoxelGrid((-32.0, -32.0, -3.0, 32.0, 32.0, 1.0), (0.1, 0.1, 0.1))
# KITTI's usual box with voxels of twice the usual side in x and y, so that a CPU can follow.
KITTI_GRID = VoxelGrid((0.0, -40.0, -3.0, 70.4, 40.0, 1.0), (0.1, 0.1, 0.1))
# A simulated car with fewer points than this cannot be asked for.
LEAST_POINTS = 10
# A quarter of the sensor's usual number, so that a CPU can follow.
_AZIMUTHS = 512
# How far a training scene is turned, in radians. Cars stand along streets and across them. A
# network that has to know every direction needs a longer training: with 45 degrees, 280 steps left
# the angles of cars 7 to 10 degrees wrong.
_MOST_TURN = math.radians(10)
# Limits of KITTI's moderate cases: the image size in pixels, the least height in pixels, the
# highest level of occlusion and the largest share cut off.
_IMAGE = (1242, 375)
_LEAST_HEIGHT, _MOST_HIDDEN, _MOST_CUT = 25.0, 1, 0.3


class BoxScene(NamedTuple):
    """A scan and its cars.

    Attributes:
        points: float32 ``[N, 4]``: x, y, z in metres and the intensity in 0..1.
        boxes: float32 ``[M, 7]``: see `tritonspconv.training.boxes`.
        ignored: bool ``[M]``: boxes that neither count as found nor as missed.
    """

    points: Tensor
    boxes: Tensor
    ignored: Tensor


@dataclass(frozen=True)
class BoxSet:
    """Scenes that are read, or simulated, when they are asked for.

    Attributes:
        grid: The voxels, and where to look for cars.
        count: Number of scenes.
        load: Returns a scene.
    """

    grid: VoxelGrid
    count: int
    load: Callable[[int], BoxScene]


def simulated_boxes(split: Split, count: int, grid: VoxelGrid = STREET_GRID) -> BoxSet:
    """Return seeded sweeps of made-up streets with their cars; the two splits share no seed.

    Args:
        split: Name of the half of the seeds to use.
        count: Number of scenes.
        grid: The voxels.
    """
    first = 0 if split == "train" else FIRST_VAL_SEED
    kept: dict[int, BoxScene] = {}

    def load(number: int) -> BoxScene:
        if number not in kept:
            sweep = simulate_sweep(first + number, azimuths=_AZIMUTHS)
            ignored = points_inside(sweep.points[:, :3], sweep.boxes) < LEAST_POINTS
            kept[number] = BoxScene(sweep.points, sweep.boxes, ignored)
        return kept[number]

    return BoxSet(grid, count, load)


def kitti_boxes(folder: str | Path, split: Split, grid: VoxelGrid = KITTI_GRID) -> BoxSet:
    """Return the scans of a folder in KITTI's detection format, with its cars.

    The folder holds ``training/velodyne/NNNNNN.bin``, ``training/label_2/NNNNNN.txt`` and
    ``training/calib/NNNNNN.txt``. ``ImageSets/train.txt`` and ``val.txt``, there or in
    ``training``, hold the numbers of the splits; without them every fourth scan is for validation.
    Points outside the picture of the left camera are left out, because cars there have no label.
    Vans, and cars beyond KITTI's moderate difficulty, are ignored.

    Args:
        folder: The folder above ``training``.
        split: Which scans.
        grid: The voxels.

    Raises:
        FileNotFoundError: The folder holds no scan of the split.
        ValueError: The content of a file does not fit its name.
    """
    root = Path(folder) / "training"
    names = _names(Path(folder), split)
    if not names:
        raise FileNotFoundError(
            f"kitti_boxes: {folder} must hold training/label_2/NNNNNN.txt for the split {split!r}; "
            "it holds none. Name the folder above training."
        )

    def load(number: int) -> BoxScene:
        name = names[number]
        calibration = _calibration(root / "calib" / f"{name}.txt")
        points = _in_picture(_velodyne(root / "velodyne" / f"{name}.bin"), calibration)
        return BoxScene(points, *_labels(root / "label_2" / f"{name}.txt", calibration))

    return BoxSet(grid, len(names), load)


def changed_scene(scene: BoxScene, seed: int) -> BoxScene:
    """Return the scene mirrored, turned by up to 10 degrees and scaled by up to 5 %."""
    draw = torch.rand(3, generator=torch.Generator().manual_seed(seed))
    angle = (2 * float(draw[0]) - 1) * _MOST_TURN
    mirror = 1.0 if draw[1] < 0.5 else -1.0
    scale = 0.95 + 0.1 * float(draw[2])
    cos, sin = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[cos, -sin * mirror, 0], [sin, cos * mirror, 0], [0, 0, 1.0]]) * scale

    def moved(places: Tensor) -> Tensor:
        return (places[:, None] * turn).sum(dim=-1)

    points = torch.cat([moved(scene.points[:, :3]), scene.points[:, 3:]], dim=1)
    turned = mirror * scene.boxes[:, 6:] + angle
    boxes = torch.cat([moved(scene.boxes[:, :3]), scene.boxes[:, 3:6] * scale, turned], dim=1)
    return BoxScene(points, boxes, scene.ignored)


class _Calibration(NamedTuple):
    """Matrices from laser to rectified camera, ``[4, 4]``, and from camera to picture, [3, 4]."""

    to_camera: Tensor
    to_picture: Tensor


def _names(folder: Path, split: Split) -> list[str]:
    for place in (folder / "ImageSets", folder / "training" / "ImageSets"):
        if (place / f"{split}.txt").is_file():
            return (place / f"{split}.txt").read_text().split()
    found = sorted(path.stem for path in (folder / "training" / "label_2").glob("*.txt"))
    return [name for n, name in enumerate(found) if (n % 4 == 3) == (split == "val")]


def _velodyne(path: Path) -> Tensor:
    size = path.stat().st_size
    if not size or size % 16:
        raise ValueError(
            f"kitti_boxes: {path} must hold points of four float32 values; got {size} bytes."
        )
    return torch.from_file(str(path), size=size // 4, dtype=torch.float32).view(-1, 4)


def _calibration(path: Path) -> _Calibration:
    rows = {}
    for line in path.read_text().splitlines():
        name, _, values = line.partition(":")
        rows[name.strip()] = values.split()
    try:
        project, rectify, place = (
            torch.tensor([float(value) for value in rows[name]], dtype=torch.float64).view(shape)
            for name, shape in (
                ("P2", (3, 4)),
                ("R0_rect", (3, 3)),
                ("Tr_velo_to_cam", (3, 4)),
            )
        )
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"kitti_boxes: {path} must have lines P2, R0_rect and Tr_velo_to_cam of 12, 9 and 12 "
            f"numbers; {error}."
        ) from error
    to_camera = torch.eye(4, dtype=torch.float64)
    to_camera[:3] = rectify @ place
    return _Calibration(to_camera, project)


def _in_picture(points: Tensor, calibration: _Calibration) -> Tensor:
    places = torch.nn.functional.pad(points[:, :3].double(), (0, 1), value=1.0)
    seen = places @ calibration.to_camera.t()
    pixel = seen @ calibration.to_picture.t()
    place = pixel[:, :2] / pixel[:, 2:].clamp(min=1e-6)
    inside = (place >= 0) & (place < torch.tensor(_IMAGE))
    return points[inside.all(dim=1) & (seen[:, 2] > 0)]


def _labels(path: Path, calibration: _Calibration) -> tuple[Tensor, Tensor]:
    """Return boxes float32 ``[M, 7]`` of cars and vans, and which of them are ignored."""
    to_laser = calibration.to_camera.inverse()
    boxes, ignored = [], []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        kind, *words = line.split()
        if kind not in ("Car", "Van"):
            continue
        try:
            cut, hidden, _, _, top, _, bottom, *box = (float(word) for word in words[:14])
            height, width, length, x, y, z, turn = box
        except ValueError as error:
            raise ValueError(
                f"kitti_boxes: line {number} of {path} must hold a class and 14 numbers; got "
                f"{line!r}."
            ) from error
        foot = to_laser @ torch.tensor([x, y, z, 1.0], dtype=torch.float64)
        centre = (float(foot[0]), float(foot[1]), float(foot[2]) + height / 2)
        boxes.append((*centre, length, width, height, -turn - math.pi / 2))
        too_hard = bottom - top < _LEAST_HEIGHT or hidden > _MOST_HIDDEN or cut > _MOST_CUT
        ignored.append(kind == "Van" or too_hard)
    return (
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 7),
        torch.tensor(ignored, dtype=torch.bool),
    )
