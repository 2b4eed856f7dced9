"""``spconv.cppconstants``: what spconv's C++ was compiled for."""

__all__ = ["CPU_ONLY_BUILD"]

# Layers of users' own choose what a GPU build can do where this is False; here all of it works on
# every device.
CPU_ONLY_BUILD = False
