"""Folders of labelled scans: SemanticKITTI and ScanNet."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tritonspconv.training.data import IGNORED, ScanSet, Split, lidar_feats, room_feats

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

# The twenty classes of ScanNet's benchmark, and their numbers in the labels (those of NYU40).
SCANNET_CLASSES = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf",
    "picture", "counter", "desk", "curtain", "refrigerator", "shower curtain", "toilet", "sink",
    "bathtub", "other furniture",
)  # fmt: skip
_SCANNET_IDS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39)


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
        return points[:, :3], lidar_feats(points), table[classes.long()]

    return ScanSet(KITTI_CLASSES, voxel_size, len(labels), load)


def scannet_set(folder: str | Path, split: Split, voxel_size: float = 0.05) -> ScanSet:
    """Return the scenes of a ScanNet folder.

    The folder holds ``scans/scene0000_00/scene0000_00_vh_clean_2.ply`` and
    ``..._vh_clean_2.labels.ply``, and the lists ``scannetv2_train.txt`` and ``scannetv2_val.txt``
    of the benchmark, there or in ``scans``. Scenes that a list names and the folder lacks are left
    out.

    Args:
        folder: The folder above ``scans``.
        split: Which list.
        voxel_size: Metres.

    Raises:
        FileNotFoundError: There is no list, or no labelled scene of it.
        ImportError: plyfile is not installed.
    """
    root, name = Path(folder), f"scannetv2_{split}.txt"
    lists = [place / name for place in (root, root / "scans") if (place / name).is_file()]
    if not lists:
        raise FileNotFoundError(
            f"scannet_set: {folder} must hold {name}, the benchmark's list of scenes, and scans/; "
            "it holds no list. Name the folder above scans."
        )
    scenes = [
        root / "scans" / scene / f"{scene}_vh_clean_2" for scene in lists[0].read_text().split()
    ]
    scenes = [scene for scene in scenes if scene.with_name(f"{scene.name}.labels.ply").is_file()]
    if not scenes:
        raise FileNotFoundError(
            f"scannet_set: {folder} must hold scans/SCENE/SCENE_vh_clean_2.labels.ply of the "
            f"scenes that {lists[0].name} names; it holds none."
        )
    table = torch.full((2**16,), IGNORED)
    table[list(_SCANNET_IDS)] = torch.arange(len(_SCANNET_IDS))

    def load(number: int) -> tuple[Tensor, Tensor, Tensor]:
        scene = scenes[number]
        mesh = _vertices(
            scene.with_name(f"{scene.name}.ply"), ("x", "y", "z", "red", "green", "blue")
        )
        labels = _vertices(scene.with_name(f"{scene.name}.labels.ply"), ("label",))
        if len(mesh) != len(labels):
            raise ValueError(
                f"scannet_set: {scene.name}.ply and .labels.ply must have the same vertices; got "
                f"{len(mesh)} and {len(labels)}."
            )
        xyz, color = mesh[:, :3].float(), (mesh[:, 3:] / 255).float()
        return xyz, room_feats(xyz, color), table[labels[:, 0].long()]

    return ScanSet(SCANNET_CLASSES, voxel_size, len(scenes), load)


def _vertices(path: Path, names: tuple[str, ...]) -> Tensor:
    """Return columns of the vertices of a PLY file, float64 ``[N, len(names)]``."""
    try:
        from plyfile import PlyData, PlyParseError
    except ImportError as error:
        raise ImportError(
            "scannet_set needs plyfile, which is not installed. pip install 'tritonspconv[demo]'"
        ) from error
    try:
        vertices = PlyData.read(str(path))["vertex"]
        return torch.stack(
            [torch.from_numpy(vertices[name].astype("float64")) for name in names], 1
        )
    except (PlyParseError, KeyError, ValueError) as error:
        raise ValueError(
            f"scannet_set: {path} must be a PLY file whose vertices have {', '.join(names)}: "
            f"{error}."
        ) from error
