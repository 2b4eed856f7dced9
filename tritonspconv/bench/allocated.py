"""Peak memory of a call on a CPU."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Callable

_SECONDS_BETWEEN_LOOKS = 2e-4


class _Usage(ctypes.Structure):
    """``struct mallinfo2`` of GNU's C library, 2.33 and later."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def peak_of(run: Callable[[], object]) -> int:
    """Return how many bytes a call adds at its peak to the memory that is allocated.

    The memory counts whoever allocates it: torch, numpy or the C++ code of another library. Memory
    that was freed does not count, though the allocator keeps some of it for later. The call runs
    twice: the first run compiles code and reads files. During the second run a thread looks at the
    allocator every 0.2 ms; the library has to release Python's lock in long calls, as
    torch, spconv and MinkowskiEngine do.

    Raises:
        RuntimeError: The allocator is not that of GNU's C library 2.33 or later.
    """
    usage = _usage_function()
    run()
    gc.collect()
    before = highest = _allocated(usage)
    done = threading.Event()

    def look() -> None:
        nonlocal highest
        while not done.wait(_SECONDS_BETWEEN_LOOKS):
            highest = max(highest, _allocated(usage))

    thread = threading.Thread(target=look)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SECONDS_BETWEEN_LOOKS)
    thread.start()
    try:
        result = run()
        highest = max(highest, _allocated(usage))
        del result
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    return highest - before


def _usage_function() -> Callable[[], _Usage]:
    function = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform != "win32" else None
    if function is None:
        raise RuntimeError(
            "peak memory on a CPU is measured by mallinfo2 of GNU's C library 2.33 or later; "
            "this process has none. Measure on a Linux system with GNU's C library."
        )
    function.restype = _Usage
    return function


def _allocated(usage: Callable[[], _Usage]) -> int:
    """Return the bytes in use: in blocks of their own from the system, and in the heaps."""
    found = usage()
    return found.hblkhd + found.uordblks
