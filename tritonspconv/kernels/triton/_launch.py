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
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# Versions whose compiled kernels take (grid, stream, function, metadata, hooks, arguments).
_KNOWN_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")
_INT32 = 2**31
hands_values = triton.__version__.startswith(_KNOWN_VERSIONS)

_bound: dict[tuple[Any, ...], BoundKernel] = {}

Take = Callable[..., tuple[Any, ...] | None]
Run = Callable[[tuple[int, ...], int, tuple[Any, ...]], None]


class CompiledKernel(NamedTuple):
    """A kernel compiled for one device and one kind of run-time arguments.

    Attributes:
        device_index: The CUDA device.
        take: From arguments to the values that the kernel is handed; None where they are of another
            kind.
        run: Launches it for a grid, a stream and values.
    """

    device_index: int
    take: Take
    run: Run


class BoundKernel:
    """A jitted kernel with its constexpr arguments and options; made by :func:`bind`.

    Attributes:
        kernel: The jitted function.
        meta: Its constexpr arguments and Triton's options.
        compiled: What was compiled so far. One for each kind of arguments; nothing is tuned.
        takes_values: Whether compiled kernels took what they were handed so far.
    """

    __slots__ = ("_is_plain", "compiled", "kernel", "meta", "takes_values")

    def __init__(self, kernel: Any, meta: dict[str, Any]) -> None:
        self.kernel, self.meta = kernel, meta
        self.compiled: list[CompiledKernel] = []
        # Not if it is interpreted.
        self.takes_values = hands_values and isinstance(kernel, triton.JITFunction)
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
        index = device.index
        if index is None:
            self._launch_by_triton(grid, args)
        elif index != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self._launch(grid, index, args)
        else:
            self._launch(grid, index, args)

    def _launch_by_triton(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> Any:
        # Checks for overflow are for Triton's debug mode: without it they are traced all the same,
        # then dropped, and in it they would trap where `_index.popcount` overflows on purpose.
        return self.kernel[grid](*args, enable_fp_fusion=True, sanitize_overflow=False, **self.meta)

    def _launch(self, grid: tuple[int, ...], device_index: int, args: tuple[Any, ...]) -> None:
        if not self.takes_values or _has_hooks():
            self._launch_by_triton(grid, args)
            return
        for index, take, run in self.compiled:
            values = take(*args) if index == device_index else None
            if values is not None:
                self._run(run, grid, device_index, args, values)
                return
        compiled = self._launch_by_triton(grid, args)
        constants = tuple(self.meta[name] for name in self.kernel.arg_names[len(args) :])
        take, run = _taker(args, self._is_plain), _runner(compiled, constants)
        self.compiled.append(CompiledKernel(device_index, take, run))

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


def _taker(args: tuple[Any, ...], is_plain: tuple[bool, ...]) -> Take:
    """Return ``take`` of :class:`CompiledKernel` for arguments of the kind of these.

    Pointers become addresses. Small networks spend much of their time here, and a loop over the
    arguments takes three times as long as code written for them, which this writes.
    """
    known: dict[str, Any] = {"kind": _kind}
    addresses, values, tests, aligned = [], [], [], []
    for place, (arg, plain) in enumerate(zip(args, is_plain, strict=False)):
        name = f"a{place}"
        value = name
        if isinstance(arg, Tensor):
            value = f"p{place}"
            addresses.append(f"{value} = {name}.data_ptr()")
            known[f"t{place}"] = arg.dtype
            tests.append(f"{name}.dtype is t{place}")
            if arg.data_ptr() % 16:
                tests.append(f"{value} % 16")
            else:
                aligned.append(value)
        elif arg is None:
            tests.append(f"{name} is None")
        elif type(arg) is float:  # Triton does not specialise on its value
            tests.append(f"type({name}) is float")
        elif plain and type(arg) is int:
            small = f"{-_INT32} <= {name} < {_INT32}"
            tests.append(small if -_INT32 <= arg < _INT32 else f"not {small}")
        else:
            known[f"k{place}"] = _kind(arg)
            tests.append(f"kind({name}) == k{place}")
        values.append(value)
    if aligned:
        tests.append(f"({' | '.join(aligned)}) % 16 == 0")
    names = ", ".join(f"a{place}" for place in range(len(args)))
    source = "\n".join([
        f"def take({names}):",
        "    try:",
        *(f"        {line}" for line in addresses),
        f"        return ({', '.join(values)},) if {' and '.join(tests)} else None",
        "    except AttributeError:  # no tensor where one was",
        "        return None",
    ])  # fmt: skip
    exec(source, known)
    take: Take = known["take"]
    return take


def _runner(compiled: Any, constants: tuple[Any, ...]) -> Run:
    """Return what runs a compiled kernel for a grid, a stream and the values of its arguments."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    hooks = None, None, None
    if not _is_bare(run):

        def run_by_launcher(grid: tuple[int, ...], stream: int, values: tuple[Any, ...]) -> None:
            x, y, z = (*grid, 1, 1)[:3]
            run(x, y, z, stream, function, metadata, *hooks, *values, *constants)

        return run_by_launcher

    # What the launcher itself does when there is no scratch memory to allocate.
    launch, scratch = run.launch, (None, None)
    options = run.launch_cooperative_grid, run.launch_pdl
    if hasattr(run, "kernel_signature"):  # from Triton 3.7 on
        between = (*options, metadata, *hooks, *scratch, run.arg_annotations, run.kernel_signature)

        def run_signed(grid: tuple[int, ...], stream: int, values: tuple[Any, ...]) -> None:
            x, y, z = (*grid, 1, 1)[:3]
            launch(x, y, z, stream, function, *between, (*values, *constants))

        return run_signed

    before = *options, *scratch, metadata, *hooks

    def run_directly(grid: tuple[int, ...], stream: int, values: tuple[Any, ...]) -> None:
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
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


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
