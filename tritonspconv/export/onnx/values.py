"""The tensors of a recorded run; a recorder sees every function that is applied to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tritonspconv.coords.row_tensor import RowBounds, RowTensor

Function = Callable[..., Any]
Args = tuple[Any, ...]


class Recorder(Protocol):
    """The methods of a recorder that the tensors of its run call."""

    def call(self, func: Function, args: Args, kwargs: dict[str, Any]) -> Any:
        """Run a function, and record it."""
        ...

    def refuse(self, reason: str) -> NoReturn:
        """Raise the error of code that cannot be exported."""
        ...


class Cell:
    """The name of the value that a tensor holds now; tensors that share all memory share it.

    Attributes:
        name: The value in the graph; None: the graph does not have it.
        has_views: True: other tensors share parts of the memory.
    """

    __slots__ = ("has_views", "name")

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.has_views = False


class Rows(RowTensor):
    """A tensor of the recorded run with one row for each site, or each row of an input."""

    cell: Cell

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: Args = (), kwargs: Any = None
    ) -> Any:
        """Let the recorder apply a function."""
        for leaf in pytree.arg_tree_leaves(*args, **(kwargs or {})):
            if isinstance(leaf, Rows):
                return leaf.bounds.plan.recorder.call(func, args, kwargs or {})  # pyright: ignore
        raise AssertionError(f"{func} got no rows")

    # Torch's own methods would refuse a RowCount among the sizes before the recorder sees it.

    def view(self, *sizes: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Change axes behind the first; the first size may be the number of rows."""
        return self.bounds.plan.recorder.call(Tensor.view, (self, *sizes), {})  # pyright: ignore

    def reshape(self, *sizes: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Change axes behind the first; the first size may be the number of rows."""
        return self.bounds.plan.recorder.call(Tensor.reshape, (self, *sizes), {})  # pyright: ignore


class Dense(Tensor):
    """A tensor of the recorded run with a fixed shape, such as the result of ``dense()``."""

    cell: Cell
    recorder: Recorder
    node: Any

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: Args = (), kwargs: Any = None
    ) -> Any:
        """Let the recorder apply a function."""
        for leaf in pytree.arg_tree_leaves(*args, **(kwargs or {})):
            if isinstance(leaf, Dense):
                return leaf.recorder.call(func, args, kwargs or {})
        raise AssertionError(f"{func} got no dense tensor")


class RowCount:
    """Stands for the number of rows, which differs from scan to scan."""

    def __init__(self, recorder: Recorder, bounds: RowBounds) -> None:
        self._recorder = recorder
        self._bounds = bounds

    def __repr__(self) -> str:
        return "<number of rows>"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, RowCount) and other._bounds is self._bounds:
            return True
        return self._refuse()

    def __ne__(self, other: object) -> bool:
        return not self == other

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        self._recorder.refuse("computes with the number of rows, which differs from scan to scan")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse
    __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __pow__ = __neg__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __bool__ = __int__ = __float__ = __index__ = __format__ = __hash__ = _refuse


def as_plain(x: Tensor) -> Tensor:
    """Return a tensor of the run as an ordinary tensor on the same memory."""
    if not isinstance(x, (Rows, Dense)):
        return x
    with torch._C.DisableTorchFunction():
        return x.as_subclass(Tensor)
