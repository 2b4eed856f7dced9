"""Train a segmentation network or a detector on labelled scans, simulated or from a folder."""

from tritonspconv.training.box_scenes import BoxScene, BoxSet, kitti_boxes, simulated_boxes
from tritonspconv.training.boxes import average_precision, overlaps
from tritonspconv.training.data import Sample, ScanSet, collate, simulated_set
from tritonspconv.training.detection import Detection
from tritonspconv.training.folders import kitti_set, scannet_set
from tritonspconv.training.loop import Epoch, Scores, Task, TrainingSettings, fit
from tritonspconv.training.segmentation import Segmentation

__all__ = [
    "BoxScene",
    "BoxSet",
    "Detection",
    "Epoch",
    "Sample",
    "ScanSet",
    "Scores",
    "Segmentation",
    "Task",
    "TrainingSettings",
    "average_precision",
    "collate",
    "fit",
    "kitti_boxes",
    "kitti_set",
    "overlaps",
    "scannet_set",
    "simulated_boxes",
    "simulated_set",
]
