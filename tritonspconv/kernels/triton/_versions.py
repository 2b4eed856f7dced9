"""Triton's versions: the parts of its private interface that a direct launch needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

# Versions whose compiled kernels take (grid, stream, function, metadata, hooks, arguments).
_KNOWN_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")
hands_values = triton.__version__.startswith(_KNOWN_VERSIONS)

Run = Callable[[tuple[int, ...], int, tuple[Any, ...]], None]


def runner(compiled: Any, constants: tuple[Any, ...]) -> Run:
    """Return a function that runs a compiled kernel for a grid, a stream and argument values."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    hooks = None, None, None
    if not _is_bare(run):

        def run_by_launcher(grid: tuple[int, ...], stream: int, values: tuple[Any, ...]) -> None:
            x, y, z = (*grid, 1, 1)[:3]
            run(x, y, z, stream, function, metadata, *hooks, *values, *constants)

        return run_by_launcher

    # Without scratch memory, a call of the launcher does nothing else.
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
    """Return whether a launcher is NVIDIA's and passes its arguments on as they are."""
    return type(run).__name__ == "CudaLauncher" and not (
        run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False)
    )


def has_hooks() -> bool:
    """Return whether a profiler wants to know of launches."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def has_load_hooks() -> bool:
    """Return whether a profiler wants to know of kernels that are loaded."""
    runtime = triton.knobs.runtime
    return bool(runtime.kernel_load_start_hook.calls or runtime.kernel_load_end_hook.calls)
