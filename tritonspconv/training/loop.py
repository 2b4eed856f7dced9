"""The training: steps, validation, checkpoints, and a resume that gives the same bits.

Under torchrun every process takes its share of each batch and of the validation scans.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of the training; the defaults are those of ``tritonspconv train``.

    Attributes:
        epochs: Passes over the training scans.
        batch_size: Scans in a step, summed over all processes. Where the scans run out, the last
            batch of an epoch takes the epoch's first ones again.
        learning_rate: The largest; it rises over a tenth of the steps and falls like a cosine.
        weight_decay: The weight decay of AdamW.
        dtype: float32, or the autocast dtype.
        seed: Seed of the order of scans and of the augmentation. Every epoch has random numbers of
            its own, so a resumed training draws the same numbers as an uninterrupted one.
    """

    epochs: int
    batch_size: int = 2
    learning_rate: float = 4e-3
    weight_decay: float = 1e-3
    dtype: torch.dtype = torch.float32
    seed: int = 0


class Scores(NamedTuple):
    """Scores of a validation, in 0..1.

    Attributes:
        main: The number to judge by.
        parts: The numbers that it is made of, by name; NaN where nothing could be counted.
    """

    main: float
    parts: dict[str, float]


@dataclass
class Epoch:
    """The result of an epoch.

    Attributes:
        number: From 1 on.
        loss: Mean training loss.
        score: The main score of the task, in 0..1: mean IoU, or average precision.
        parts: The numbers behind the score, by name: the IoU of each class; NaN for a class that
            occurs nowhere.
        seconds: Time of the epoch, validation included.
    """

    number: int
    loss: float
    score: float
    parts: dict[str, float]
    seconds: float


