"""The one place that launches Triton kernels, and all that depends on Triton's private interface.

``kernel[grid](...)`` costs 15 to 30 us of host time a call: it binds and specialises every argument
anew, asks the driver about every pointer and calls the profilers' hooks even when there are none.
LiDAR networks are bound by the host, so a launch here remembers the compiled kernel for arguments
of one kind and hands it addresses. Where Triton is not a version that this was tested with, or does
not take the arguments, or a hook is set, or the kernel is interpreted, it launches in the ordinary
way.

Triton 3.6 has a C compiler make a launcher for every list of argument types, a second or so of a
network's first result. On NVIDIA, kernels are launched there by the launcher that torch ships for
its own compiled kernels, which takes the host no longer.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# Versions whose compiled kernels take (grid, stream, function, metadata, hooks, arguments).
_KNOWN_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")
_INT32 = 2**31
hands_values = triton.__version__.startswith(_KNOWN_VERSIONS)

# Launches kernels that Triton compiled without a launcher made for them; None where not needed.
torch_launcher: Any = (
    getattr(torch._C, "_StaticCudaLauncher", None)
    if triton.__version__.startswith("3.6.") and torch.version.hip is None
    else None
)
# What it calls the types of numbers.
_TORCH_TYPES = {"i32": "i", "i64": "l", "fp32": "f", "fp64": "d"}

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

    __slots__ = ("_is_plain", "_options", "compiled", "kernel", "meta", "takes_values")

    def __init__(self, kernel: Any, meta: dict[str, Any]) -> None:
        self.kernel, self.meta = kernel, meta
        # Checks for overflow are for Triton's debug mode: without it they are traced all the same,
        # then dropped, and in it they would trap where `_index.popcount` overflows on purpose.
        self._options = {"enable_fp_fusion": True, "sanitize_overflow": False, **meta}
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
        return self.kernel[grid](*args, **self._options)

    def _launch(self, grid: tuple[int, ...], device_index: int, args: tuple[Any, ...]) -> None:
        if not self.takes_values or _has_hooks():
            self._launch_by_triton(grid, args)
            return
        for index, take, run in self.compiled:
            values = take(*args) if index == device_index else None
            if values is not None:
                self._run(run, grid, device_index, args, values)
                return
        if torch_launcher is None or not self._launch_by_torch(grid, device_index, args):
            compiled = self._launch_by_triton(grid, args)
            constants = tuple(self.meta[name] for name in self.kernel.arg_names[len(args) :])
            take, run = _taker(args, self._is_plain), _runner(compiled, constants)
            self.compiled.append(CompiledKernel(device_index, take, run))

    def _launch_by_torch(
        self, grid: tuple[int, ...], device_index: int, args: tuple[Any, ...]
    ) -> bool:
        """Compile and run without Triton's launcher; return whether the kernel allows it."""
        compiled = self.kernel.warmup(*args, grid=grid, **self._options)
        if hasattr(compiled, "result"):  # where the user has Triton compile in other threads
            compiled = compiled.result()
        run = _torch_runner(compiled, device_index)
        if run is None:
            return False
        take = _taker(args, self._is_plain, compiled.src.signature.values())
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


def _taker(
    args: tuple[Any, ...], is_plain: tuple[bool, ...], types: Iterable[Any] | None = None
) -> Take:
    """Return ``take`` of :class:`CompiledKernel` for arguments of the kind of these.

    Pointers become addresses. Small networks spend much of their time here, and a loop over the
    arguments takes three times as long as code written for them, which this writes.

    Args:
        args: The arguments.
        is_plain: Which of them Triton does not specialise on.
        types: The arguments' types, for the values that :func:`_torch_runner` takes: without
            constants, tuples opened. ``None`` for those that Triton's launcher takes.
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
    if types is not None:
        values = [name for name, _ in _leaves(values, types)] + ["None", "None"]  # no scratch
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


def _torch_runner(compiled: Any, device_index: int) -> Run | None:
    """Return what has torch run a kernel that was compiled only; None where it needs Triton.

    Loads the kernel as Triton 3.6 does. Kernels that the device lacks the resources for are left to
    Triton and its error.
    """
    found = compiled.metadata
    needs_triton = found.launch_cooperative_grid or found.launch_pdl or found.num_ctas != 1
    scratch = found.global_scratch_size or found.profile_scratch_size
    utils = triton.runtime.driver.active.utils
    most_shared = utils.get_device_properties(device_index)["max_shared_mem"]
    if needs_triton or scratch or found.shared > most_shared or _has_load_hooks():
        return None
    types = [kind for _, kind in _leaves(compiled.src.signature, compiled.src.signature.values())]
    if not all(kind[0] == "*" or kind in _TORCH_TYPES for kind in types):
        return None
    letters = "".join(_TORCH_TYPES.get(kind, "O") for kind in types) + "OO"  # and no scratch, twice
    warps, shared = found.num_warps, found.shared
    _, function, _, _, most_threads = utils.load_binary(
        compiled.name, compiled.kernel, shared, device_index
    )
    if warps * found.target.warp_size > most_threads:
        return None
    launch = torch_launcher._launch_kernel

    def run_by_torch(grid: tuple[int, ...], stream: int, values: tuple[Any, ...]) -> None:
        x, y, z = (*grid, 1, 1)[:3]
        launch(function, x, y, z, warps, shared, letters, values, stream)

    return run_by_torch


def _leaves(names: Iterable[str], types: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Yield arguments and their types, tuples opened and constants left out."""
    for name, kind in zip(names, types, strict=False):
        if type(kind) is tuple:
            yield from _leaves([f"{name}[{place}]" for place in range(len(kind))], kind)
        elif kind != "constexpr":
            yield name, kind


def _has_load_hooks() -> bool:
    runtime = triton.knobs.runtime
    return bool(runtime.kernel_load_start_hook.calls or runtime.kernel_load_end_hook.calls)


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
