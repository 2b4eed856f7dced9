"""``spconv.algo``: the names that users import from it; its tuners belong to spconv's kernels."""

from compat.spconv.core import AlgoHint, ConvAlgo

__all__ = ["AlgoHint", "ConvAlgo"]
