"""Labelled scans as voxels: simulated rooms and streets, and folders of SemanticKITTI."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tritonspconv.testing.lidar import CLASS_NAMES, simulate_sweep
from tritonspconv.testing.rooms import ROOM_CLASSES, simulate_room

Split = Literal["train", "val"]
CHANNELS = 4
IGNORED = -1
# Seeds of the validation scans start here: no training scan has one of them.
FIRST_VAL_SEED = 1_000_000

# SemanticKITTI's own list of classes for a single scan; moving objects count as their class.
KITTI_CLASSES = (
    "car", "bicycle", "motorcycle", "truck", "other-vehicle", "person", "bicyclist",
    "motorcyclist", "road", "parking", "sidewalk", "other-ground", "building", "fence",
    "vegetation", "trunk", "terrain", "pole", "traffic-sign",
)  # fmt: skip
_KITTI_IDS = {
    10: 0, 11: 1, 13: 4, 15: 2, 16: 4, 18: 3, 20: 4, 30: 5, 31: 6, 32: 7, 40: 8, 44: 9, 48: 10,
    49: 11, 50: 12, 51: 13, 60: 8, 70: 14, 71: 15, 72: 16, 80: 17, 81: 18, 252: 0, 253: 6, 254: 5,
    255: 7, 256: 4, 257: 4, 258: 3, 259: 4,
}  # fmt: skip
_KITTI_VAL = ("08",)


class Sample(NamedTuple):
    """The voxels of one scan, or of a batch.

    Attributes:
        coords: int32 ``[N, 4]``: batch, z, y, x; distinct rows, no coordinate below zero.
        feats: float32 ``[N, 4]``.
        labels: int64 ``[N]``: class of most points of the voxel, or -1: not counted.
    """

    coords: Tensor
    feats: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ScanSet:
    """Labelled scans that are read, or simulated, when they are asked for, and then kept.

    Attributes:
        class_names: Names of the classes.
        voxel_size: Side of a voxel in metres.
        count: Number of scans.
        load: Returns points float32 ``[N, 3]`` in metres, features float32 ``[N, 4]``, and labels
            int64 ``[N]`` of a scan.
    """

    class_names: tuple[str, ...]
    voxel_size: float
    count: int
    load: Callable[[int], tuple[Tensor, Tensor, Tensor]]

    def sample(self, number: int, augment_seed: int | None = None) -> Sample:
        """Return the voxels of a scan.

        Args:
            number: Which scan.
            augment_seed: Turn, mirror and scale the scan at random by this seed; None: as it is.
        """
        points, feats, labels = self.load(number)
        if augment_seed is not None:
            points = _augmented(points, augment_seed)
        return voxels_of(points, feats, labels, self.voxel_size, len(self.class_names))


def simulated_set(
    kind: Literal["rooms", "streets"], split: Split, count: int, voxel_size: float | None = None
) -> ScanSet:
    """Return seeded scans of made-up rooms or streets; the two splits share no seed.

    Args:
        kind: What to simulate.
        split: Which half of the seeds to use.
        count: Number of scans.
        voxel_size: Metres; None: 0.1 for rooms, 0.3 for streets.
    """
    first = 0 if split == "train" else FIRST_VAL_SEED
    kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def load(number: int) -> tuple[Tensor, Tensor, Tensor]:
        if number not in kept:
            kept[number] = (_room if kind == "rooms" else _street)(first + number)
        return kept[number]

    size = voxel_size or (0.1 if kind == "rooms" else 0.3)
    return ScanSet(ROOM_CLASSES if kind == "rooms" else CLASS_NAMES, size, count, load)


def kitti_set(folder: str | Path, split: Split, voxel_size: float = 0.1) -> ScanSet:
    """Return the scans of a SemanticKITTI folder, which holds ``sequences/00/velodyne`` and so on.

    Args:
        folder: The folder above ``sequences``.
        split: ``"val"``: sequence 08; ``"train"``: the others that have labels.
        voxel_size: Metres.

    Raises:
        FileNotFoundError: The folder holds no labelled scan of the split.
    """
    labels = sorted(Path(folder).glob("sequences/*/labels/*.label"))
    labels = [p for p in labels if (p.parts[-3] in _KITTI_VAL) == (split == "val")]
    if not labels:
        raise FileNotFoundError(
            f"kitti_set: {folder} must hold sequences/NN/labels/*.label for the split {split!r} "
            f"(val is sequence {_KITTI_VAL[0]}); it holds none. Name the folder above sequences."
        )
    table = torch.full((2**16,), IGNORED)
    for name, number in _KITTI_IDS.items():
        table[name] = number

    def load(number: int) -> tuple[Tensor, Tensor, Tensor]:
        path = labels[number]
        scan = path.parent.parent / "velodyne" / f"{path.stem}.bin"
        count = path.stat().st_size // 4
        if not scan.is_file() or scan.stat().st_size != 16 * count:
            raise ValueError(f"kitti_set: {scan} must hold the {count} points that {path} labels.")
        points = torch.from_file(str(scan), size=4 * count, dtype=torch.float32).view(-1, 4)
        classes = torch.from_file(str(path), size=count, dtype=torch.int32) & 0xFFFF
        return points[:, :3], _lidar_feats(points), table[classes.long()]

    return ScanSet(KITTI_CLASSES, voxel_size, len(labels), load)


def voxels_of(
    points: Tensor, feats: Tensor, labels: Tensor, voxel_size: float, num_classes: int
) -> Sample:
    """Return mean features and the most frequent class of each occupied voxel.

    Args:
        points: float32 ``[N, 3]``: x, y, z in metres.
        feats: float32 ``[N, C]``.
        labels: int64 ``[N]``; -1: no class.
        voxel_size: Metres.
        num_classes: Number of classes.
    """
    cells = (points / voxel_size).floor().int().flip(1)
    cells = cells - cells.amin(dim=0)
    coords, group, counts = cells.unique(dim=0, return_inverse=True, return_counts=True)
    means = torch.zeros(len(coords), feats.shape[1]).index_add(0, group, feats) / counts[:, None]
    votes = torch.zeros(len(coords), num_classes + 1)
    votes = votes.index_put((group, labels + 1), torch.ones(()), accumulate=True)
    # A voxel with a labelled point has a class.
    votes[:, 0] *= 1e-3
    return Sample(torch.nn.functional.pad(coords, (1, 0)), means, votes.argmax(dim=1) - 1)


def collate(samples: Sequence[Sample]) -> Sample:
    """Return a batch: the samples one after another, the batch index in the first column."""
    coords = [
        torch.cat([torch.full_like(sample.coords[:, :1], number), sample.coords[:, 1:]], dim=1)
        for number, sample in enumerate(samples)
    ]
    feats, labels = ([getattr(sample, name) for sample in samples] for name in ("feats", "labels"))
    return Sample(torch.cat(coords), torch.cat(feats), torch.cat(labels))


def _room(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    # 10 cm voxels need a quarter of the points that 5 cm voxels need.
    room = simulate_room(seed, density=600)
    xyz, color = room.points[:, :3], room.points[:, 3:]
    return xyz, torch.cat([color - 0.5, xyz[:, 2:] - 1.2], dim=1), room.labels


def _street(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    sweep = simulate_sweep(seed, azimuths=1024)
    near = sweep.points[:, :2].norm(dim=1) < 40
    points = sweep.points[near]
    return points[:, :3], _lidar_feats(points), sweep.labels[near]


def _lidar_feats(points: Tensor) -> Tensor:
    """Return intensity, height, distance and a one, of like size."""
    distance = points[:, :2].norm(dim=1, keepdim=True)
    parts = [points[:, 3:4], 0.5 * points[:, 2:3], distance / 30, torch.ones_like(distance)]
    return torch.cat(parts, dim=1)


def _augmented(points: Tensor, seed: int) -> Tensor:
    """Turn about z, mirror, scale by up to 5 % and shift by less than a voxel."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(6, generator=generator)
    angle = 2 * math.pi * float(draw[0])
    cos, sin = math.cos(angle), math.sin(angle)
    mirror = 1.0 if draw[1] < 0.5 else -1.0
    turn = torch.tensor([[cos, -sin * mirror, 0], [sin, cos * mirror, 0], [0, 0, 1.0]])
    scale = 0.95 + 0.1 * float(draw[2])
    return (points[:, None] * turn).sum(dim=-1) * scale + 0.1 * draw[3:]
