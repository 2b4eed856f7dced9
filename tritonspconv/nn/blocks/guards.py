"""The conditions that an optimised ``forward`` relies on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tritonspconv.nn.fusable import is_unwatched, original_class

_MISSING = object()


def find(root: nn.Module, path: tuple[str, ...]) -> nn.Module:
    """Return the descendant of ``root`` at ``path``.

    Raises:
        KeyError: There is none.
    """
    for name in path:
        root = root._modules[name]  # pyright: ignore[reportAssignmentType]
    return root


@dataclass
class Guards:
    """The conditions that a recording relies on.

    Attributes:
        values: Attributes of modules that the code read: path of the module, name, value.
        kinds: The class of each module that the graph calls, by path.
        lengths: The number of children of each list of modules that the code went through.
        inlined: Paths of the containers whose children the graph calls in their place.
        inputs: Numbers of the arguments that must be sparse tensors.
    """

    values: dict[tuple[tuple[str, ...], str], Any] = field(default_factory=dict)
    kinds: dict[tuple[str, ...], type[nn.Module]] = field(default_factory=dict)
    lengths: dict[tuple[str, ...], int] = field(default_factory=dict)
    inlined: set[tuple[str, ...]] = field(default_factory=set)
    inputs: set[int] = field(default_factory=set)

    def hold(self, root: nn.Module) -> bool:
        """Return whether the modules are still as they were when ``forward`` was recorded."""
        try:
            for (path, name), value in self.values.items():
                now = getattr(find(root, path), name, _MISSING)
                if now is not value and not (type(now) is type(value) and now == value):
                    return False
            for path, kind in self.kinds.items():
                if original_class(find(root, path)) is not kind:
                    return False
            for path, length in self.lengths.items():
                if len(find(root, path)._modules) != length:
                    return False
            for path in self.inlined:
                if not is_unwatched(find(root, path)):
                    return False
        except (KeyError, AttributeError):
            return False
        return True

    def reads_mode(self) -> list[tuple[str, ...]]:
        """Return the paths of the modules whose ``training`` the code reads."""
        return [path for path, name in self.values if name == "training"]
