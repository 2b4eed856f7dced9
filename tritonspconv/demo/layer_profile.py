"""Time every sparse convolution of a network, forward and backward."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn

Columns = tuple[str, ...]


@dataclass
class LayerRecord:
    """Measurements of one layer; times in ms, one entry a pass."""

    name: str
    kind: str
    channels: str
    voxels_in: int = 0
    voxels_out: int = 0
    pairs: int = 0
    started: float = 0.0
    forward_ms: list[float] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)


class LayerProfiler:
    """Hooks on the sparse convolutions of ``network``, which stay on for its life.

    The device is synchronised before and after every layer, so the sum over the layers is more
    than a free-running pass takes. The first layer of an ``indice_key`` also builds its kernel map.

    Args:
        spconv: The module that the network was built from.
        network: The network.
        device: Device of the network.
    """

    def __init__(self, spconv: ModuleType, network: nn.Module, device: torch.device) -> None:
        self.device = device
        self._records: dict[str, LayerRecord] = {}
        for name, module in network.named_modules():
            if isinstance(module, spconv.conv.SparseConvolution):
                self._attach(module, LayerRecord(name, _kind(module), _channels(module)))

    @property
    def records(self) -> list[LayerRecord]:
        """The layers in the order in which they first ran."""
        return list(self._records.values())

    def forget(self) -> None:
        """Drop the times taken so far, as after a warm-up."""
        for record in self.records:
            record.forward_ms.clear()
            record.backward_ms.clear()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1e3 * time.perf_counter()

    def _attach(self, module: Any, record: LayerRecord) -> None:
        backward_started = 0.0

        def start_backward(_: torch.Tensor) -> None:
            nonlocal backward_started
            backward_started = self._now()
            record.backward_ms.append(0.0)

        def end_backward(_: torch.Tensor) -> None:
            record.backward_ms[-1] = self._now() - backward_started

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            # Hook a separate view, because the gradient of a tensor that several layers read is
            # complete only after the last of these layers.
            x = x.replace_feature(x.features.view_as(x.features))
            if x.features.requires_grad:
                x.features.register_hook(end_backward)
            self._records.setdefault(record.name, record)
            record.voxels_in = x.features.shape[0]
            record.started = self._now()
            return (x, *args[1:])

        def after(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            record.forward_ms.append(self._now() - record.started)
            record.voxels_out = out.features.shape[0]
            record.pairs = _num_pairs(module, out)
            out.features.register_hook(start_backward)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        # The first layer of a network has no input gradient: its backward ends with the weight's.
        module.weight.register_post_accumulate_grad_hook(end_backward)


def print_table(records: list[LayerRecord]) -> None:
    """Print one aligned line for each layer, and the sums of the times."""
    header = (
        "layer", "type", "channels", "voxels in", "voxels out", "nbrs/voxel", "fwd ms", "bwd ms",
    )  # fmt: skip
    rows: list[Columns] = [_row(record) for record in records]
    forward = sum(statistics.median(record.forward_ms) for record in records)
    backward = sum(statistics.median(record.backward_ms) for record in records)
    rows.append(("all layers", "", "", "", "", "", f"{forward:.2f}", f"{backward:.2f}"))
    print_columns(header, rows, left=3)


def print_columns(header: Columns, rows: list[Columns], left: int) -> None:
    """Print rows under a header, the first ``left`` columns flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, tuple("-" * width for width in widths), *rows):
        cells = [
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip(), flush=True)


def _row(record: LayerRecord) -> Columns:
    return (
        record.name.removesuffix(".conv"),
        record.kind,
        record.channels,
        f"{record.voxels_in:,}",
        f"{record.voxels_out:,}",
        f"{record.pairs / max(record.voxels_out, 1):.1f}",
        f"{statistics.median(record.forward_ms):.2f}",
        f"{statistics.median(record.backward_ms):.2f}",
    )


def _kind(module: Any) -> str:
    window = "x".join(str(size) for size in module.kernel_size)
    stride = "x".join(str(step) for step in module.stride)
    if len(set(module.stride)) == 1:
        stride = str(module.stride[0])
    strided = "" if module.subm or module.inverse or stride == "1" else f" /{stride}"
    return f"{type(module).__name__} {window}{strided}"


def _channels(module: Any) -> str:
    return f"{module.in_channels:>3} > {module.out_channels}"


def _num_pairs(module: Any, out: Any) -> int:
    """Return the size of the layer's kernel map; a 1x1 layer has none, and one pair a voxel."""
    if module.conv1x1:
        return out.features.shape[0]
    return out.indice_dict[module.indice_key].kernel_map.num_pairs()
