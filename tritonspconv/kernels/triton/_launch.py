"""Binding and launching: the one place that launches Triton kernels.

``kernel[grid](...)`` costs 15 to 30 us of host time a call: it binds and specialises every argument
anew, asks the driver about every pointer and calls the profilers' hooks even when there are none.
LiDAR networks are bound by the host, so a launch here remembers the compiled kernel for arguments
of one kind and hands it addresses. A launch takes Triton's ordinary way if this file was not tested
with the version of Triton, if the kernel does not take the arguments, if a hook is set, or if the
kernel is interpreted.

Related files: ``_arguments.py`` (the values on which Triton specialises), ``_versions.py``
(Triton's private interface, version by version), ``_torch_launcher.py`` (for Triton 3.6 only).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton

from tritonspconv.kernels.triton import _torch_launcher, _versions
from tritonspconv.kernels.triton._arguments import Take, taker
from tritonspconv.kernels.triton._versions import Run, has_hooks

# Takes a bound kernel and its run-time arguments; returns True to leave the launch out.
Watcher = Callable[["BoundKernel", tuple[Any, ...]], bool]

# Sees the launches of one thread; see :func:`watched`.
_watcher: ContextVar[Watcher | None] = ContextVar("_watcher", default=None)


class CompiledKernel(NamedTuple):
    """A kernel compiled for one device and one kind of run-time arguments.

    Attributes:
        device_index: The CUDA device.
        take: Turns arguments into the kernel's values; returns None for arguments of another kind.
        run: Launches the kernel for a grid, a stream and values.
    """

    device_index: int
    take: Take
    run: Run


class BoundKernel:
    """A jitted kernel with its constexpr arguments and options; made by :func:`bind`.

    Attributes:
        kernel: The jitted function.
        meta: Its constexpr arguments and Triton's options.
        options: Options for Triton, from ``meta`` and our own.
        compiled: The kernels compiled so far, one for each kind of arguments; nothing is tuned.
        takes_values: True while compiled kernels have taken all values.
    """

    __slots__ = ("_is_plain", "compiled", "kernel", "meta", "options", "takes_values")

    def __init__(self, kernel: Any, meta: dict[str, Any]) -> None:
        self.kernel, self.meta = kernel, meta
        # Checks for overflow belong to Triton's debug mode. Without that mode Triton traces them
        # and drops them, which takes time; with it they would stop `_bits.popcount`, which
        # overflows on purpose.
        self.options = {"enable_fp_fusion": True, "sanitize_overflow": False, **meta}
        self.compiled: list[CompiledKernel] = []
        # An interpreted kernel takes tensors.
        self.takes_values = _versions.hands_values and isinstance(kernel, triton.JITFunction)
        # An interpreted kernel has no `do_not_specialize`, and is not specialised.
        unspecialized = getattr(kernel, "do_not_specialize", ())
        self._is_plain = tuple(name in unspecialized for name in kernel.arg_names)

    def __call__(self, grid: tuple[int, ...], device: torch.device, *args: Any) -> None:
        """Run the kernel.

        Args:
            grid: Programs per axis.
            device: Device of the tensors; it is made current for the launch.
            args: The kernel's run-time arguments, in order.
        """
        watcher = _watcher.get()
        if watcher is not None and watcher(self, args):
            return
        index = device.index
        if index is None:
            self._launch_by_triton(grid, args)
        elif index != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self._launch(grid, index, args)
        else:
            self._launch(grid, index, args)

    def _launch_by_triton(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> Any:
        return self.kernel[grid](*args, **self.options)

    def _launch(self, grid: tuple[int, ...], device_index: int, args: tuple[Any, ...]) -> None:
        if not self.takes_values or has_hooks():
            self._launch_by_triton(grid, args)
            return
        for index, take, run in self.compiled:
            values = take(*args) if index == device_index else None
            if values is not None:
                self._run(run, grid, device_index, args, values)
                return
        if not _torch_launcher.is_used() or not self._launch_by_torch(grid, device_index, args):
            compiled = self._launch_by_triton(grid, args)
            constants = tuple(self.meta[name] for name in self.kernel.arg_names[len(args) :])
            take, run = taker(args, self._is_plain), _versions.runner(compiled, constants)
            self.compiled.append(CompiledKernel(device_index, take, run))

    def _launch_by_torch(
        self, grid: tuple[int, ...], device_index: int, args: tuple[Any, ...]
    ) -> bool:
        """Compile and run without Triton's launcher; return whether the kernel allows it."""
        compiled = self.kernel.warmup(*args, grid=grid, **self.options)
        if hasattr(compiled, "result"):  # Triton compiles in other threads, if the user asks
            compiled = compiled.result()
        run = _torch_launcher.runner(compiled, device_index)
        if run is None:
            return False
        take = taker(args, self._is_plain, compiled.src.signature.values())
        self.compiled.append(CompiledKernel(device_index, take, run))
        values = take(*args)
        assert values is not None
        self._run(run, grid, device_index, args, values)
        return True

    def _run(
        self,
        run: Run,
        grid: tuple[int, ...],
        device_index: int,
        args: tuple[Any, ...],
        values: tuple[Any, ...],
    ) -> None:
        try:
            run(grid, torch._C._cuda_getCurrentRawStream(device_index), values)
        except TypeError as error:
            warnings.warn(
                f"Triton {triton.__version__} does not take the arguments of "
                f"{self.kernel.__name__} as expected ({error}); it is launched in Triton's slower "
                "way. Please report this.",
                RuntimeWarning,
                stacklevel=2,
            )
            self.takes_values = False
            self._launch_by_triton(grid, args)


def bind(kernel: Any, **meta: Any) -> BoundKernel:
    """Bind constexpr arguments and options to a kernel; equal arguments return the same object.

    The jitted function keeps its bound kernels, as it keeps what Triton compiled.
    """
    key = (tuple(meta), tuple(meta.values()))
    try:
        found = kernel.bound_kernels.get(key)
    except AttributeError:
        found, kernel.bound_kernels = None, {}
    if found is None:
        found = kernel.bound_kernels[key] = BoundKernel(kernel, meta)
    return found


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any
) -> None:
    """Run a jitted kernel on ``device``: :func:`bind` and call.

    Args:
        kernel: The jitted function.
        grid: Programs per axis.
        device: Device of the tensors.
        args: The kernel's run-time arguments, in order.
        meta: Its constexpr arguments and Triton's options.
    """
    bind(kernel, **meta)(grid, device, *args)


@contextmanager
def watched(watcher: Watcher) -> Generator[None]:
    """Show every launch of this thread to ``watcher``; those for which it returns True do not run.

    Backward passes launch in this thread too, because autograd uses no other threads in the block.
    Launches of all other threads run, and ``watcher`` does not see them.
    """
    token = _watcher.set(watcher)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _watcher.reset(token)


def compiled_kernels() -> list[Any]:
    """Return the jitted function of every kernel compiled so far, once per kind of arguments."""
    # A module may have imported a function of another one.
    functions = {
        id(value): value
        for name, module in list(sys.modules.items())
        if name.startswith(f"{__package__}.")
        for value in list(vars(module).values())
        if isinstance(value, triton.JITFunction)
    }
    return [
        function
        for function in functions.values()
        for bound in vars(function).get("bound_kernels", {}).values()
        for _ in bound.compiled
    ]
