"""A module whose activations are computed again in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.cuda import is_current_stream_capturing
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from tritonspconv.geometry import ConvGeometry
from tritonspconv.graph_capture import GraphCaptureError
from tritonspconv.kernel_map import KernelMap


class Segment:
    """The ``forward`` of a module under ``torch.utils.checkpoint``, as an attribute of the module.

    Only the arguments of the module are kept until the backward pass. It runs ``forward`` again,
    under the autocast and the random state of the first run.

    Args:
        module: The module.
        released: Geometries of the kernel maps to release after the first run, because no other
            module uses them.
    """

    def __init__(self, module: nn.Module, released: frozenset[ConvGeometry]) -> None:
        self._module = module
        self._released = released
        # True if the last run drew random numbers, and before the first run.
        self._draws = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward``."""
        if not torch.is_grad_enabled():
            return self._run(None, args, kwargs)
        # torch keeps the random state of the devices of the arguments, but does not look
        # into sparse tensors. So a parameter shows torch the device.
        somewhere = next(self._module.parameters(), None)
        is_captured = somewhere is not None and somewhere.is_cuda and is_current_stream_capturing()
        if is_captured and self._draws:
            raise GraphCaptureError(
                f"save_memory: {type(self._module).__name__} draws random numbers inside of a CUDA "
                "graph, which cannot draw the same numbers again in the backward pass. Undo "
                "save_memory by plan.remove(), train without capture, or take dropout out of "
                f"{type(self._module).__name__}."
            )
        before = None if is_captured else _RandomPlaces.now(somewhere)
        maps: list[KernelMap] = []
        seen = MapsSeen(maps.append) if self._released else contextlib.nullcontext()
        result = checkpoint(
            self._run, somewhere, args, kwargs, use_reentrant=False,
            context_fn=lambda: (seen, CopiesOfBuffers(self._module)),
            preserve_rng_state=not is_captured,
        )  # fmt: skip
        if before is not None:
            self._draws = not before.are_those_of(_RandomPlaces.now(somewhere))
        for kernel_map in maps:
            if kernel_map.geometry in self._released:
                kernel_map.release()
        return result

    def _run(self, _: Tensor | None, args: Any, kwargs: Any) -> Any:
        return type(self._module).forward(self._module, *args, **kwargs)


class _RandomPlaces(NamedTuple):
    """Where the random generators of the CPU and of a GPU stand.

    Attributes:
        cpu: The state of the CPU's generator.
        gpu: The offset of the GPU's generator; 0 if there is no GPU.
    """

    cpu: Tensor
    gpu: int

    @classmethod
    def now(cls, somewhere: Tensor | None) -> _RandomPlaces | None:
        """Return the places now, for the GPU of a tensor; None where torch.compile traces."""
        if torch.compiler.is_compiling():
            return None
        offset = 0
        if somewhere is not None and somewhere.is_cuda:
            offset = torch.cuda.default_generators[somewhere.get_device()].get_offset()
        return cls(torch.get_rng_state(), offset)

    def are_those_of(self, other: _RandomPlaces | None) -> bool:
        """Return whether nothing was drawn between the two."""
        return other is not None and self.gpu == other.gpu and torch.equal(self.cpu, other.cpu)


class MapsSeen(TorchFunctionMode):
    """Calls a function with every kernel map that an operation of the engine gets."""

    def __init__(self, note: Callable[[KernelMap], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run ``func``."""
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            if isinstance(value, KernelMap):
                self._note(value)
        return func(*args, **kwargs)


class CopiesOfBuffers:
    """While entered, a module writes to copies of its buffers; may be entered again and again.

    Running statistics then change only once in a step.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._held: list[tuple[dict[str, Tensor | None], str, Tensor]] = []

    def __enter__(self) -> None:
        self._held = [
            (part._buffers, name, buffer)
            for part in self._module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]
        originals = [buffer for _, _, buffer in self._held]
        copies = [torch.empty_like(buffer) for buffer in originals]
        if copies:
            # One launch for all: networks have three buffers a norm.
            torch._foreach_copy_(copies, originals)  # pyright: ignore[reportPrivateImportUsage]
        for (buffers, name, _), made in zip(self._held, copies, strict=True):
            buffers[name] = made

    def __exit__(self, *_: object) -> None:
        for buffers, name, buffer in self._held:
            buffers[name] = buffer
        self._held = []
