"""``spconv.algocore``, kernel parameters of spconv: not provided."""

from compat.spconv._names import refuse_module

refuse_module(
    "spconv.algocore",
    "It describes spconv's compiled kernels; scripts/tools/tune.py finds tiles for those here.",
)
