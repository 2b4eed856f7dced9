"""Arguments and results of a captured function: nested containers, sparse tensors and leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from tritonspconv.has_rows import has_rows

_GUARDED = (bool, int, float, complex, str, bytes, type(None))


class Unread:
    """Stands for an argument that a captured function must not read.

    A graph repeats the work of the function on the example. An argument that is neither a tensor
    nor a plain number or string cannot be compared between calls, so a function that reads it would
    silently go on with the example's value.
    """

    def __init__(self, path: str) -> None:
        object.__setattr__(self, "_path", path)

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        path = object.__getattribute__(self, "_path")
        raise TypeError(
            f"the captured or exported function reads argument {path}, which is neither a tensor "
            "nor a number or string, so that its value would be frozen. Pass it as a tensor, or "
            "read it outside that function."
        )

    __getattr__ = __getitem__ = __iter__ = __len__ = __bool__ = __call__ = _refuse
    __add__ = __sub__ = __mul__ = __float__ = __int__ = __index__ = _refuse


def map_tree(tree: Any, leaf: Callable[[str, Any], Any]) -> Any:
    """Return a copy of ``tree`` with every leaf replaced by ``leaf(path, value)``.

    Containers are dicts, lists, tuples and sparse tensors; a sparse tensor's leaves are its
    features and its coordinates.
    """
    return _walk(tree, leaf, "", makes_tensors=True)


def leaves(tree: Any) -> dict[str, Any]:
    """Return every leaf of ``tree`` by its path, and the grid of each sparse tensor as a string."""
    found: dict[str, Any] = {}
    _walk(tree, found.__setitem__, "", makes_tensors=False)
    return found


def _walk(tree: Any, leaf: Callable[[str, Any], Any], path: str, makes_tensors: bool) -> Any:
    """Call ``leaf`` for every leaf, and return containers of its results.

    Without ``makes_tensors`` the results of a sparse tensor's leaves make no sparse tensor.
    """
    if has_rows(tree):
        feats, coords = tree._row_tensors()
        feats, coords = leaf(f"{path}.features", feats), leaf(f"{path}.coords", coords)
        if makes_tensors:
            return tree._with_row_tensors(feats, coords)
        leaf(f"{path}.grid", tree._grid_of_rows())
        return None
    if isinstance(tree, dict):
        return {
            key: _walk(value, leaf, f"{path}[{key!r}]", makes_tensors)
            for key, value in tree.items()
        }
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        fields = zip(tree._fields, tree, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
        return type(tree)(
            *(_walk(value, leaf, f"{path}.{name}", makes_tensors) for name, value in fields)
        )
    if isinstance(tree, list | tuple):
        kind = type(tree) if type(tree) in (list, tuple) else list
        return kind(
            _walk(value, leaf, f"{path}[{place}]", makes_tensors)
            for place, value in enumerate(tree)
        )
    return leaf(path, tree)


def is_guarded(value: Any) -> bool:
    """Return whether a value must be the same at every call: numbers, strings, None."""
    return isinstance(value, _GUARDED)
