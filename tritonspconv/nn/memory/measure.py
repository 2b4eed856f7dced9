"""Measurement of the tensors that each call of a module saves for the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from tritonspconv.kernel_map import KernelMap
from tritonspconv.nn.fusable import LayerFamily
from tritonspconv.nn.memory.segment import CopiesOfBuffers, MapsSeen


class Call(NamedTuple):
    """One call of a module.

    Attributes:
        name: The module's.
        start, end: The tensors that the call saves: ``Measured.saved[start:end]``.
        inputs: Storages of its arguments.
    """

    name: str
    start: int
    end: int
    inputs: tuple[int, ...]


class MapUse(NamedTuple):
    """One use of a kernel map, before ``Measured.saved[place]``."""

    kernel_map: KernelMap
    place: int


@dataclass
class Measured:
    """What a forward pass saves.

    Attributes:
        saved: Storages in the order in which the pass saves them, with repetitions.
        num_bytes: Bytes of each storage.
        calls: Calls of the watched modules, in the order in which they end.
        map_uses: The kernel maps that the pass uses, in order.
        changes: Reasons why a module must not run twice, by its name.
    """

    saved: list[int] = field(default_factory=list)
    num_bytes: dict[int, int] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    map_uses: list[MapUse] = field(default_factory=list)
    changes: dict[str, str] = field(default_factory=dict)


def measure(
    model: nn.Module,
    watched: Iterable[str],
    families: Iterable[LayerFamily],
    args: tuple[Any, ...],
) -> Measured:
    """Run ``model`` once and note what it saves for a backward pass, which will not come.

    Saved tensors are dropped at once, so the run takes the memory of inference. Buffers and random
    states are the same afterwards.

    Args:
        model: The network.
        watched: Names of modules whose calls are noted.
        families: The families of its layers.
        args: Its arguments.
    """
    pass_ = _Pass(model, tuple(families))
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    devices = {x.device for x in model.parameters() if x.device.type == "cuda"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(CopiesOfBuffers(model))
        for name in watched:
            stack.enter_context(pass_.watching(name, model.get_submodule(name)))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pass_.save, _no_backward))
        stack.enter_context(MapsSeen(pass_.note_map))
        model(*args)
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if before[name].get(attribute) is not value:
                pass_.measured.changes[name] = f"its forward sets the attribute {attribute!r}"
    return pass_.measured


class _Pass:
    """One forward pass that is measured."""

    def __init__(self, model: nn.Module, families: tuple[LayerFamily, ...]) -> None:
        self.measured = Measured()
        self._families = families
        # Weak references keep the numbers of freed storages from being given to new ones.
        self._references: dict[int, StorageWeakRef] = {}
        self._held = {self._number(x) for x in (*model.parameters(), *model.buffers())}

    def save(self, tensor: Tensor) -> None:
        """Note a tensor that is saved for the backward pass."""
        number = self._number(tensor)
        if number not in self._held:
            self.measured.saved.append(number)

    def note_map(self, kernel_map: KernelMap) -> None:
        """Note a use of a kernel map."""
        self.measured.map_uses.append(MapUse(kernel_map, len(self.measured.saved)))

    @contextlib.contextmanager
    def watching(self, name: str, module: nn.Module) -> Iterator[None]:
        """Note the calls of a module."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            inputs = self._features((args, kwargs))
            versions = [_version(x) for x in inputs]
            start = len(self.measured.saved)
            result = type(module).forward(module, *args, **kwargs)
            after = self._features((args, kwargs))
            if [*map(id, inputs)] != [*map(id, after)] or versions != [*map(_version, after)]:
                self.measured.changes[name] = "its forward changes its arguments"
            numbers = tuple(self._number(x) for x in inputs)
            self.measured.calls.append(Call(name, start, len(self.measured.saved), numbers))
            return result

        module.forward = forward
        try:
            yield
        finally:
            del module.forward

    def _features(self, arguments: Any) -> list[Tensor]:
        """Return all tensors among arguments, and the features of all sparse tensors."""
        found = []
        for value in pytree.tree_leaves(arguments):
            if isinstance(value, Tensor):
                found.append(value)
            for family in self._families:
                if isinstance(value, family.tensor):
                    found.append(family.features(value))
        return found

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        self._references.setdefault(reference.cdata, reference)
        self.measured.num_bytes[reference.cdata] = storage.nbytes()
        return reference.cdata


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _no_backward(_: None) -> Tensor:
    raise RuntimeError("save_memory: the pass that is measured has no backward pass.")
