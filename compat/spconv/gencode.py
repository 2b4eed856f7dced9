"""``spconv.gencode``, the generator of spconv's C++: not provided."""

from compat.spconv._names import refuse_module

refuse_module("spconv.gencode", "Nothing is compiled here.")
