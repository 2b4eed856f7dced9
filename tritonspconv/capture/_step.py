"""``capture_step``: forward, loss, backward and optimiser of a training step as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from tritonspconv import nn
from tritonspconv.capture._buckets import Bucket, Problem, StaticRun, run_padded
from tritonspconv.capture._captured import Box, Captured, Overflow, check_options
from tritonspconv.capture._program import GraphMemory, Program, warm_up
from tritonspconv.capture._state import Saved
from tritonspconv.coords.row_tensor import plain
from tritonspconv.coords.site_plan import SitePlan


def capture_step(
    loss_function: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    *args: Any,
    modules: Sequence[Module],
    coords: str | int | None = None,
    reads: Sequence[str] | None = None,
    capacities: Sequence[int] | None = None,
    headroom: float = 1.25,
    box: Box | None = None,
    on_overflow: Overflow = "eager",
    optimize: bool = True,
    compile_processes: int = 0,
    **kwargs: Any,
) -> CapturedStep:
    """Capture a whole training step: forward, loss, backward and the optimiser's step.

    One graph computes the gradients. The host then reads whether everything fitted, and a second
    graph lets the optimiser use them, so that a step that did not fit changes nothing before it
    runs eagerly.

    Args:
        loss_function: Takes the arguments of a step; returns the loss, a scalar.
        optimizer: Steps the parameters of ``modules``. Adam and AdamW need ``capturable=True``.
        args: Arguments of an example step. The capture changes neither parameters nor statistics.
        modules: The modules that are trained.
        coords: As for :func:`tritonspconv.capture`, like the arguments that follow.
        reads: Entries of dicts that the function reads; None: all.
        capacities: Largest numbers of input rows.
        headroom: Room for more sites of strided layers.
        box: Box of the coordinates.
        on_overflow: The answer to a step that does not fit.
        optimize: Call :func:`tritonspconv.optimize` on the modules, which stay optimised.
        compile_processes: Number of processes that compile kernels before the capture.
        kwargs: Keyword arguments of the example step.

    Returns:
        A callable that takes the arguments of ``loss_function``, does one step and returns the
        loss, without a graph. ``parameter.grad`` holds the step's gradients afterwards.

    Raises:
        ValueError: The optimiser cannot be captured, or an option is wrong.
        RowwiseError: The function does something to rows that would count the padding.

    A learning rate that is a number is part of the graph: after it changes, the optimiser's graph
    is captured again, which takes some milliseconds. A schedule that changes it at every step
    should keep it in a tensor.
    """
    check_options("cut", on_overflow, headroom, capacities, compile_processes)
    for group in optimizer.param_groups:
        if group.get("capturable") is False:
            raise ValueError(
                f"capture_step: {type(optimizer).__name__} counts its steps on the host; pass "
                "capturable=True to its constructor."
            )
    if optimize:
        for module in modules:
            nn.optimize(module)
    return CapturedStep(
        loss_function, (args, kwargs), optimizer, coords=coords, reads=reads,
        capacities=capacities, headroom=headroom, box=box, rows="cut", on_overflow=on_overflow,
        modules=modules, compile_processes=compile_processes,
    )  # fmt: skip


class CapturedStep(Captured):
    """A captured training step; see :func:`capture_step`."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        example: tuple[tuple[Any, ...], dict[str, Any]],
        optimizer: torch.optim.Optimizer,
        **options: Any,
    ) -> None:
        self._optimizer = optimizer
        with torch.enable_grad():
            super().__init__(function, example, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do one training step; return the loss."""
        with torch.enable_grad():
            return super().__call__(*args, **kwargs)

    def _bucket(
        self,
        problem: Problem,
        capacity: int,
        plan: SitePlan,
        example: dict[str, Any],
        graphs: GraphMemory | None,
    ) -> Bucket:
        # The arguments get no gradients.
        problem = problem._replace(needs_grad=frozenset())
        if graphs is None:
            return _PaddedStep(problem, capacity, plan, self._optimizer)
        return _GraphedStep(problem, capacity, plan, example, self._optimizer, graphs)

    def _run_eagerly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.function(*args, **kwargs)
        loss.backward()
        self._optimizer.step()
        return loss.detach()


class _PaddedStep:
    """A training step on padded rows, without a graph."""

    def __init__(
        self,
        problem: Problem,
        capacity: int,
        plan: SitePlan,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.capacity = capacity
        self._problem, self._plan, self._optimizer = problem, plan, optimizer

    def run(
        self, call: dict[str, Any], n: int, *, cut: bool, meanwhile: Callable[[], None]
    ) -> tuple[str | None, Any]:
        """Do one step; see :class:`Bucket`."""
        meanwhile()
        self._optimizer.zero_grad(set_to_none=True)
        reason, loss = run_padded(self._problem, self.capacity, self._plan, call, n, cut=cut)
        if reason is not None:
            return reason, None
        loss.backward()
        self._optimizer.step()
        return None, loss.detach()


class _GraphedStep:
    """One graph for the gradients, and one for the optimiser."""

    def __init__(
        self,
        problem: Problem,
        capacity: int,
        plan: SitePlan,
        example: dict[str, Any],
        optimizer: torch.optim.Optimizer,
        graphs: GraphMemory,
    ) -> None:
        self.capacity = capacity
        self._problem, self._optimizer, self._graphs = problem, optimizer, graphs
        self._run = StaticRun(problem, capacity, plan, example)
        unchanged = Saved(problem.buffers)
        warm_up(self._gradients, graphs.stream, graphs.compile_processes)
        unchanged.restore()
        self._compute = Program(self._gradients, graphs)
        self._grads = [alias.grad for alias in problem.aliases]
        for grad in self._grads:
            if grad is not None:
                grad.zero_()
        self._hand_over_gradients()
        self._step, self._settings = self._capture_optimizer(), self._current_settings()

    def _gradients(self) -> Tensor:
        for alias in self._problem.aliases:
            alias.grad = None
        loss = plain(self._run.work().tree)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(
                "capture_step: the loss function must return a tensor with one element; got "
                f"{list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}."
            )
        loss.backward()
        return loss.detach()

    def _hand_over_gradients(self) -> None:
        for parameter, grad in zip(self._problem.parameters, self._grads, strict=True):
            parameter.grad = grad

    def _capture_optimizer(self) -> Program[Any]:
        optimizer = self._optimizer
        parameters = Saved(self._problem.parameters)
        known = {id(t) for t in _state_tensors(optimizer)}
        state = Saved(_state_tensors(optimizer))
        warm_up(optimizer.step, self._graphs.stream)
        parameters.restore()
        state.restore()
        with torch.no_grad():
            for tensor in _state_tensors(optimizer):
                if id(tensor) not in known:
                    tensor.zero_()
        return Program(optimizer.step, self._graphs)

    def _current_settings(self) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in group.items() if name != "params"}
            for group in self._optimizer.param_groups
        ]

    def run(
        self, call: dict[str, Any], n: int, *, cut: bool, meanwhile: Callable[[], None]
    ) -> tuple[str | None, Any]:
        """Do one step; see :class:`Bucket`."""
        del cut
        self._run.buffers.load(call, n)
        self._hand_over_gradients()
        if self._current_settings() != self._settings:
            self._step, self._settings = self._capture_optimizer(), self._current_settings()
        loss = self._compute.run()
        meanwhile()
        reason, _ = self._run.read()
        if reason is not None:
            return reason, None
        self._step.run()
        return None, loss.clone()


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors that an optimiser keeps for its parameters."""
    return [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
