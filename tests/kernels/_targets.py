"""GPUs for which the kernels are compiled, on a machine without a GPU."""

from triton.backends.compiler import GPUTarget

from tritonspconv.kernels.triton.configs import Card

# Each target has the KiB of shared memory (AMD: LDS) that one block may use.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163, "A100"),
    "sm_86": (GPUTarget("cuda", 86, 32), 99, "RTX 30, A40"),
    "sm_89": (GPUTarget("cuda", 89, 32), 99, "RTX 40, L40"),
    "sm_90": (GPUTarget("cuda", 90, 32), 227, "H100, H200"),
    "sm_100": (GPUTarget("cuda", 100, 32), 227, "B200"),
    "sm_120": (GPUTarget("cuda", 120, 32), 99, "RTX 50"),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), 64, "MI250"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64, "MI300"),
    "gfx950": (GPUTarget("hip", "gfx950", 64), 160, "MI350"),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), 64, "RX 7900"),
    "gfx1201": (GPUTarget("hip", "gfx1201", 32), 64, "RX 9070"),
}

# CI has time for these: each kind of matrix unit, of warp and of shared memory once.
IN_CI = ("sm_86", "sm_90", "sm_100", "gfx942", "gfx1201")

# Kernels that may spill registers, with the reason.
MAY_SPILL: dict[tuple[str, str], str] = {
    ("sm_80", "weight_grad_kernel"): "8 bytes, of a tile of 128 x 128 with two accumulators",
}


def card(target: str) -> Card:
    """Return the properties of a target by which tiles are chosen."""
    gpu, kilobytes, _ = TARGETS[target]
    return Card(gpu.backend == "hip", kilobytes * 1024, gpu.warp_size)


# Most bytes that a case may spill on a target for which its tile has not been made yet.
KNOWN_SPILLS = {
    ("gather_gemm-norm", "sm_100"): 392,
    ("gather_gemm-norm-256", "sm_100"): 1064,
    ("parts-1-128", "sm_100"): 32,
    ("parts-2-norm", "sm_86"): 40,
    ("parts-2-odd", "gfx942"): 27,
    ("parts-2-odd", "gfx1201"): 17,
}
