"""Detection of cars as a task: maps of centres, their loss, boxes from maps, average precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritonspconv.models.detector import BOX_CHANNELS, STRIDE
from tritonspconv.ops import voxelize
from tritonspconv.points import VoxelGrid
from tritonspconv.training.box_scenes import BoxScene, BoxSet, changed_scene
from tritonspconv.training.boxes import Judged, average_precision, distinct
from tritonspconv.training.loop import Scores

# The scores of a detector: name, least overlap, and True if heights count.
SCORES = (
    ("from above, 0.7", 0.7, False),
    ("volume, 0.7", 0.7, True),
    ("from above, 0.5", 0.5, False),
)
_MOST_BOXES = 60
_LEAST_SCORE = 0.05
# Cells whose bell is above this learn the box of their car: the highest score is not always in the
# cell of the centre. With cells of 0.8 m a car has five such cells.
_NEAR = 0.5
# Cells whose bell of an ignored car is above this learn nothing.
_UNKNOWN = 0.1
# The weight of the boxes' values relative to the centres, and the weight of each value.
_BOX_SHARE = 1.0
# The weights belong to x, y, z, the sizes and the angle. With 2 for the angle a short training
# found fewer cars.
_VALUE_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5)


class BoxBatch(NamedTuple):
    """The voxels of some scenes, and the maps that a network should give.

    Attributes:
        feats: float32 ``[N, 4]``.
        coords: int32 ``[N, 4]``: batch, z, y, x.
        centres: float32 ``[B, Y, X]``: see `BoxMaps`.
        cells: int64 ``[M]``: flat numbers of the cells near a centre, in ``[B, Y, X]``.
        values: float32 ``[M, 8]``: the right values of the map at these cells.
        weights: float32 ``[M]``: how much each of these cells counts.
    """

    feats: Tensor
    coords: Tensor
    centres: Tensor
    cells: Tensor
    values: Tensor
    weights: Tensor


class BoxMaps(NamedTuple):
    """The maps of one scene that a network should give.

    Attributes:
        centres: float32 ``[Y, X]``: 1 at a centre, falling around it, and -1 where an ignored car
            leaves open what is right.
        cells: int64 ``[M]``: flat numbers of the cells near a centre, in ``[Y, X]``.
        values: float32 ``[M, 8]``: the box of the nearest car, as each of these cells sees it.
        weights: float32 ``[M]``: 1 for the cell that holds a centre, falling around it.
    """

    centres: Tensor
    cells: Tensor
    values: Tensor
    weights: Tensor


# Runs a detector on features, coordinates and `batch_size`.
Forward = Callable[..., Tensor]


def run_detector(network: nn.Module, feats: Tensor, coords: Tensor, batch_size: int) -> Tensor:
    """Return the maps ``[B, 1 + 8, Y, X]``."""
    return network(feats, coords, batch_size)


@dataclass(frozen=True)
class Detection:
    """A box for every car; see `tritonspconv.training.loop.Task`.

    Attributes:
        train_set: Scenes to learn from; they are turned, mirrored and scaled.
        val_set: Scenes to judge by.
        forward: Runs the network.
    """

    train_set: BoxSet
    val_set: BoxSet
    forward: Forward = run_detector

    @property
    def train_count(self) -> int:
        """Number of scenes to learn from."""
        return self.train_set.count

    @property
    def val_count(self) -> int:
        """Number of scenes to judge by."""
        return self.val_set.count

    def batch(self, numbers: Sequence[int], seeds: Sequence[int]) -> BoxBatch:
        """Return voxels and maps of training scenes."""
        scenes = [
            changed_scene(self.train_set.load(number), seed)
            for number, seed in zip(numbers, seeds, strict=True)
        ]
        return box_batch(scenes, self.train_set.grid)

    def loss(self, network: nn.Module, batch: BoxBatch) -> Tensor:
        """Return the focal loss of the centres and the error of the boxes' values."""
        size = batch.centres.shape[0]
        maps = self.forward(network, batch.feats, batch.coords, batch_size=size).float()
        count = (batch.centres == 1).sum().clamp(min=1)
        centre_loss = _focal_loss(maps[:, 0], batch.centres) / count
        at_cells = maps[:, 1:].permute(0, 2, 3, 1).reshape(-1, BOX_CHANNELS)[batch.cells]
        weights = at_cells.new_tensor(_VALUE_WEIGHTS)
        errors = ((at_cells - batch.values).abs() * weights).sum(dim=1) * batch.weights
        return centre_loss + _BOX_SHARE * errors.sum() / batch.weights.sum().clamp(min=1)

    def judge(self, network: nn.Module, number: int, device: torch.device) -> Judged:
        """Return the found boxes and the true boxes of a validation scene."""
        scene = self.val_set.load(number)
        boxes, scores = self.find(network, scene, device)
        inside = self.val_set.grid
        lower, upper = torch.tensor(inside.point_range).view(2, 3)
        truth = scene.boxes[:, :2]
        there = ((truth >= lower[:2]) & (truth < upper[:2])).all(dim=1)
        return Judged(boxes, scores, scene.boxes[there], scene.ignored[there])

    def find(
        self, network: nn.Module, scene: BoxScene, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return boxes float32 ``[M, 7]`` and scores ``[M]`` on the CPU, best first.

        The network must be in evaluation mode, and gradients off.
        """
        feats, coords = scene_voxels(scene, self.val_set.grid)
        maps = self.forward(network, feats.to(device), coords.to(device), batch_size=1)
        return boxes_of(maps[0].float().cpu(), self.val_set.grid)

    def scores(self, judged: Sequence[Judged]) -> Scores:
        """Return the average precisions; the first is the one to judge by."""
        parts = {
            name: average_precision(judged, least, heights=heights)
            for name, least, heights in SCORES
        }
        return Scores(parts[SCORES[0][0]], parts)


def scene_voxels(scene: BoxScene, grid: VoxelGrid) -> tuple[Tensor, Tensor]:
    """Return the mean points of the voxels, scaled, float32 ``[N, 4]``, and int32 ``[N, 4]``."""
    voxels = voxelize(scene.points, grid.voxel_size, grid.point_range)
    assert voxels.feats is not None
    scale = voxels.feats.new_tensor([1 / 32, 1 / 32, 0.5, 1.0])
    return voxels.feats * scale, voxels.coords


def box_batch(scenes: Sequence[BoxScene], grid: VoxelGrid) -> BoxBatch:
    """Return voxels and maps; a box whose centre lies outside the grid is in no map."""
    feats, coords, maps = [], [], []
    for number, scene in enumerate(scenes):
        scene_feats, scene_coords = scene_voxels(scene, grid)
        feats.append(scene_feats)
        coords.append(torch.cat([scene_coords[:, :1] + number, scene_coords[:, 1:]], dim=1))
        maps.append(maps_of(scene.boxes, scene.ignored, grid))
    centres = torch.stack([each.centres for each in maps])
    cells = [each.cells + number * centres[0].numel() for number, each in enumerate(maps)]
    values, weights = ([getattr(each, name) for each in maps] for name in ("values", "weights"))
    return BoxBatch(
        torch.cat(feats), torch.cat(coords), centres, torch.cat(cells), torch.cat(values),
        torch.cat(weights),
    )  # fmt: skip


def maps_of(boxes: Tensor, ignored: Tensor, grid: VoxelGrid) -> BoxMaps:
    """Return the maps of a scene.

    Args:
        boxes: float32 ``[M, 7]``.
        ignored: bool ``[M]``: boxes that may be found or missed.
        grid: Grid of the voxels; a cell of the maps is ``STRIDE`` voxels wide.
    """
    side = STRIDE * boxes.new_tensor(grid.voxel_size[:2])
    rows, columns = (extent // STRIDE for extent in grid.spatial_shape[1:])
    place = (boxes[:, :2] - boxes.new_tensor(grid.point_range[:2])) / side
    inside = (place >= 0).all(dim=1) & (place[:, 0] < columns) & (place[:, 1] < rows)
    boxes, place, ignored = boxes[inside], place[inside], ignored[inside]
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    cells = torch.stack([x.flatten(), y.flatten()], dim=1)
    distance = (cells - place.floor()[:, None]).square().sum(dim=2)
    # The bell is as wide as the car: cells near the centre are half right.
    width = (boxes[:, 4] / side[0] / 2).clamp(min=0.6)[:, None]
    # A car of height 0 everywhere, so that every cell has a highest bell.
    bells = F.pad(torch.exp(-distance / (2 * width.square())), (0, 0, 0, 1))
    unknown = bells[:-1][ignored].sum(dim=0)
    height, owner = bells[F.pad(~ignored, (0, 1), value=True)].max(dim=0)
    centres = torch.where((unknown > _UNKNOWN) & (unknown > height), -1.0, height)
    near = (height > _NEAR).nonzero()[:, 0]
    owner = owner[near]
    boxes, offset = boxes[~ignored][owner], place[~ignored][owner] - cells[near]
    angle = 2 * boxes[:, 6:]
    values = [offset, boxes[:, 2:3], boxes[:, 3:6].log(), angle.sin(), angle.cos()]
    return BoxMaps(centres.view(rows, columns), near, torch.cat(values, dim=1), height[near])


def boxes_of(maps: Tensor, grid: VoxelGrid) -> tuple[Tensor, Tensor]:
    """Return the boxes of a map, best first, and their scores.

    Args:
        maps: float32 ``[1 + 8, Y, X]``.
        grid: Grid of the voxels.
    """
    chance = maps[0].sigmoid()
    peak = F.max_pool2d(chance[None, None], 3, stride=1, padding=1)[0, 0]
    chance = torch.where(chance == peak, chance, 0.0).flatten()
    scores, cells = chance.topk(min(_MOST_BOXES, chance.numel()))
    cells, scores = cells[scores > _LEAST_SCORE], scores[scores > _LEAST_SCORE]
    values = maps[1:].flatten(1).t()[cells]
    columns = maps.shape[2]
    cell = torch.stack([cells % columns, cells // columns], dim=1)
    side = STRIDE * values.new_tensor(grid.voxel_size[:2])
    centre = (cell + values[:, :2]) * side + values.new_tensor(grid.point_range[:2])
    sizes = values[:, 3:6].clamp(-3, 4).exp()
    angle = torch.atan2(values[:, 6], values[:, 7]) / 2
    boxes = torch.cat([centre, values[:, 2:3], sizes, angle[:, None]], dim=1)
    kept = distinct(boxes, scores)
    return boxes[kept], scores[kept]


def _focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the sum over cells with a target of at least 0 (Law and Deng, ECCV 2018).

    Easy cells and cells near a centre weigh less.
    """
    chance = logits.sigmoid()
    hit = F.logsigmoid(logits) * (1 - chance).square()
    miss = F.logsigmoid(-logits) * chance.square() * (1 - target) ** 4
    return -torch.where(target == 1, hit, torch.where(target >= 0, miss, 0.0)).sum()
