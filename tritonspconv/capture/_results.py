"""The results of a captured function, their real rows, and whether they may be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonspconv.capture._inputs import RowInputs
from tritonspconv.capture._tree import leaves, map_tree
from tritonspconv.coords.row_tensor import as_rows, bounds_of, plain
from tritonspconv.coords.site_plan import Report, SitePlan

_REASONS = {
    Report.REPEATS: "input rows repeat each other",
    Report.OUTSIDE: "coordinates lie outside the box",
    Report.SAMPLES: "other samples occur than in the example",
}


class Outputs(NamedTuple):
    """The result of a function, and the arguments that it came from.

    Attributes:
        tree: Its result; rows are row tensors.
        given: The objects among the arguments; see :class:`RowInputs`.
    """

    tree: Any
    given: dict[int, tuple[str, Any]]

    @classmethod
    def of(cls, function: Callable[..., Any], inputs: RowInputs) -> Outputs:
        """Call the function."""
        args, kwargs = inputs.arguments
        return cls(function(*args, **kwargs), inputs.given)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that the function made, by path."""
        return {
            path: value
            for path, value in leaves(self.tree).items()
            if isinstance(value, Tensor) and id(value) not in self.given
        }

    def counts(self) -> list[Tensor]:
        """Return the row counts of the results, each once; int64 [] on the device."""
        found: dict[int, Tensor] = {}
        for value in self.tensors().values():
            bounds = bounds_of(value)
            if bounds is not None and bounds.count is not None:
                found[id(bounds.count)] = bounds.count
        return list(found.values())

    def rebuilt(
        self, call: dict[str, Any], tensors: dict[str, Tensor], counts: dict[int, int] | None
    ) -> Any:
        """Return the result for the caller.

        Args:
            call: Leaves of the caller's arguments; they replace the arguments that the function
                returned.
            tensors: The tensor to return for each one that the function made, by path.
            counts: Number of real rows by ``id`` of a count: padding is cut off. None: padded rows
                are returned as row tensors.
        """

        def leaf(path: str, value: Any) -> Any:
            given = self.given.get(id(value))
            if given is not None:
                return call[given[0]]
            if path not in tensors:
                return value
            tensor, bounds = plain(tensors[path]), bounds_of(value)
            if bounds is None or bounds.count is None:
                return tensor
            if counts is None:
                return as_rows(tensor, bounds)
            return tensor[: counts[id(bounds.count)]]

        return map_tree(self.tree, leaf)


class Status:
    """Flags and row counts of a run, copied to the host by the run itself.

    Args:
        plan: Holds the flags.
    """

    def __init__(self, plan: SitePlan) -> None:
        self._plan = plan
        self._on_gpu = plan.flags.is_cuda
        self._ids: list[int] = []
        self._host: Tensor | None = None

    def write(self, counts: list[Tensor]) -> None:
        """Copy flags and counts to the host; part of the run."""
        self._ids = [id(count) for count in counts]
        values = torch.cat([self._plan.flags.long(), *(count.reshape(1) for count in counts)])
        if self._host is None:
            self._host = torch.empty(
                values.shape, dtype=torch.int64, device="cpu", pin_memory=self._on_gpu
            )
        self._host.copy_(values, non_blocking=self._on_gpu)

    def read(self) -> tuple[str | None, dict[int, int]]:
        """Wait for the run.

        Returns:
            The reason why the results must not be used, or None; and the row counts by ``id``.
        """
        assert self._host is not None, "a run writes its status"
        if self._on_gpu:
            torch.cuda.current_stream(self._plan.flags.device).synchronize()
        values, n_flags = self._host.tolist(), self._plan.flags.shape[0]
        reports, overflows = values[: len(Report)], values[len(Report) : n_flags]
        counts = dict(zip(self._ids, values[n_flags:], strict=True))
        for kind in Report:
            if reports[kind]:
                return _REASONS[kind], counts
        if any(overflows):
            place = next(place for place, flag in enumerate(overflows) if flag)
            assert self._plan.capacities is not None
            most = self._plan.capacities[place]
            return f"strided layer {place + 1} reaches more than {most} sites", counts
        return None, counts
