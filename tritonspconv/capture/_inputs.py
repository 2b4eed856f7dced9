"""The static inputs of a captured function: buffers of fixed size that each call fills."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tritonspconv.capture._tree import Unread, is_guarded, leaves, map_tree
from tritonspconv.coords.row_tensor import RowBounds, as_rows, plain
from tritonspconv.guide import more

Kind = Literal["coords", "rows", "fixed", "equal", "unread"]


class Signature(NamedTuple):
    """A description of a captured function's arguments, equal at every call but for the rows.

    Attributes:
        kinds: The kind of each leaf of the arguments. ``"coords"`` and ``"rows"`` have one row for
            each site; ``"fixed"`` tensors keep their shape; ``"equal"`` values must not change;
            ``"unread"`` values must not be read.
        values: The value of each ``"equal"`` leaf; shape behind the rows, dtype, device and whether
            it needs gradients, of each tensor.
        coords: Path of the leaf that tells the number of rows.
    """

    kinds: dict[str, Kind]
    values: dict[str, Any]
    coords: str

    @classmethod
    def of(
        cls,
        example: Any,
        coords: str | int | None,
        reads: tuple[str, ...] | None,
        caller: str = "capture",
    ) -> Signature:
        """Describe the example's arguments ``(args, kwargs)``.

        Args:
            example: The arguments.
            coords: Key, argument name or place of the coordinates; None: those of the sparse
                tensor.
            reads: Keys or argument names that the function reads; None: all.
            caller: The function that the user called, for messages.
        """
        found = leaves(example)
        path = _coords_path(found, coords, caller)
        n = found[path].shape[0]
        kinds: dict[str, Kind] = {}
        values: dict[str, Any] = {}
        for name, value in found.items():
            kind = _kind(name, value, path, n, reads)
            kinds[name] = kind
            if kind == "equal":
                values[name] = value
            elif kind != "unread":
                values[name] = _description(value, kind)
        return cls(kinds, values, path)

    def without_data(self, example: Any) -> Any:
        """Return the example's structure with tensors of no rows, so that its memory is free."""

        def leaf(name: str, value: Any) -> Any:
            if isinstance(value, Tensor):
                shape = (0, *value.shape[1:]) if value.ndim else ()
                return plain(value).new_empty(shape)
            return value if self.kinds[name] == "equal" else None

        return map_tree(example, leaf)

    def check(self, found: dict[str, Any]) -> int:
        """Compare the leaves of a call with those of the example; return the number of rows.

        Raises:
            ValueError: An argument has another structure, shape, dtype, device or value.
        """
        if found.keys() != self.kinds.keys():
            differing = sorted(found.keys() ^ self.kinds.keys())
            raise ValueError(
                f"captured function: the arguments must have the structure of the example; these "
                f"are there only once: {differing}. Capture the function again for them."
                + more("capture-again")
            )
        n = found[self.coords].shape[0]
        for name, kind in self.kinds.items():
            if kind == "unread":
                continue
            value, expected = found[name], self.values[name]
            if kind == "equal":
                if value != expected:
                    raise _changed(name, expected, value)
                continue
            if _description(value, kind) != expected:
                raise _changed(name, expected, _description(value, kind))
            if kind != "fixed" and value.shape[0] != n:
                raise ValueError(
                    f"captured function: argument {name} must have {n} rows like the coordinates; "
                    f"got {value.shape[0]}."
                )
        return n


def _description(value: Tensor, kind: Kind) -> tuple[Any, ...]:
    shape = value.shape if kind == "fixed" else value.shape[1:]
    return tuple(shape), value.dtype, value.device, torch.is_grad_enabled() and value.requires_grad


def _changed(name: str, expected: Any, got: Any) -> ValueError:
    return ValueError(
        f"captured function: argument {name} must be as in the example; expected {expected}, got "
        f"{got}. Capture the function again for other values." + more("capture-again")
    )


def _coords_path(found: dict[str, Any], coords: str | int | None, caller: str) -> str:
    if coords is None:
        paths = [path for path in found if path.endswith(".coords")]
        asked = "the coordinates of a sparse tensor"
    else:
        paths = [path for path in found if path.endswith(f"[{coords!r}]")]
        asked = f"{coords!r}"
    if len(paths) != 1:
        raise ValueError(
            f"{caller}: exactly one argument must be {asked}; found {paths} among {list(found)}. "
            "Pass coords= with the key, argument name or place of the int32 coordinates."
        )
    return paths[0]


