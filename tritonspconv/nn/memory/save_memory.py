"""Training in less memory: activations are computed again in the backward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tritonspconv.nn.fusable import LayerFamily, family_of
from tritonspconv.nn.memory.choose import choose_segments, maps_to_release, peak_bytes
from tritonspconv.nn.memory.measure import measure
from tritonspconv.nn.memory.segment import Segment

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


@dataclass(frozen=True)
class MemoryPlan:
    """What :func:`save_memory` has switched on.

    Attributes:
        model: The network.
        segments: Names of the modules that run again in the backward pass, in the order of their
            calls.
        released: Names of the segments whose kernel maps are made again in the backward pass.
        refused: Modules that must not run twice, and why.
        plain_bytes: What the example saves for the backward pass without the plan.
        planned_bytes: The most that the example saves at a time with the plan. Gradients,
            parameters and kernel maps come on top of both.
    """

    model: nn.Module = field(repr=False)
    segments: tuple[str, ...]
    released: tuple[str, ...]
    refused: dict[str, str]
    plain_bytes: int
    planned_bytes: int

    def remove(self) -> None:
        """Have the network keep its activations again."""
        _remove(self.model)

    def __str__(self) -> str:
        plain, planned = self.plain_bytes / 2**20, self.planned_bytes / 2**20
        lines = [f"activations of the example: {plain:.1f} MiB -> {planned:.1f} MiB"]
        for name in self.segments:
            maps = ", with its kernel maps" if name in self.released else ""
            lines.append(f"computed again: {name}{maps}")
        lines += [f"left alone: {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def save_memory(model: nn.Module, *example: Any, share: float = 0.4) -> MemoryPlan:
    """Have a network compute activations again in the backward pass instead of keeping them.

    One forward pass on an example says what each module keeps. The modules that then run again,
    under ``torch.utils.checkpoint``, are those that bring the peak below ``share`` in little time.
    Results, gradients and running statistics keep their bits. Inference is not changed. A large
    kernel map that only one of these modules uses is released after the forward pass, and made
    again in the backward pass.

    Args:
        model: The network, in training mode and not yet wrapped by DDP or FSDP. It stays the same
            object, with the same names in its ``state_dict``.
        example: The arguments of ``model`` for an example. Any number of voxels will do, if their
            distribution is that of the training data. Use autocast as in training.
        share: The peak to reach, as a share of the bytes that the example saves without the plan;
            from 0 (the lowest peak) to 1. If no choice reaches it, the choice is that of the lowest
            peak.

    Returns:
        The plan; print it. :meth:`MemoryPlan.remove` takes the change back, and a second call
        replaces it.

    Raises:
        TypeError: ``model`` is wrapped already.
        ValueError: ``model`` has no sparse convolution, the example needs no backward pass, or
            ``share`` is out of range.

    Example:
        >>> model = nn.Sequential(*(ts.nn.Sequential(
        ...     ts.nn.SubMConv3d(4, 4, 3), ts.nn.BatchNorm(4), ts.nn.ReLU()
        ... ) for _ in range(6)))
        >>> plan = ts.save_memory(model, ts.SparseTensor.from_dense(torch.ones(1, 4, 8, 8, 8)))
        >>> plan.planned_bytes < plan.plain_bytes
        True
    """
    if not 0 <= share <= 1:
        raise ValueError(
            f"save_memory: share must be from 0 to 1, a share of the saved bytes; got {share}. "
            "Pass 0 for the lowest peak."
        )
    if type(model).__name__ in _WRAPPERS:
        raise TypeError(
            f"save_memory: model is wrapped in {type(model).__name__}, which expects a backward "
            "pass after each forward pass. Call save_memory on the network inside, before it is "
            "wrapped."
        )
    families = _families(model)
    if not families:
        raise ValueError(
            f"save_memory: {type(model).__name__} has no sparse convolution of tritonspconv.nn, "
            "compat.spconv or compat.minkowski, so there is nothing that it could choose."
        )
    _remove(model)
    refused = {
        name: "its forward is replaced"
        for name, module in model.named_modules()
        if name and "forward" in vars(module)
    }
    candidates = [name for name, module in model.named_modules() if _holds_convs(module) and name]
    watched = [name for name in candidates if name not in refused]
    measured = measure(model, watched, families, example)
    if not measured.saved:
        raise ValueError(
            "save_memory: the forward pass of the example saves nothing for a backward pass. Pass "
            "a network with parameters that require gradients."
        )
    refused |= measured.changes
    allowed = [name for name in watched if _may(name, refused)]
    chosen, peak = choose_segments(measured, allowed, share)
    released = maps_to_release(measured, chosen, peak)
    for name in chosen:
        module = model.get_submodule(name)
        module.forward = Segment(module, released[name])
    return MemoryPlan(
        model,
        tuple(chosen),
        tuple(name for name in chosen if released[name]),
        refused,
        peak_bytes(measured, ()),
        peak,
    )


def _remove(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Segment):
            del module.forward


def _families(model: nn.Module) -> list[LayerFamily]:
    found = (family_of(module) for module in model.modules())
    return list({id(family): family for family in found if family is not None}.values())


def _holds_convs(module: nn.Module) -> bool:
    """Return whether a sparse convolution is inside of ``module``, and not ``module`` itself."""
    return family_of(module) is None and any(family_of(part) for part in module.modules())


def _may(name: str, refused: dict[str, str]) -> bool:
    """Return whether neither the module nor a module inside of it is refused."""
    return not any(f"{other}.".startswith(f"{name}.") for other in refused)
