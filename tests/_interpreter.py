"""Make tests in Triton's interpreter quicker.

The interpreter runs the programs of a launch one after another, so weight gradients, which fill a
GPU with programs, take few here. And half of its time on small kernels goes into a search: whenever
a kernel starts or calls another function, the interpreter lists all members of ``triton.language``
and replaces the built-in ones. Which members are built in never changes, so one list is enough.
"""

import functools
import inspect

import pytest
from triton.language import core
from triton.runtime import interpreter

from tritonspconv.kernels.triton import weight_grad


def cut_into_few_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a weight gradient take few programs; their number changes only speed."""
    monkeypatch.setattr(weight_grad, "_WAVE", 12)
    monkeypatch.setattr(weight_grad, "_MIN_SLICES", 5)


def list_builtins_once() -> None:
    """Replace the interpreter's search by one whose list is kept, before the first launch."""
    if hasattr(interpreter, "_patch_builtin"):  # a private function: other versions may lack it
        interpreter._patch_builtin = _patch_builtin


@functools.cache
def builtin_names(owner: object) -> tuple[str, ...]:
    """Return the names of the built-in members of a module or class that nobody has patched."""
    return tuple(name for name, member in inspect.getmembers(owner) if core.is_builtin(member))


def _patch_builtin(owner: object, *arguments: object) -> None:
    """Do what ``triton.runtime.interpreter._patch_builtin`` does, by the list of names."""
    for name in builtin_names(owner):
        member = getattr(owner, name)
        if core.is_builtin(member):
            interpreter._patch_attr(owner, name, member, *arguments)
