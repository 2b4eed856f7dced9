"""Labelled scans as voxels; simulated rooms and streets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tritonspconv.coords import Grid
from tritonspconv.testing.lidar import CLASS_NAMES, simulate_sweep
from tritonspconv.testing.rooms import ROOM_CLASSES, simulate_room

Split = Literal["train", "val"]
CHANNELS = 4
IGNORED = -1
# Seeds of the validation scans start here: no training scan has one of them.
FIRST_VAL_SEED = 1_000_000


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
            number: Number of the scan.
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
        kind: The kind of scene to simulate.
        split: The half of the seeds to use.
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
    coords, group, counts = _distinct(cells)
    means = torch.zeros(len(coords), feats.shape[1]).index_add(0, group, feats) / counts[:, None]
    votes = torch.zeros(len(coords), num_classes + 1)
    votes = votes.index_put((group, labels + 1), torch.ones(()), accumulate=True)
    # A voxel with a labelled point has a class.
    votes[:, 0] *= 1e-3
    return Sample(torch.nn.functional.pad(coords, (1, 0)), means, votes.argmax(dim=1) - 1)


def _distinct(cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distinct rows in ascending order, the place of each row among them, and counts.

    ``torch.unique(dim=0)`` gives the same result, and takes ten times as long for a scan.

    Args:
        cells: int32 ``[N, 3]``, none below zero.
    """
    shape = tuple((cells.amax(dim=0) + 1).tolist())
    if math.prod(shape) > 2**62:  # more cells than a grid may have
        return cells.unique(dim=0, return_inverse=True, return_counts=True)
    grid = Grid((0, 0, 0), shape, batch_size=1)
    keys = grid.keys(torch.nn.functional.pad(cells, (1, 0)))
    keys, group, counts = keys.unique(return_inverse=True, return_counts=True)
    return grid.coords(keys)[:, 1:], group, counts


def collate(samples: Sequence[Sample]) -> Sample:
    """Return a batch: the samples one after another, the batch index in the first column."""
    coords = [
        torch.cat([torch.full_like(sample.coords[:, :1], number), sample.coords[:, 1:]], dim=1)
        for number, sample in enumerate(samples)
    ]
    feats, labels = ([getattr(sample, name) for sample in samples] for name in ("feats", "labels"))
    return Sample(torch.cat(coords), torch.cat(feats), torch.cat(labels))


def room_feats(xyz: Tensor, color: Tensor) -> Tensor:
    """Return colour ``[N, 3]`` in 0..1 and height, shifted around zero."""
    return torch.cat([color - 0.5, xyz[:, 2:] - 1.2], dim=1)


def lidar_feats(points: Tensor) -> Tensor:
    """Return intensity, height, distance and a one, of like size."""
    distance = points[:, :2].norm(dim=1, keepdim=True)
    parts = [points[:, 3:4], 0.5 * points[:, 2:3], distance / 30, torch.ones_like(distance)]
    return torch.cat(parts, dim=1)


def _room(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    # 10 cm voxels need a quarter of the points that 5 cm voxels need.
    room = simulate_room(seed, density=600)
    xyz = room.points[:, :3]
    return xyz, room_feats(xyz, room.points[:, 3:]), room.labels


def _street(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    sweep = simulate_sweep(seed, azimuths=1024)
    near = sweep.points[:, :2].norm(dim=1) < 40
    points = sweep.points[near]
    return points[:, :3], lidar_feats(points), sweep.labels[near]


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