def _kind(name: str, value: Any, coords: str, n: int, reads: tuple[str, ...] | None) -> Kind:
    if name == coords:
        return "coords"
    if reads is not None and not any(f"[{key!r}]" in name for key in reads):
        return "unread"
    if isinstance(value, Tensor):
        return "rows" if value.ndim and value.shape[0] == n else "fixed"
    return "equal" if is_guarded(value) else "unread"


class RowInputs:
    """The arguments of one run with rows padded to a capacity.

    Padding rows are zero, and their batch index is -1, so that they lie in no grid.

    Args:
        template: The arguments ``(args, kwargs)`` of the example, without their data.
        signature: Their description.
        tensors: The padded tensors among the arguments, by path.
        bounds: How many rows are real, and the plan of the run.

    Attributes:
        arguments: ``(args, kwargs)`` for the function.
        given: By ``id`` of an object among the arguments, the path of the leaf that it stands for,
            and the object, which must live as long as its ``id`` is used.
    """

    def __init__(
        self, template: Any, signature: Signature, tensors: dict[str, Tensor], bounds: RowBounds
    ) -> None:
        self.given: dict[int, tuple[str, Any]] = {}

        def leaf(name: str, value: Any) -> Any:
            kind = signature.kinds[name]
            if kind == "equal":
                return value
            if kind == "unread":
                value = Unread(name)
            else:
                value = tensors[name]
                value = value if kind == "fixed" else as_rows(value, bounds)
            self.given[id(value)] = name, value
            return value

        self.arguments = map_tree(template, leaf)


class StaticBuffers:
    """Memory of fixed size for the tensors among the arguments; each call fills it.

    Args:
        found: Leaves of the example's arguments by path; as many of its rows as there is room for
            are copied.
        signature: Their description.
        capacity: Rows of the buffers.
        needs_grad: Paths of the rows that need gradients.

    Attributes:
        tensors: The buffers by path.
        count: int64 [], the number of real rows, on the device.
    """

    def __init__(
        self,
        found: dict[str, Any],
        signature: Signature,
        capacity: int,
        needs_grad: frozenset[str],
    ) -> None:
        self._signature, self._capacity = signature, capacity
        self._filled = 0
        self.tensors: dict[str, Tensor] = {}
        self.count = torch.zeros((), dtype=torch.int64, device=found[signature.coords].device)
        for name, value in found.items():
            kind = signature.kinds[name]
            if kind in ("equal", "unread"):
                continue
            shape = value.shape if kind == "fixed" else (capacity, *value.shape[1:])
            buffer = torch.zeros(tuple(shape), dtype=value.dtype, device=value.device)
            if kind == "coords":
                buffer[:, 0] = -1
            self.tensors[name] = buffer.requires_grad_(name in needs_grad)
        self._load_example(found)

    def _load_example(self, found: dict[str, Any]) -> None:
        rows = min(found[self._signature.coords].shape[0], self._capacity)
        kinds = self._signature.kinds
        cut = {path: value[:rows] if kinds[path] in ("rows", "coords") else value
               for path, value in found.items()}  # fmt: skip
        self.load(cut, rows)

    @torch.no_grad()
    def load(self, found: dict[str, Any], n: int) -> None:
        """Copy the tensors of a call, by path, into the buffers; ``n`` rows are real."""
        stale = slice(n, max(n, self._filled))
        for name, buffer in self.tensors.items():
            kind, value = self._signature.kinds[name], plain(found[name])
            if kind == "fixed":
                buffer.copy_(value)
                continue
            buffer[:n].copy_(value)
            if stale.stop > n and kind == "coords":
                buffer[stale, 0] = -1
            elif stale.stop > n:
                buffer[stale] = 0
        self.count.fill_(n)
        self._filled = n


def padded(signature: Signature, found: dict[str, Any], capacity: int) -> dict[str, Tensor]:
    """Return the tensors of a call by path, rows padded to ``capacity``; differentiable."""
    tensors = {}
    for name, kind in signature.kinds.items():
        if kind in ("equal", "unread"):
            continue
        value = plain(found[name])
        if kind != "fixed":
            missing = value.new_zeros(capacity - value.shape[0], *value.shape[1:])
            if kind == "coords":
                missing[:, 0] = -1
            value = torch.cat([value, missing])
        tensors[name] = value
    return tensors
