"""Compilation by numba: at the first call, kept on disk, without Python's lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` as machine code that lets other Python threads run.

    numba compiles a function for the types of its first call and keeps the code beside the source
    file, or in the user's cache folder, or in ``NUMBA_CACHE_DIR``. If numba can write to none of
    these folders, each process compiles the function again.

    numba compiles again if the source file of ``function`` changes. It does not see changes of
    other files; so a compiled function calls compiled functions of its own module only.
    """
    try:
        return numba.njit(function, cache=True, nogil=True, error_model="numpy")
    except RuntimeError:  # no folder can be written to
        return numba.njit(function, nogil=True, error_model="numpy")
