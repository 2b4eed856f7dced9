"""Launches under Triton 3.6 on NVIDIA, by the launcher that torch ships for its own kernels.

Triton 3.6 has a C compiler make a launcher for every list of argument types, a second or so of a
network's first result. Torch's launcher takes any list, and the host no longer. Triton 3.7 has such
a launcher of its own: when 3.6 is no longer supported, this module can go, together with
``BoundKernel._launch_by_torch``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from tritonspconv.kernels.triton._arguments import leaves
from tritonspconv.kernels.triton._versions import Run, has_load_hooks

# Torch's launcher; None for versions of Triton that do not need it.
torch_launcher: Any = (
    getattr(torch._C, "_StaticCudaLauncher", None)
    if triton.__version__.startswith("3.6.") and torch.version.hip is None
    else None
)
# Torch's letters for the types of numbers.
_TORCH_TYPES = {"i32": "i", "i64": "l", "fp32": "f", "fp64": "d"}


def is_used() -> bool:
    """Return whether kernels are launched by torch here."""
    return torch_launcher is not None


def runner(compiled: Any, device_index: int) -> Run | None:
    """Return a function that runs a compiled kernel through torch; None if only Triton can run it.

    The kernel is loaded as Triton 3.6 loads it. A kernel that needs more resources than the device
    has is left to Triton, which raises its error.
    """
    found = compiled.metadata
    needs_triton = found.launch_cooperative_grid or found.launch_pdl or found.num_ctas != 1
    scratch = found.global_scratch_size or found.profile_scratch_size
    utils = triton.runtime.driver.active.utils
    most_shared = utils.get_device_properties(device_index)["max_shared_mem"]
    if needs_triton or scratch or found.shared > most_shared or has_load_hooks():
        return None
    types = [kind for _, kind in leaves(compiled.src.signature, compiled.src.signature.values())]
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
