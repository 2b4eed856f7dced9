"""Every back end that a face may pick has the face's launchers, with the same arguments."""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest

from tritonspconv import kernels

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("numba", reason="numba is not installed")


def back_ends() -> Iterator[tuple[str, ModuleType, list[str]]]:
    """Yield the name of a face, a module that its ``_back_end`` imports, and its launchers."""
    for info in pkgutil.iter_modules(kernels.__path__):
        face = importlib.import_module(f"{kernels.__name__}.{info.name}")
        if not hasattr(face, "_back_end"):
            continue
        nodes = list(ast.walk(ast.parse(inspect.getsource(face))))
        launchers = [
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func) == "_back_end"
        ]
        (choice,) = (
            node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == "_back_end"
        )
        for node in ast.walk(choice):
            if isinstance(node, ast.ImportFrom):
                (name,) = node.names
                yield info.name, importlib.import_module(f"{node.module}.{name.name}"), launchers


def required(function: object) -> list[str]:
    """Return the names of the arguments, without those of a back end alone."""
    names = inspect.signature(function).parameters
    # Tuners pass a tile to the Triton launchers, and numba an inversion to the torch one.
    return [name for name in names if name not in ("config", "invert")]


def test_back_ends_have_the_same_launchers():
    arguments, rooms = {}, set()
    for face, module, launchers in back_ends():
        assert launchers, f"{face} calls no launcher"
        rooms.add(module.__name__.split(".")[2])
        for launcher in launchers:
            found = required(getattr(module, launcher))
            expected = arguments.setdefault((face, launcher), found)
            assert found == expected, f"{module.__name__}.{launcher}"
    assert rooms == {"eager", "numba", "triton"}
    assert len(arguments) > 15


def test_arguments_have_the_defaults_of_the_face():
    compared = 0
    for name, module, launchers in back_ends():
        face = importlib.import_module(f"{kernels.__name__}.{name}")
        for launcher in launchers:
            of_face = inspect.signature(getattr(face, launcher)).parameters
            for argument, own in inspect.signature(getattr(module, launcher)).parameters.items():
                if own.default is not own.empty and argument in of_face:
                    assert own.default == of_face[argument].default, f"{launcher}: {argument}"
                    compared += 1
    assert compared > 20
