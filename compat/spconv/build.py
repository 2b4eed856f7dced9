"""``spconv.build``, the build of spconv's C++: not provided."""

from compat.spconv._names import refuse_module

refuse_module("spconv.build", "Nothing is compiled here.")
