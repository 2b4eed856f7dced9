"""The state that one run of a network changes, so that a rehearsal can be undone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module, Parameter


class Saved:
    """Copies of tensors, which can be written back."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        # One launch copies many tensors of one dtype.
        self._groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for tensor in tensors:
            held, copies = self._groups.setdefault(tensor.dtype, ([], []))
            held.append(tensor.detach())
            copies.append(tensor.detach().clone())

    @torch.no_grad()
    def update(self) -> None:
        """Copy the current contents of the tensors."""
        for tensors, copies in self._groups.values():
            torch._foreach_copy_(copies, tensors)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back."""
        for tensors, copies in self._groups.values():
            torch._foreach_copy_(tensors, copies)  # pyright: ignore[reportPrivateImportUsage]


@contextmanager
def rehearsal(modules: Iterable[Module]) -> Iterator[None]:
    """Run a block, then restore the modules' buffers and the random number generators.

    Warm-up runs move running statistics and count batches; a network must not notice them.
    """
    buffers = Saved({id(b): b for module in modules for b in module.buffers()}.values())
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        buffers.restore()


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Run a block in which autocast casts weights anew at each use.

    A graph that is captured with casts of weights from before would keep these casts, even if the
    weights change.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


class Addresses:
    """Addresses of the parameters and buffers of modules, which a graph reads for ever.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Iterable[Module]) -> None:
        parts = {id(part): part for module in modules for part in module.modules()}.values()
        # Looked up by name at every check: tensors may be replaced as well as moved.
        self._places = [
            (tensors, name)
            for part in parts
            for tensors in (part._parameters, part._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        self._known = self._now()

    def _now(self) -> list[int]:
        return [tensors[name].data_ptr() for tensors, name in self._places]  # pyright: ignore[reportOptionalMemberAccess]

    def hold(self) -> bool:
        """Return whether all tensors still have their addresses."""
        return self._now() == self._known


class Aliases:
    """Stand-ins for the parameters of modules, on the same memory, for the time of a capture.

    Autograd ties a parameter to the stream on which it was first used. If that was not the stream
    of the capture, the backward pass would wait for it, which a graph cannot hold. An alias is used
    on the stream of the capture alone.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Iterable[Module]) -> None:
        parts = {id(part): part for module in modules for part in module.modules()}.values()
        self._aliases: dict[int, Parameter] = {}
        self._places: list[tuple[dict[str, Parameter | None], str, Parameter]] = []
        for part in parts:
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    alias = Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
                    self._aliases.setdefault(id(parameter), alias)
                    self._places.append((part._parameters, name, parameter))

    def of(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return the aliases of parameters."""
        return [self._aliases[id(parameter)] for parameter in parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Run a block in which the modules hold the aliases."""
        for held, name, parameter in self._places:
            held[name] = self._aliases[id(parameter)]
        try:
            yield
        finally:
            for held, name, parameter in self._places:
                held[name] = parameter


def changing_buffers(modules: Iterable[Module]) -> list[Tensor]:
    """Return the buffers of the parts that are in training mode, which a run may change."""
    parts = {id(part): part for module in modules for part in module.modules()}.values()
    buffers = [b for part in parts if part.training for b in part._buffers.values()]
    return list({id(b): b for b in buffers if b is not None}.values())


def modes(device: torch.device, modules: Iterable[Module]) -> tuple[object, ...]:
    """Return the global and module modes that a captured function depends on."""
    kind = device.type
    is_autocast = torch.is_autocast_enabled(kind)
    return (
        torch.is_grad_enabled(),
        is_autocast,
        torch.get_autocast_dtype(kind) if is_autocast else None,
        *(module.training for module in modules),
    )
