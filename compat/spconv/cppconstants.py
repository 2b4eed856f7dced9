"""``spconv.cppconstants``: the features with which spconv's C++ was compiled."""

from compat.spconv._names import module_getattr

__all__ = ["COMPILED_CUDA_ARCHS", "COMPILED_CUDA_GEMM_ARCHS", "CPU_ONLY_BUILD", "HAS_BOOST"]

# Layers written by users use the features of a GPU build if this is False. Here these features work
# on every device.
CPU_ONLY_BUILD = False

# There are no box operations and no precompiled kernels.
HAS_BOOST = False
COMPILED_CUDA_ARCHS: set[tuple[int, int]] = set()
COMPILED_CUDA_GEMM_ARCHS: set[tuple[int, int]] = set()

__getattr__ = module_getattr(
    __name__,
    refused={
        "SpconvOps BoxOps CompileInfo": "It is spconv's C++; use spconv.pytorch.ops.",
        "BUILD_CUMM_VERSION BUILD_PCCM_VERSION": "Nothing was compiled with cumm or pccm.",
    },
)
