"""Results of a model as trees of plain tensors, and the comparison of two of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from tritonspconv.coords.row_tensor import RowTensor, plain
from tritonspconv.has_rows import has_rows

# The largest difference of a result, as a share of its largest value.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Mismatch(ValueError):
    """Two results differ, or a result cannot be compared."""


def as_plain(tree: Any, given: Collection[int] = ()) -> Any:
    """Return a model's result as dicts, lists, tuples, tensors, numbers and strings.

    A sparse tensor becomes a dict of ``features`` and ``coords``, padded rows a dict of
    ``features``; both with their ``count`` where rows are padded. Padding of features is zero.

    Args:
        tree: The result.
        given: The ``id`` of each argument; dict entries that are arguments are left out.

    Raises:
        Mismatch: The result holds an object that a program cannot return.
    """
    if isinstance(tree, RowTensor):
        return {"features": _without_padding(tree), "count": tree.bounds.count}
    if tree is None or isinstance(tree, Tensor | bool | int | float | str):
        return tree
    if has_rows(tree):
        feats, coords = tree._row_tensors()
        made = as_plain(feats)
        made = made if isinstance(made, dict) else {"features": made}
        return {"features": made["features"], "coords": plain(coords), **made}
    if isinstance(tree, dict):
        return {
            key: as_plain(value, given) for key, value in tree.items() if id(value) not in given
        }
    if isinstance(tree, list | tuple):
        return [as_plain(value, given) for value in tree]
    raise Mismatch(
        f"the model returns a {type(tree).__name__}; a program returns tensors, sparse tensors, "
        "numbers and strings, in dicts, lists and tuples"
    )


def _without_padding(rows: RowTensor) -> Tensor:
    x, mask = plain(rows), rows.bounds.mask(rows.shape[0])
    return x if mask is None else torch.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)


def check_equal(found: Any, expected: Any, path: str = "outputs") -> None:
    """Compare the outputs of a program with the model's outputs, within :data:`TOLERANCE`.

    Args:
        found: The result of the program.
        expected: The result of the model, converted by :func:`as_plain`.
        path: The name of both in the message.

    Raises:
        Mismatch: They differ.
    """
    if isinstance(found, dict) and "count" in found:
        count = int(found["count"])
        expected = expected if isinstance(expected, dict) else {"features": expected}
        for name in ("features", "coords"):
            if name in expected:
                value = expected[name][: int(expected["count"]) if "count" in expected else None]
                check_equal(found[name][:count], value, f"{path}.{name}")
    elif isinstance(found, dict):
        for key, value in found.items():
            check_equal(value, expected[key], f"{path}[{key!r}]")
    elif isinstance(found, list | tuple):
        for place, (value, other) in enumerate(zip(found, expected, strict=True)):
            check_equal(value, other, f"{path}[{place}]")
    elif isinstance(found, Tensor):
        _check_equal_tensors(found, expected, path)
    elif found != expected:
        raise Mismatch(f"{path} is {found!r} instead of {expected!r}")


def _check_equal_tensors(found: Tensor, expected: Tensor, path: str) -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise Mismatch(
            f"{path} is {list(found.shape)} {found.dtype} instead of {list(expected.shape)} "
            f"{expected.dtype}"
        )
    if found.numel() == 0 or torch.equal(found, expected):
        return
    scale = expected.abs().max().double()
    error = (found.double() - expected.double()).abs().max() / scale.clamp(min=1e-300)
    allowed = TOLERANCE.get(found.dtype, 0.0)
    if not bool(error <= allowed):
        raise Mismatch(
            f"{path} differs by {float(error):.1e} of its largest value; {allowed:.0e} is allowed"
        )
