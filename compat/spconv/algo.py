"""``spconv.algo``: the names that users import from it; its tuners belong to spconv's kernels."""

from compat.spconv._names import module_getattr
from compat.spconv.core import AlgoHint, ConvAlgo

__all__ = ["AlgoHint", "ConvAlgo"]

__getattr__ = module_getattr(
    __name__,
    otherwise="It tunes spconv's kernels; tritonspconv tune tunes those of tritonspconv.",
)
