"""Arguments and results of a captured function: nested containers, sparse tensors and leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Protocol, TypeGuard

from torch import Tensor

_GUARDED = (bool, int, float, complex, str, bytes, type(None))


class HasRows(Protocol):
    """A sparse tensor of the engine or of an adapter."""

    def _row_tensors(self) -> tuple[Tensor, Tensor]:
        """Return features [N, C] and coordinates [N, 1 + D]."""
        ...

    def _with_row_tensors(self, feats: Tensor, coords: Tensor) -> Any:
        """Return a tensor of the same kind and grid with other rows and without kernel maps."""
        ...


class Unread:
    """Stands for an argument that a captured function must not read.

    A graph repeats what the function did with the example. An argument that is neither a tensor nor
    a plain number or string cannot be compared between calls, so a function that reads it would
    silently go on with the example's value.
    """

    def __init__(self, path: str) -> None:
        object.__setattr__(self, "_path", path)

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        path = object.__getattribute__(self, "_path")
        raise TypeError(
            f"capture: the captured function reads argument {path}, which is neither a tensor nor "
            "a number or string, so that its value would be frozen. Pass it as a tensor, or read "
            "it outside the captured function."
        )

    __getattr__ = __getitem__ = __iter__ = __len__ = __bool__ = __call__ = _refuse
    __add__ = __sub__ = __mul__ = __float__ = __int__ = __index__ = _refuse


def _has_rows(value: Any) -> TypeGuard[HasRows]:
    return hasattr(type(value), "_with_row_tensors")


def map_tree(tree: Any, leaf: Callable[[str, Any], Any], path: str = "") -> Any:
    """Return a copy of ``tree`` with every leaf replaced by ``leaf(path, value)``.

    Containers are dicts, lists, tuples and sparse tensors; a sparse tensor's leaves are its
    features and its coordinates.
    """
    if _has_rows(tree):
        feats, coords = tree._row_tensors()
        return tree._with_row_tensors(
            leaf(f"{path}.features", feats), leaf(f"{path}.coords", coords)
        )
    if isinstance(tree, dict):
        return {key: map_tree(value, leaf, f"{path}[{key!r}]") for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        fields = zip(tree._fields, tree, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
        return type(tree)(*(map_tree(value, leaf, f"{path}.{name}") for name, value in fields))
    if isinstance(tree, list | tuple):
        kind = type(tree) if type(tree) in (list, tuple) else list
        return kind(map_tree(value, leaf, f"{path}[{place}]") for place, value in enumerate(tree))
    return leaf(path, tree)


def leaves(tree: Any) -> dict[str, Any]:
    """Return every leaf of ``tree`` by its path."""
    found: dict[str, Any] = {}
    _visit(tree, found.__setitem__, "")
    return found


def _visit(tree: Any, visit: Callable[[str, Any], None], path: str) -> None:
    if _has_rows(tree):
        feats, coords = tree._row_tensors()
        visit(f"{path}.features", feats)
        visit(f"{path}.coords", coords)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            _visit(value, visit, f"{path}[{key!r}]")
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        for name, value in zip(tree._fields, tree, strict=True):  # pyright: ignore[reportAttributeAccessIssue]
            _visit(value, visit, f"{path}.{name}")
    elif isinstance(tree, list | tuple):
        for place, value in enumerate(tree):
            _visit(value, visit, f"{path}[{place}]")
    else:
        visit(path, tree)


def is_guarded(value: Any) -> bool:
    """Return whether a value must be the same at every call: numbers, strings, None."""
    return isinstance(value, _GUARDED)
