"""A debug mode in which every new sparse tensor checks its coordinates.

Rows outside the grid take no part in any kernel map. A search for them would wait for the device,
so there is none by default, and such rows change results silently. In the debug mode, a tensor that
is made of such rows raises.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_VARIABLE = "TRITONSPCONV_CHECK_COORDS"

# If the value is None, the environment variable decides.
_enabled: ContextVar[bool | None] = ContextVar("check_coords", default=None)


@contextmanager
def check_coords(enabled: bool = True) -> Iterator[None]:
    """Check the coordinates of every sparse tensor that is made inside the block, in this thread.

    ``TRITONSPCONV_CHECK_COORDS=1`` in the environment does the same for a whole process; the
    variable is read once. Each check waits for the device.

    Args:
        enabled: False turns the checks off inside the block.

    Raises:
        ValueError: A new tensor has rows outside its grid or its batch.

    Example:
        >>> with tritonspconv.debug.check_coords():
        ...     y = net(x)
    """
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


def checks_coords() -> bool:
    """Return whether new tensors check their coordinates."""
    enabled = _enabled.get()
    return _environment_asks() if enabled is None else enabled


@functools.cache
def _environment_asks() -> bool:
    return os.environ.get(_VARIABLE, "0") not in ("", "0")
