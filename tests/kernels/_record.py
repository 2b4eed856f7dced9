"""Record the launches of Triton kernels without a GPU, and compile them for any target.

    with record_launches() as launches:
        launcher(cpu_tensor, ...)
    compiled = compile_for(launches[0], GPUTarget("hip", "gfx942", 64))

Triton's own binder for the target gives types, constants and the specialisation of arguments: 1
becomes a constant, and multiples of 16 and aligned pointers are marked. The recorder therefore
compiles the same code as a launch with these arguments. Tested with Triton 3.6 and 3.9.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, create_function_from_signature

# Launches are distinguished by their types for this target.
REFERENCE_TARGET = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Launch:
    """One call of a kernel.

    Attributes:
        kernel: The jitted function, without autotuner or heuristics.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call, compile options such as ``num_warps`` included.
        grid: The grid, evaluated.
        signature: Type of each argument by name, such as ``*fp16``, ``i32``, ``constexpr``.
        constexprs: Value of each constexpr by name, arguments specialised to 1 included.
    """

    kernel: JITFunction
    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
    grid: tuple[int, ...]
    signature: dict[str, str]
    constexprs: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the kernel's Python function."""
        return self.kernel.__name__


@dataclass(frozen=True)
class Resources:
    """Resources of the device that a compiled kernel takes.

    Attributes:
        shared_bytes: Shared memory (AMD: LDS) of a block, in bytes.
        spill: Registers' overflow; bytes of stack on NVIDIA, count of registers on AMD.
        registers: Registers of a thread: on AMD, vector registers.
    """

    shared_bytes: int
    spill: int
    registers: int


@contextmanager
def record_launches(configs: int | None = 1) -> Iterator[list[Launch]]:
    """Record kernel launches instead of running them; the context appends them to the list.

    Launches that compile to the same binary are recorded once. Outputs keep their values from
    allocation, so code that reads a result back must not depend on its value.

    Args:
        configs: Number of an autotuner's configs that are recorded for each launch, in their order
            after pruning. ``None`` records all.
    """
    launches: list[Launch] = []
    seen: set[str] = set()

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        source, options, bound = _bind(kernel, args, kwargs, REFERENCE_TARGET)
        key = f"{source.hash()} {options}"
        grid = grid(bound) if callable(grid) else tuple(grid)
        if key in seen:
            return
        seen.add(key)
        names = kernel.arg_names
        constexprs = {names[path[0]]: value for path, value in source.constants.items()}
        launches.append(Launch(kernel, args, kwargs, grid, source.signature, constexprs))

    def run_autotuned(tuner: Autotuner, *args: Any, **kwargs: Any) -> None:
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        for config in tuner.prune_configs(kwargs)[:configs]:
            tuner.fn.run(*args, **kwargs, **config.all_kwargs())

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(Autotuner, "run", run_autotuned),
    ):
        yield launches


def compile_for(launch: Launch, target: GPUTarget) -> CompiledKernel:
    """Compile a recorded launch down to the target's binary."""
    source, options, _ = _bind(launch.kernel, launch.args, launch.kwargs, target)
    return triton.compile(source, target=target, options=options)


def resources(compiled: CompiledKernel) -> Resources:
    """Read the resources of a binary."""
    if compiled.metadata.target.backend == "cuda":
        usage = _cubin_usage(compiled.asm["cubin"])
        # The only user of the stack in a Triton kernel is the spilling of registers.
        spill = sum(map(int, re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)))
        counts = re.findall(r"\bREG:(\d+)", usage)
    else:
        code = compiled.asm["amdgcn"]
        spill = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", code)))
        counts = re.findall(r"\.vgpr_count:\s*(\d+)", code)
    return Resources(compiled.metadata.shared, spill, max(map(int, counts)))


def _bind(
    kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], target: GPUTarget
) -> tuple[ASTSource, dict[str, Any], dict[str, Any]]:
    # These are the steps of JITFunction.run up to the compilation, for the given target.
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    return ASTSource(kernel, signature, constexprs, attrs), options.__dict__, bound


def _cubin_usage(cubin: bytes) -> str:
    tool = Path(triton.backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), "-res-usage", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
