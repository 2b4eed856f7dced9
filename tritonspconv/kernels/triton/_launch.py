"""The one place that launches Triton kernels, and all that depends on Triton's private interface.

``kernel[grid](...)`` costs 15 to 30 us of host time a call: it binds and specialises every argument
anew, asks the driver about every pointer and calls the profilers' hooks even when there are none.
LiDAR networks are bound by the host, so a launch here remembers the compiled kernel for arguments
of one kind and hands it addresses. Where Triton is not a version that this was tested with, or does
not take the arguments, or a hook is set, or the kernel is interpreted, it launches in the ordinary
way.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

# Versions whose compiled kernels take (grid, stream, function, metadata, hooks, arguments).
_KNOWN_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")
_INT32 = 2**31
hands_values = triton.__version__.startswith(_KNOWN_VERSIONS)

_bound: dict[tuple[Any, ...], BoundKernel] = {}


class BoundKernel:
    """A jitted kernel with its constexpr arguments and options; made by :func:`bind`.

    Attributes:
        kernel: The jitted function.
        meta: Its constexpr arguments and Triton's options.
        compiled: What was compiled so far, by device and kind of run-time arguments. Filled once a
            kind; nothing is tuned.
        takes_values: Whether compiled kernels took what they were handed so far.
    """

    __slots__ = ("_is_plain", "compiled", "kernel", "meta", "takes_values")

    def __init__(self, kernel: Any, meta: dict[str, Any]) -> None:
        self.kernel, self.meta = kernel, meta
        self.compiled: dict[tuple[Any, ...], Callable[..., None]] = {}
        self.takes_values = True
        # An interpreted kernel has no such list, and needs none.
        unspecialized = getattr(kernel, "do_not_specialize", ())
        self._is_plain = tuple(name in unspecialized for name in kernel.arg_names)

    def __call__(self, grid: tuple[int, ...], device: torch.device, *args: Any) -> None:
        """Run the kernel.

        Args:
            grid: Programs per axis.
            device: Where the tensors are; made current for the launch when it is not.
            args: The kernel's run-time arguments, in order.
        """
        if device.type != "cuda":
            self._launch_by_triton(grid, args)
        elif device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(grid, device, args)
        else:
            self._launch(grid, device, args)

    def _launch_by_triton(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> Any:
        return self.kernel[grid](*args, enable_fp_fusion=True, **self.meta)

    def _launch(self, grid: tuple[int, ...], device: torch.device, args: tuple[Any, ...]) -> None:
        if not (hands_values and self.takes_values) or _has_hooks():
            self._launch_by_triton(grid, args)
            return
        kind: list[Any] = [device.index]
        values: list[Any] = []
        # Small networks spend much of their time here: plain tests, the frequent ones first.
        for arg, plain in zip(args, self._is_plain, strict=False):
            if isinstance(arg, Tensor):
                address = arg.data_ptr()
                values.append(address)
                kind.append(arg.dtype)
                if address % 16:
                    kind.append("unaligned")
            else:
                values.append(arg)
                if arg is None:
                    kind.append(None)
                elif plain and type(arg) is int:
                    kind.append(-_INT32 <= arg < _INT32)
                else:
                    kind.append(_kind(arg))
        key = tuple(kind)
        run = self.compiled.get(key)
        if run is None:
            compiled = self._launch_by_triton(grid, args)
            constants = tuple(self.meta[name] for name in self.kernel.arg_names[len(args) :])
            self.compiled[key] = _runner(compiled, constants)
            return
        try:
            run(grid, torch._C._cuda_getCurrentRawStream(device.index), values)
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
    """Return the kernel with its constexpr arguments and options bound; the same one every time."""
    # By identity: a jitted function hashes its source.
    key = (id(kernel), tuple(meta), tuple(meta.values()))
    found = _bound.get(key)
    if found is None:
        found = _bound[key] = BoundKernel(kernel, meta)
    return found


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any
) -> None:
    """Run a jitted kernel on ``device``: :func:`bind` and call.

    Args:
        kernel: The jitted function.
        grid: Programs per axis.
        device: Where the tensors are.
        args: The kernel's run-time arguments, in order.
        meta: Its constexpr arguments and Triton's options.
    """
    bind(kernel, **meta)(grid, device, *args)


def compiled_kernels() -> list[Any]:
    """Return the jitted function of every kernel compiled so far, once per kind of arguments."""
    return [bound.kernel for bound in _bound.values() for _ in bound.compiled]


def _runner(compiled: Any, constants: tuple[Any, ...]) -> Callable[..., None]:
    """Return what runs a compiled kernel for a grid, a stream and the values of its arguments."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    hooks = None, None, None
    if not _is_bare(run):

        def run_by_launcher(grid: tuple[int, ...], stream: int, values: list[Any]) -> None:
            x, y, z = (*grid, 1, 1)[:3]
            run(x, y, z, stream, function, metadata, *hooks, *values, *constants)

        return run_by_launcher

    # What the launcher itself does when there is no scratch memory to allocate.
    launch, scratch = run.launch, (None, None)
    options = run.launch_cooperative_grid, run.launch_pdl
    if hasattr(run, "kernel_signature"):  # from Triton 3.7 on
        between = (*options, metadata, *hooks, *scratch, run.arg_annotations, run.kernel_signature)

        def run_signed(grid: tuple[int, ...], stream: int, values: list[Any]) -> None:
            x, y, z = (*grid, 1, 1)[:3]
            launch(x, y, z, stream, function, *between, (*values, *constants))

        return run_signed

    before = *options, *scratch, metadata, *hooks

    def run_directly(grid: tuple[int, ...], stream: int, values: list[Any]) -> None:
        x, y, z = (*grid, 1, 1)[:3]
        launch(x, y, z, stream, function, *before, *values, *constants)

    return run_directly


def _is_bare(run: Any) -> bool:
    """Return whether a launcher is NVIDIA's and adds nothing to what it is given."""
    return type(run).__name__ == "CudaLauncher" and not (
        run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False)
    )


def _has_hooks() -> bool:
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or runtime.debug)


@functools.lru_cache(maxsize=4096, typed=True)
def _kind(arg: Any) -> Any:
    """Return what Triton specialises a number or tuple on: 1, multiples of 16, 32 bits or more.

    It does so inside tuples too, whether or not the tuple is among ``do_not_specialize``.
    """
    if type(arg) is tuple:
        return tuple(map(_kind, arg))
    if type(arg) is int:
        return 1 if arg == 1 else (arg % 16 == 0, -_INT32 <= arg < _INT32)
    return arg
