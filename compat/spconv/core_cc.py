"""``spconv.core_cc``, the compiled part of spconv: not provided."""

from compat.spconv._names import refuse_module

refuse_module(
    "spconv.core_cc",
    "It is spconv's C++. Use the functions of spconv.pytorch.ops, or tritonspconv.ops.",
)
