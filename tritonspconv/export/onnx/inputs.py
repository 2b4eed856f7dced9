"""Inputs and outputs of a network: which tensors and sparse tensors they hold, by path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritonspconv.export.onnx.network import rows_of
from tritonspconv.has_rows import has_rows


def map_leaves(tree: Any, leaf: Callable[[str, Any], Any], path: str = "") -> Any:
    """Return a copy of lists, tuples and dicts with every tensor and sparse tensor replaced.

    Args:
        tree: The containers; anything else in them stays as it is.
        leaf: A function of a path and a value.
        path: The path of ``tree``.
    """
    if isinstance(tree, Tensor) or has_rows(tree):
        return leaf(path, tree)
    if isinstance(tree, dict):
        return {key: map_leaves(value, leaf, _join(path, key)) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        names = tree._fields  # pyright: ignore[reportAttributeAccessIssue]
        parts = zip(names, tree, strict=True)
        return type(tree)(*(map_leaves(value, leaf, _join(path, name)) for name, value in parts))
    if isinstance(tree, (list, tuple)):
        kind = list if isinstance(tree, list) else tuple
        return kind(map_leaves(x, leaf, _join(path, place)) for place, x in enumerate(tree))
    return tree


def leaves(tree: Any) -> dict[str, Any]:
    """Return every tensor and sparse tensor by its path."""
    found: dict[str, Any] = {}
    map_leaves(tree, found.__setitem__)
    return found


def copied(tree: Any) -> Any:
    """Return a tree with tensors of its own, so that code may write into them."""
    return map_leaves(tree, lambda _, value: _copy(value))


def fewer_rows(tree: Any, share: float, seed: int) -> Any:
    """Return another scan: a share of the rows, each with the features of another row.

    Tensors with equal numbers of rows keep the same rows.
    """
    chosen: dict[int, tuple[Tensor, Tensor]] = {}

    def choose(rows: int) -> tuple[Tensor, Tensor]:
        if rows not in chosen:
            generator = torch.Generator().manual_seed(seed)
            kept = torch.rand(rows, generator=generator) < share
            kept[: min(rows, 2)] = True
            chosen[rows] = kept, torch.randperm(rows, generator=generator)
        return chosen[rows]

    def change(_: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            if not value.ndim:
                return value
            kept, order = choose(value.shape[0])
            return (value[order] if value.is_floating_point() else value)[kept]
        feats, sites = rows_of(value, "export_onnx: the example")
        kept, order = choose(feats.shape[0])
        return value._with_rows_in_cells(feats[order][kept], sites.coords[kept])

    return map_leaves(tree, change)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    feats, sites = rows_of(value, "export_onnx: the example")
    return value._with_rows_in_cells(feats.clone(), sites.coords.clone())


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
