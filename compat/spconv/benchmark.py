"""``spconv.benchmark``, benchmarks of spconv: not provided."""

from compat.spconv._names import refuse_module

refuse_module("spconv.benchmark", "Use python -m tritonspconv.bench.")
