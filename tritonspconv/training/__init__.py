"""Train a segmentation network on labelled scans, simulated or from a folder."""

from tritonspconv.training.data import Sample, ScanSet, collate, kitti_set, simulated_set
from tritonspconv.training.loop import Epoch, TrainingSettings, train

__all__ = [
    "Epoch",
    "Sample",
    "ScanSet",
    "TrainingSettings",
    "collate",
    "kitti_set",
    "simulated_set",
    "train",
]
