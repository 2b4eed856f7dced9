"""``spconv.csrc``, the sources of spconv's C++: not provided."""

from compat.spconv._names import refuse_module

refuse_module("spconv.csrc", "They generate spconv's C++. Nothing is compiled here.")
