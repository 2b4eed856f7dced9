"""Contexts of a recording: they replace attributes while it lasts, and restore them after it."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

_MISSING = object()


@contextlib.contextmanager
def replaced(attributes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes of classes and modules, and restore the old values."""
    before = []
    try:
        for owner, name, value in attributes:
            before.append((owner, name, vars(owner).get(name, _MISSING)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@contextlib.contextmanager
def quiet_torch_fx() -> Iterator[None]:
    """Keep torch.fx from logging how a function should be called that only torch.fx calls."""
    log = logging.getLogger("torch.fx._symbolic_trace")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def no_random_numbers(refuse: Callable[[str], Any]) -> Iterator[None]:
    """Call ``refuse`` with a reason if Python's or NumPy's generators draw numbers meanwhile."""
    numpy: Any = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    yield
    drawn = random.getstate() != state
    if numpy_state is not None:
        now = numpy.random.get_state()
        drawn = drawn or any(
            not numpy.array_equal(a, b) for a, b in zip(now, numpy_state, strict=True)
        )
    if drawn:
        random.setstate(state)
        if numpy_state is not None:
            numpy.random.set_state(numpy_state)
        refuse("draws random numbers")
