"""``spconv.algo``: the names that users import from it; its tuners belong to spconv's kernels."""

from compat.spconv._names import module_getattr
from compat.spconv.core import AlgoHint, ConvAlgo

__all__ = ["AlgoHint", "ConvAlgo"]

__getattr__ = module_getattr(
    __name__,
    refused={
        "SimpleGemm SimpleConv BestAlgoByProfile BestConvAlgoByProfile GemmTunerSimple "
        "ConvTunerSimple GEMM CONV GEMM_CPP CONV_CPP": (
            "Tuners of spconv's kernels; scripts/tools/tune.py tunes those of tritonspconv."
        )
    },
)
