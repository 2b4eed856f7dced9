"""The error of the exporter, and the place in user code that it names."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from tritonspconv.guide import more, without_more

_LIBRARIES = ("torch", "tritonspconv", "compat")


class OnnxExportError(RuntimeError):
    """A network cannot be written as ONNX; the message names the module and the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(without_more(message) + more("onnx"))


def is_library(frame: FrameType) -> bool:
    """Return whether a frame runs code of torch or of these packages, not of a user."""
    name = str(frame.f_globals.get("__name__", ""))
    return name.partition(".")[0] in _LIBRARIES and not name.startswith("tritonspconv.models")


def user_line() -> str:
    """Return file, line and source of the innermost frame of a user; "" if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not is_library(frame):
            name, line = frame.f_code.co_filename, frame.f_lineno
            return f" Line: {name}:{line}: {linecache.getline(name, line).strip()}."
        frame = frame.f_back
    return ""


def library_call() -> str:
    """Return the function of these packages, no ``forward``, that the user's code called."""
    frame: FrameType | None = sys._getframe(1)
    called: FrameType | None = None
    while frame is not None and is_library(frame):
        name = str(frame.f_globals.get("__name__", ""))
        ours = not name.startswith(("torch", "tritonspconv.export"))
        # A decorator has no owner.
        if ours and (_owner(frame) is not None or called is None or _owner(called) is None):
            called = frame
        frame = frame.f_back
    if called is None or called.f_code.co_name == "forward":
        return ""
    owner = _owner(called)
    kind = owner if isinstance(owner, type) else type(owner)
    prefix = "" if owner is None else f"{kind.__name__}."
    return f" inside {prefix}{called.f_code.co_name}"


def _owner(frame: FrameType) -> Any:
    """Return the object or class whose method a frame runs; None for a function."""
    return frame.f_locals.get("self", frame.f_locals.get("cls"))


def name_of(func: Callable[..., Any]) -> str:
    """Return a function's name as a user would write it."""
    name = getattr(func, "__name__", repr(func))
    if name == "__get__":
        return f"the attribute {getattr(getattr(func, '__self__', None), '__name__', func)!r}"
    return name
