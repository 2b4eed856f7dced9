"""Runs of a network for an export: to measure levels, to record, to compare."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from tritonspconv.capture._inputs import RowInputs, Signature, padded
from tritonspconv.capture._tree import is_guarded, map_tree
from tritonspconv.coords import Grid
from tritonspconv.coords.row_tensor import RowBounds, RowwiseError
from tritonspconv.export._outputs import Mismatch, as_plain, check_equal
from tritonspconv.export._plan import RecordedPlan
from tritonspconv.export._recorder import HostReads, Recorder, RecordError
from tritonspconv.guide import more, without_more


class ExportError(RuntimeError):
    """A network cannot be exported, or its program would not give the network's results."""

    def __init__(self, message: str) -> None:
        super().__init__(without_more(message) + more("export-program"))


class Network(NamedTuple):
    """A network and its example.

    Attributes:
        model: The network.
        example: Its arguments ``(args, kwargs)``.
        signature: Their description.
        found: The leaves of the arguments by path; rows are plain tensors.
        grid: The grid of tensors that have none of their own.
    """

    model: Module
    example: Any
    signature: Signature
    found: dict[str, Any]
    grid: Grid

    @property
    def rows(self) -> int:
        """Number of rows of the example."""
        return self.found[self.signature.coords].shape[0]

    def inputs(self, rows: int, capacity: int) -> dict[str, Tensor]:
        """Return the inputs of a program for the example's first ``rows`` rows, by path."""
        tensors = padded(self.signature, self._first(rows), capacity)
        device = tensors[self.signature.coords].device
        return {**tensors, "count": torch.tensor(rows, device=device)}

    def _first(self, rows: int) -> dict[str, Any]:
        kinds = self.signature.kinds
        return {
            path: value[:rows] if kinds[path] in ("rows", "coords") else value
            for path, value in self.found.items()
        }

    def measure(self) -> list[int]:
        """Run the network on the example; return the number of sites of each level."""
        device = self.found[self.signature.coords].device
        plan = RecordedPlan(None, self.grid, device)
        with self._naming_modules():
            self._run(self.inputs(self.rows, self.rows), plan)
        return plan.sizes

    def record(
        self, inputs: dict[str, Tensor], level_capacities: Sequence[int]
    ) -> torch.fx.GraphModule:
        """Run the network on padded rows; return the graph of the run."""
        recorder = Recorder(self.model)
        for name, tensor in zip(_names(inputs), inputs.values(), strict=True):
            recorder.input(name, tensor)
        device = inputs["count"].device
        plan = RecordedPlan(level_capacities, self.grid, device, recorder.alias)
        with self._naming_modules(), HostReads(recorder), recorder:
            outputs = self._run(inputs, plan)
        return recorder.finish(outputs)

    def _run(self, inputs: dict[str, Tensor], plan: RecordedPlan) -> tuple[Any, Tensor]:
        """Run the network on padded rows; return its outputs and the faults."""
        tensors, count = dict(inputs), inputs["count"]
        capacity = tensors[self.signature.coords].shape[0]
        is_real = torch.arange(capacity, device=count.device) < count
        for path, kind in self.signature.kinds.items():
            x = tensors.get(path)
            if x is not None and kind in ("rows", "coords"):
                mask = is_real.reshape(-1, *(1,) * (x.ndim - 1))
                tensors[path] = torch.where(mask, x, -1 if kind == "coords" else 0)
        bounds = RowBounds(count.clamp(0, capacity), plan)
        rows = RowInputs(self.example, self.signature, tensors, bounds)
        args, kwargs = rows.arguments
        held = {key for key, (_, value) in rows.given.items() if not is_guarded(value)}
        outputs = as_plain(self.model(*args, **kwargs), held)
        beyond = (count - capacity).clamp(min=0) + (-count).clamp(min=0)
        return outputs, torch.stack([beyond, *plan.faults()])

    def compare(self, program: torch.export.ExportedProgram, rows: int, capacity: int) -> None:
        """Compare program and network on the example's first ``rows`` rows.

        Raises:
            ExportError: The results differ.
        """
        outputs, faults = program.module()(*self.inputs(rows, capacity).values())
        if bool(faults.any()):
            raise ExportError(
                "export_program: the example does not fit its own program; the faults are "
                f"{faults.tolist()}: rows beyond the capacity, rows outside the grid, repeated "
                "rows, and sites that each level lacks room for. Pass distinct rows inside the "
                "grid, or larger capacities."
            )
        call = self._first(rows)
        given: set[int] = set()

        def leaf(path: str, value: Any) -> Any:
            value = call[path] if isinstance(call[path], Tensor) else value
            if not is_guarded(value):
                given.add(id(value))
            return value

        args, kwargs = map_tree(self.example, leaf)
        expected = as_plain(self.model(*args, **kwargs), given)
        try:
            check_equal(outputs, expected)
        except Mismatch as error:
            raise ExportError(
                f"export_program: the program gives other results than the network: {error}. "
                "The network may do something that depends on the scan, which the program repeats "
                "as it was for the example."
            ) from error

    @contextmanager
    def _naming_modules(self) -> Iterator[None]:
        """Name the module in which a run fails."""
        try:
            yield
        except (RecordError, RowwiseError, Mismatch, NotImplementedError) as error:
            name = _module_of(error.__traceback__, self.model)
            reason = without_more(str(error)).rstrip(".")
            raise ExportError(f"export_program: {name} cannot be exported: {reason}.") from error


def _names(inputs: dict[str, Tensor]) -> list[str]:
    """Return a name for each input: the end of its path, with a number if two names are equal."""
    made: list[str] = []
    for path in inputs:
        words = re.findall(r"[A-Za-z_]\w*", path)
        name = words[-1] if words else f"input_{len(made)}"
        made.append(name if name not in made else f"{name}_{len(made)}")
    return made


def _module_of(traceback: TracebackType | None, model: Module) -> str:
    """Return path and class of the innermost module whose code a traceback went through."""
    names = {id(module): name for name, module in model.named_modules()}
    found = model
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, Module) and id(owner) in names:
            found = owner
        traceback = traceback.tb_next
    kind = type(found).__name__
    return (
        f"the module {names[id(found)]!r} ({kind})" if names[id(found)] else f"the model ({kind})"
    )
