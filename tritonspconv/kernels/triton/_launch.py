"""The one place that launches Triton kernels, and all that depends on Triton's private interface.

``kernel[grid](...)`` costs 15 to 30 us of host time a call: it binds and specialises every argument
anew and calls the profilers' hooks even when there are none. LiDAR networks are bound by the host,
so a launch here remembers the compiled kernel for arguments of one kind and runs it directly. Where
Triton is not a version that this was tested with, or a hook is set, or the kernel is interpreted,
it launches in the ordinary way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

# Versions whose compiled kernels take (grid, stream, function, metadata, hooks, arguments).
_KNOWN_VERSIONS = ("3.6.",)
_is_known_version = triton.__version__.startswith(_KNOWN_VERSIONS)

# Compiled kernels by kernel, device and kind of arguments. Filled once a kind; never tuned.
_compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_unspecialized: dict[int, tuple[bool, ...]] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Tensor | Any, **meta: Any
) -> None:
    """Run a jitted kernel on ``device``.

    Args:
        kernel: The jitted function.
        grid: Programs per axis.
        device: Where the tensors are; made current for the launch when it is not.
        args: The kernel's run-time arguments, in order.
        meta: Its constexpr arguments and Triton's options.
    """
    if device.type != "cuda":
        kernel[grid](*args, enable_fp_fusion=True, **meta)
    elif device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch_on_current(kernel, grid, device, args, meta)
    else:
        _launch_on_current(kernel, grid, device, args, meta)


def _launch_on_current(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    args: tuple[Any, ...],
    meta: dict[str, Any],
) -> None:
    if not _is_known_version or _has_hooks():
        kernel[grid](*args, enable_fp_fusion=True, **meta)
        return
    # By identity: a jitted function hashes its source.
    is_plain = _unspecialized.get(id(kernel)) or _find_unspecialized(kernel)
    kind = [
        _width(arg) if plain else _kind(arg) for plain, arg in zip(is_plain, args, strict=False)
    ]
    key = (id(kernel), device.index, *kind, *meta.values())
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, enable_fp_fusion=True, **meta)
        constants = tuple(meta[name] for name in kernel.arg_names[len(args) :])
        _compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, constants
        return
    run, function, packed_metadata, constants = found
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    axes = (*grid, 1, 1)
    run(
        axes[0], axes[1], axes[2], stream, function, packed_metadata,
        None, None, None, *args, *constants,
    )  # fmt: skip


def _find_unspecialized(kernel: Any) -> tuple[bool, ...]:
    """Return which arguments Triton does not specialise on their values."""
    found = tuple(name in kernel.do_not_specialize for name in kernel.arg_names)
    return _unspecialized.setdefault(id(kernel), found)


def _has_hooks() -> bool:
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or runtime.debug)


def _kind(arg: Any) -> Any:
    """Return what Triton specialises an argument on: dtype and alignment, 1, multiples of 16.

    It does so inside tuples too, whether or not the tuple is among ``do_not_specialize``.
    """
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if type(arg) is tuple:
        return tuple(map(_kind, arg))
    if type(arg) is int:
        return 1 if arg == 1 else (arg % 16 == 0, _width(arg))
    return arg


def _width(arg: Any) -> Any:
    """Return the type that Triton gives an unspecialised integer."""
    return "i32" if -(2**31) <= arg < 2**31 else "i64"
