"""Segmentation as a task: the weighted cross entropy, and the mean IoU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from tritonspconv.training.data import IGNORED, Sample, ScanSet, collate
from tritonspconv.training.loop import Scores

# Runs a network on a batch and returns logits in its order.
Forward = Callable[[nn.Module, Sample], Tensor]


class Segmentation:
    """A class for every voxel; see `tritonspconv.training.loop.Task`.

    Args:
        forward: Runs the network on a batch: logits ``[N, classes]``.
        train_set: Scans to learn from; they are turned, mirrored and scaled.
        val_set: Scans to judge by.
    """

    def __init__(self, forward: Forward, train_set: ScanSet, val_set: ScanSet) -> None:
        self.forward = forward
        self.train_set, self.val_set = train_set, val_set
        self.train_count, self.val_count = train_set.count, val_set.count

    def batch(self, numbers: Sequence[int], seeds: Sequence[int]) -> Sample:
        """Return voxels of training scans."""
        scans = zip(numbers, seeds, strict=True)
        return collate([self.train_set.sample(number, seed) for number, seed in scans])

    def loss(self, network: nn.Module, batch: Sample) -> Tensor:
        """Return the cross entropy; rare classes weigh more."""
        logits = self.forward(network, batch).float()
        weights = self._class_weights.to(logits.device)
        return nn.functional.cross_entropy(logits, batch.labels, weights, ignore_index=IGNORED)

    def judge(self, network: nn.Module, number: int, device: torch.device) -> Tensor:
        """Return how many voxels of each class are taken for each class, int64 ``[C, C]``."""
        sample = self.val_set.sample(number)
        found = self.predict(network, sample, device)
        classes = len(self.val_set.class_names)
        counted = sample.labels != IGNORED
        pairs = sample.labels[counted] * classes + found[counted]
        return pairs.bincount(minlength=classes**2).view(classes, classes)

    def scores(self, judged: Sequence[Tensor]) -> Scores:
        """Return the mean IoU and the IoU of each class, over all voxels of the scans."""
        confusion = torch.stack(list(judged)).sum(dim=0)
        right = confusion.diagonal().double()
        union = confusion.sum(dim=0) + confusion.sum(dim=1) - confusion.diagonal()
        iou = torch.where(union > 0, right / union.clamp(min=1), math.nan)
        known = iou[iou.isfinite()]
        mean = float(known.mean()) if len(known) else math.nan
        return Scores(mean, dict(zip(self.val_set.class_names, iou.tolist(), strict=True)))

    def predict(self, network: nn.Module, sample: Sample, device: torch.device) -> Tensor:
        """Return the most likely class of each voxel, int64 ``[N]`` on the CPU.

        The network must be in evaluation mode, and gradients off.
        """
        moved = Sample(*(part.to(device) for part in sample))
        return self.forward(network, moved).argmax(dim=1).cpu()

    @cached_property
    def _class_weights(self) -> Tensor:
        """A weight for each class: the root of how rare it is, in the first twenty scans."""
        counts = torch.zeros(len(self.train_set.class_names))
        for number in range(min(20, self.train_set.count)):
            labels = self.train_set.sample(number).labels
            counts += labels[labels != IGNORED].bincount(minlength=len(counts))
        share = (counts / counts.sum()).clamp(min=1e-4)
        weights = share.rsqrt()
        return weights / (weights * share).sum()
