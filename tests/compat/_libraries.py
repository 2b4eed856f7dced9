"""The libraries that tests run beside each other: an original, where installed, and its adapter."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest

from tests.parity.originals import ORIGINALS


@functools.cache
def library(original: str, which: str) -> Any:
    """Return the module that code imports, of the original or of its adapter."""
    found = ORIGINALS[original]
    if which == "original":
        absence = found.absence("cpu")
        if absence:
            pytest.skip(absence)
        found.prepare("cpu")
    name = found.name if which == "original" else found.adapter
    return importlib.import_module(f"{name}.pytorch" if original == "spconv" else name)