class Task(Protocol):
    """A task of a training: the batches, the loss, and the scores of a network."""

    @property
    def train_count(self) -> int:
        """Number of scans to learn from."""
        ...

    @property
    def val_count(self) -> int:
        """Number of scans to judge by."""
        ...

    def batch(self, numbers: Sequence[int], seeds: Sequence[int]) -> Any:
        """Return a named tuple of tensors: training scans, changed at random by the seeds."""
        ...

    def loss(self, network: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a batch whose tensors are on the network's device."""
        ...

    def judge(self, network: nn.Module, number: int, device: torch.device) -> Any:
        """Return the data of one validation scan that the scores are computed from."""
        ...

    def scores(self, judged: Sequence[Any]) -> Scores:
        """Return the scores of all validation scans."""
        ...


def fit(
    network: nn.Module,
    task: Task,
    settings: TrainingSettings,
    device: torch.device,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    report: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:
    """Train a network and validate it after every epoch.

    Where ``torch.distributed`` is initialised, gradients are averaged over its processes, and the
    first one writes checkpoints and reports. Batch norms see the scans of their own process.

    Args:
        network: The network, on ``device``.
        task: The data, the loss and the score.
        settings: The settings of the training.
        device: Device of the training.
        checkpoint: Write weights, optimiser and history to this file after every epoch.
        resume: Continue from the checkpoint. On one device with one number of threads the result
            has the bits of an uninterrupted training.
        report: Called after every epoch.

    Returns:
        All epochs, those before a resume included.

    Raises:
        ValueError: The checkpoint was made with other settings or with another number of scans, or
            the processes cannot share a batch evenly.
    """
    rank, processes = _processes()
    if settings.batch_size % processes:
        raise ValueError(
            f"fit: batch_size must be a multiple of the {processes} processes; got "
            f"{settings.batch_size}."
        )
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    half_on_gpu = device.type == "cuda" and settings.dtype == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=half_on_gpu)
    history: list[Epoch] = []
    setup = _comparable(settings, task)
    if resume and checkpoint is not None:
        history = _load(checkpoint, network, optimizer, scaler, setup, device)
    step = _LossOf(network, task, device, settings.dtype)
    forward: nn.Module = DistributedDataParallel(step) if processes > 1 else step
    steps = math.ceil(task.train_count / settings.batch_size)
    for number in range(len(history) + 1, settings.epochs + 1):
        start = time.perf_counter()
        network.train()
        losses = []
        for index, batch in enumerate(_batches(task, settings, number, rank, processes)):
            rate = _rate((number - 1) * steps + index, settings.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate
            loss = forward(*(part.to(device) for part in batch), kind=type(batch))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
        scores = validate(network, task, device, settings.dtype)
        mean_loss = _mean_over_processes(torch.stack(losses).mean())
        epoch = Epoch(number, mean_loss, *scores, time.perf_counter() - start)
        history.append(epoch)
        if rank == 0:
            report(epoch)
            if checkpoint is not None:
                _save(checkpoint, network, optimizer, scaler, setup, history)
    return history


def follow_quickly(network: nn.Module, momentum: float = 0.1) -> None:
    """Let the running statistics of batch norms follow a training of few steps.

    Networks for long trainings have a momentum of 0.01: after 100 steps the initial statistics
    would still weigh a third.

    Args:
        network: Its batch norms are changed in place.
        momentum: Share of each batch.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum


@torch.no_grad()
def validate(network: nn.Module, task: Task, device: torch.device, dtype: torch.dtype) -> Scores:
    """Return the scores of the validation scans; each process judges its share of them."""
    rank, processes = _processes()
    network.eval()
    if processes > 1:
        # Batch norms have statistics of their own process.
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
    with autocast(device, dtype):
        mine = [task.judge(network, n, device) for n in range(rank, task.val_count, processes)]
    if processes == 1:
        return task.scores(mine)
    shares: list[Any] = [None] * processes
    dist.all_gather_object(shares, mine)
    return task.scores([shares[n % processes][n // processes] for n in range(task.val_count)])


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Return autocast to ``dtype``; it does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class _LossOf(nn.Module):
    """A network with its loss, so that DDP sees the whole step."""

    def __init__(
        self, network: nn.Module, task: Task, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.network = network
        self._task, self._device, self._dtype = task, device, dtype

    def forward(self, *parts: Tensor, kind: Callable[..., Any]) -> Tensor:
        with autocast(self._device, self._dtype):
            return self._task.loss(self.network, kind(*parts))


def _processes() -> tuple[int, int]:
    """Return the number of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _mean_over_processes(value: Tensor) -> float:
    _, processes = _processes()
    if processes > 1:
        dist.all_reduce(value)
    return float(value) / processes


def _batches(
    task: Task, settings: TrainingSettings, epoch: int, rank: int, processes: int
) -> Iterator[Any]:
    """Yield this process's share of the batches of an epoch; equal arguments, equal batches."""
    seed = settings.seed * 1_000_003 + epoch
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(task.train_count, generator=generator).tolist()
    size = settings.batch_size
    for first in range(0, len(order), size):
        numbers = [order[(first + n) % len(order)] for n in range(rank, size, processes)]
        yield task.batch(numbers, [seed * 10_007 + number for number in numbers])


def _rate(step: int, steps: int) -> float:
    """Return the share of the learning rate: a rise over a tenth of the steps, then a cosine."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return max(1e-3, 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def _comparable(settings: TrainingSettings, task: Task) -> dict[str, Any]:
    """Return what a training and its resume must have in common."""
    counts = {"training scans": task.train_count, "validation scans": task.val_count}
    own = {"dtype": str(settings.dtype), "processes": _processes()[1]}
    return asdict(settings) | own | counts


def _save(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    setup: dict[str, Any],
    history: list[Epoch],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    content = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "settings": setup,
        "history": [asdict(epoch) for epoch in history],
    }
    torch.save(content, unfinished)
    # If the process crashes here, the checkpoint of the epoch before remains.
    unfinished.replace(path)


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}


def _load(
    path: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    setup: dict[str, Any],
    device: torch.device,
) -> list[Epoch]:
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        found = content["settings"]
    except Exception as error:
        raise ValueError(
            f"fit: {path} must be a checkpoint of a training; it cannot be read as one "
            f"({type(error).__name__}). Train into another folder."
        ) from error
    other = [name for name in {**found, **setup} if found.get(name) != setup.get(name)]
    if other:
        differences = ", ".join(
            f"{name} {found.get(name)} there and {setup.get(name)} now" for name in other
        )
        raise ValueError(
            f"fit: the settings must be those of {path}; got {differences}. Train with the same "
            "settings, or into another folder."
        )
    if _shapes(content["network"]) != _shapes(network.state_dict()):
        raise ValueError(
            f"fit: the network must be that of {path}; its weights have other names or shapes. "
            "Train the same network, or into another folder."
        )
    network.load_state_dict(content["network"])
    optimizer.load_state_dict(content["optimizer"])
    scaler.load_state_dict(content["scaler"])
    return [Epoch(**epoch) for epoch in content["history"]]
