"""``spconv.algocore``, kernel parameters of spconv: not provided."""

from compat.spconv._names import refuse_module

refuse_module(
    "spconv.algocore",
    "It describes spconv's compiled kernels; tritonspconv tune finds tiles for those here.",
)
