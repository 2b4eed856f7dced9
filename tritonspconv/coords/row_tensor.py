"""RowTensor: a tensor whose first rows are real; it refuses code that would count the others.

User code between sparse layers sees features and coordinates as tensors. If rows are padded up
to a capacity, ``features.mean(0)`` would silently count the padding. A :class:`RowTensor` lets
functions through that treat each row by itself, and refuses all others by name.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonspconv.coords.site_plan import SitePlan
from tritonspconv.guide import more, without_more

_OUR_PACKAGES = ("torch", "tritonspconv", "compat")

Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class RowBounds(NamedTuple):
    """The number of real rows of a tensor.

    Attributes:
        count: int64 [], on the tensor's device; None: all rows are real, and ``plan`` records.
        plan: The capacities of the run that the tensor takes part in.
    """

    count: Tensor | None
    plan: SitePlan

    def mask(self, rows: int) -> Tensor | None:
        """Return a bool [rows] that is True for real rows; None where all are."""
        if self.count is None:
            return None
        return torch.arange(rows, device=self.count.device) < self.count


class RowwiseError(RuntimeError):
    """Code would count padding rows, or needs a shape that is not fixed."""

    def __init__(self, message: str) -> None:
        super().__init__(without_more(message) + more("padded-rows"))


class RowTensor(Tensor):
    """A tensor whose first axis is rows, the first ``bounds.count`` of them real.

    Functions that treat each row by itself return a :class:`RowTensor`. :data:`RULES` says how the
    others work: sparse operations, batch norm, losses. A function without a rule raises
    :class:`RowwiseError`.
    """

    bounds: RowBounds

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Apply the rule of ``func``."""
        plan = next(row_tensors((args, kwargs))).bounds.plan
        rule = plan.rules.get(func) or RULES.get(func)
        if rule is None:
            raise refusal(func, "it is not known to treat each row by itself")
        return rule(func, args, dict(kwargs or {}))

    def __repr__(self, **_kwargs: Any) -> str:
        """Return shape and dtype; the values are not read."""
        return f"RowTensor({list(self.shape)}, {self.dtype}, {self.device})"


RULES: dict[Callable[..., Any], Rule] = {}
"""The rule of each function that takes a :class:`RowTensor`; filled when modules are imported."""


def as_rows(x: Tensor, bounds: RowBounds) -> RowTensor:
    """Return ``x`` [N, ...] as a tensor with ``bounds.count`` real rows; shares memory."""
    if bounds.plan.show_rows is not None:
        return bounds.plan.show_rows(x, bounds)
    rows = plain(x).as_subclass(RowTensor)
    rows.bounds = bounds
    if bounds.plan.on_alias is not None:
        bounds.plan.on_alias(x, rows)
    return rows


def plain(x: Any) -> Any:
    """Return a :class:`RowTensor` as an ordinary tensor on the same memory; others as they are."""
    if isinstance(x, RowTensor):
        with torch._C.DisableTorchFunctionSubclass():
            made = x.as_subclass(Tensor)
        if x.bounds.plan.on_alias is not None:
            x.bounds.plan.on_alias(x, made)
        return made
    return x


def reads_values(x: Any) -> bool:
    """Return whether the host may read values of ``x``: not where a run is recorded."""
    return not isinstance(x, RowTensor) or x.bounds.plan.builder is None


def bounds_of(x: Any) -> RowBounds | None:
    """Return the bounds of a :class:`RowTensor`; None for any other object."""
    return x.bounds if isinstance(x, RowTensor) else None


def row_tensors(values: Any) -> Iterator[RowTensor]:
    """Yield every :class:`RowTensor` in arguments of a function, in lists and dicts too."""
    if isinstance(values, RowTensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from row_tensors(value)
    elif isinstance(values, dict):
        yield from row_tensors(tuple(values.values()))


def plain_tree(values: Any) -> Any:
    """Return arguments with every :class:`RowTensor` in them as an ordinary tensor."""
    if isinstance(values, list):
        return [plain_tree(value) for value in values]
    if type(values) is tuple:
        return tuple(plain_tree(value) for value in values)
    if isinstance(values, dict):
        return {key: plain_tree(value) for key, value in values.items()}
    return plain(values)


def shared_bounds(func: Callable[..., Any], *values: Any) -> RowBounds:
    """Return the bounds that all row tensors among ``values`` share.

    Raises:
        RowwiseError: Their rows belong to different sites.
    """
    bounds = [x.bounds for x in row_tensors(values)]
    first = bounds[0]
    if any(other.count is not first.count for other in bounds):
        raise refusal(func, "its operands have the rows of different sites")
    return first


def refusal(func: Callable[..., Any] | str, reason: str) -> RowwiseError:
    """Return the error for a function, or a step of this name, that is wrong on padded rows."""
    name = func if isinstance(func, str) else getattr(func, "__qualname__", None)
    name = name or getattr(func, "__name__", repr(func))
    if name == "__get__":
        name = f"property {getattr(func, '__self__', func)}"
    return RowwiseError(
        f"{name} cannot run on rows that are padded to a capacity: {reason}. Line: {_user_line()}. "
        "Move this step out of the captured function, or use an operation that keeps one row for "
        "each site (linear layers, activations, sums along channels, tritonspconv operations)."
    )


def _user_line() -> str:
    """Return file, line and source of the innermost frame outside torch and these packages."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in _OUR_PACKAGES:
            name, line = frame.f_code.co_filename, frame.f_lineno
            return f"{name}:{line}: {linecache.getline(name, line).strip()}"
        frame = frame.f_back
    return "unknown"
