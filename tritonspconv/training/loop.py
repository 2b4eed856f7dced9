"""The training: steps, validation, checkpoints, and a resume that gives the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritonspconv.training.data import IGNORED, Sample, ScanSet, collate


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Attributes:
        epochs: Passes over the training scans.
        batch_size: Scans in a step.
        learning_rate: The largest; it rises over a tenth of the steps and falls like a cosine.
        weight_decay: Of AdamW.
        dtype: float32, or the autocast dtype.
        seed: Of the order of scans and of the augmentation. Every epoch has random numbers of its
            own, so a resumed training draws what an uninterrupted one draws.
    """

    epochs: int = 10
    batch_size: int = 2
    learning_rate: float = 4e-3
    weight_decay: float = 1e-3
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass
class Epoch:
    """What an epoch gave.

    Attributes:
        number: From 1 on.
        loss: Mean training loss.
        miou: Mean IoU over the classes that the validation scans have, in 0..1.
        iou: IoU of each class; NaN for a class that occurs nowhere.
        seconds: Time of the epoch, validation included.
    """

    number: int
    loss: float
    miou: float
    iou: list[float]
    seconds: float


Forward = Callable[[nn.Module, Sample], Tensor]


def train(
    network: nn.Module,
    forward: Forward,
    train_set: ScanSet,
    val_set: ScanSet,
    settings: TrainingSettings,
    device: torch.device,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    report: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:
    """Train a network and validate it after every epoch.

    Args:
        network: From voxels to logits ``[N, classes]``; on ``device``.
        forward: Runs the network on a batch whose tensors are on ``device``.
        train_set: Scans to learn from; they are turned, mirrored and scaled.
        val_set: Scans to judge by.
        settings: How to train.
        device: Where to train.
        checkpoint: Write weights, optimiser and history to this file after every epoch.
        resume: Continue from the checkpoint. On one device with one number of threads the result
            has the bits of an uninterrupted training.
        report: Called after every epoch.

    Returns:
        All epochs, those before a resume included.

    Raises:
        ValueError: The checkpoint was made with other settings.
    """
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    half_on_gpu = device.type == "cuda" and settings.dtype == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=half_on_gpu)
    history: list[Epoch] = []
    if resume and checkpoint is not None:
        history = _load(checkpoint, network, optimizer, scaler, settings, device)
    weights = _class_weights(train_set).to(device)
    steps = math.ceil(train_set.count / settings.batch_size)
    for number in range(len(history) + 1, settings.epochs + 1):
        start = time.perf_counter()
        network.train()
        losses = []
        for step, batch in enumerate(_batches(train_set, settings, number)):
            rate = _rate((number - 1) * steps + step, settings.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate
            moved = Sample(*(part.to(device) for part in batch))
            with _autocast(device, settings.dtype):
                logits = forward(network, moved)
            loss = nn.functional.cross_entropy(
                logits.float(), moved.labels, weights, ignore_index=IGNORED
            )
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
        iou = validate(network, forward, val_set, device, settings.dtype)
        known = iou[iou.isfinite()]
        epoch = Epoch(
            number,
            float(torch.stack(losses).mean()),
            float(known.mean()) if len(known) else math.nan,
            iou.tolist(),
            time.perf_counter() - start,
        )
        history.append(epoch)
        report(epoch)
        if checkpoint is not None:
            _save(checkpoint, network, optimizer, scaler, settings, history)
    return history


def validate(
    network: nn.Module, forward: Forward, scans: ScanSet, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the IoU of each class over all voxels of the scans; NaN for a class without one."""
    classes = len(scans.class_names)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for number in range(scans.count):
        sample = scans.sample(number)
        found = predict(network, forward, sample, device, dtype)
        counted = sample.labels != IGNORED
        pairs = sample.labels[counted] * classes + found[counted]
        confusion += pairs.bincount(minlength=classes**2).view(classes, classes)
    right = confusion.diagonal().double()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - confusion.diagonal()
    return torch.where(union > 0, right / union.clamp(min=1), math.nan)


@torch.no_grad()
def predict(
    network: nn.Module, forward: Forward, sample: Sample, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the most likely class of each voxel, int64 ``[N]`` on the CPU."""
    network.eval()
    moved = Sample(*(part.to(device) for part in sample))
    with _autocast(device, dtype):
        return forward(network, moved).argmax(dim=1).cpu()


def _batches(scans: ScanSet, settings: TrainingSettings, epoch: int):
    """Yield the batches of an epoch; equal arguments yield equal batches."""
    seed = settings.seed * 1_000_003 + epoch
    order = torch.randperm(scans.count, generator=torch.Generator().manual_seed(seed)).tolist()
    for first in range(0, scans.count, settings.batch_size):
        numbers = order[first : first + settings.batch_size]
        yield collate([scans.sample(n, augment_seed=seed * 10_007 + n) for n in numbers])


def _class_weights(scans: ScanSet) -> Tensor:
    """Return a weight for each class: the root of how rare it is, in the first twenty scans."""
    counts = torch.zeros(len(scans.class_names))
    for number in range(min(20, scans.count)):
        labels = scans.sample(number).labels
        counts += labels[labels != IGNORED].bincount(minlength=len(counts))
    share = (counts / counts.sum()).clamp(min=1e-4)
    weights = share.rsqrt()
    return weights / (weights * share).sum()


def _rate(step: int, steps: int) -> float:
    """Return the share of the learning rate: a rise over a tenth of the steps, then a cosine."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return max(1e-3, 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def _autocast(device: torch.device, dtype: torch.dtype) -> Any:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _comparable(settings: TrainingSettings) -> dict[str, Any]:
    return asdict(settings) | {"dtype": str(settings.dtype)}


def _save(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    settings: TrainingSettings,
    history: list[Epoch],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    content = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "settings": _comparable(settings),
        "history": [asdict(epoch) for epoch in history],
    }
    torch.save(content, unfinished)
    # A crash in between leaves the checkpoint of the epoch before.
    unfinished.replace(path)


def _load(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    settings: TrainingSettings,
    device: torch.device,
) -> list[Epoch]:
    content = torch.load(path, map_location=device, weights_only=True)
    if content["settings"] != _comparable(settings):
        raise ValueError(
            f"train: the settings must be those of {path}, {content['settings']}; got "
            f"{_comparable(settings)}. Train with the same settings, or into another folder."
        )
    network.load_state_dict(content["network"])
    optimizer.load_state_dict(content["optimizer"])
    scaler.load_state_dict(content["scaler"])
    return [Epoch(**epoch) for epoch in content["history"]]
