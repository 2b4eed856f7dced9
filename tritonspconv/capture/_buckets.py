"""One capacity of a captured function: as CUDA graphs, or on a CPU without a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tritonspconv.capture._inputs import RowInputs, Signature, StaticBuffers, padded
from tritonspconv.capture._program import GraphMemory, Program, warm_up
from tritonspconv.capture._results import Outputs, Status
from tritonspconv.capture._state import Saved
from tritonspconv.coords.row_tensor import RowBounds, plain
from tritonspconv.coords.site_plan import SitePlan


class Problem(NamedTuple):
    """The function and the arguments that buckets of every capacity share.

    Attributes:
        function: The function to capture.
        template: The arguments ``(args, kwargs)`` of the example, without their data.
        signature: Their description.
        parameters: The parameters whose gradients are wanted; may be empty.
        aliases: Tensors that stand for the parameters while the function is captured.
        needs_grad: Paths of the argument rows that need gradients.
        buffers: The modules' buffers, which a run may change.
    """

    function: Callable[..., Any]
    template: Any
    signature: Signature
    parameters: list[Tensor]
    aliases: list[Tensor]
    needs_grad: frozenset[str]
    buffers: list[Tensor]

    @property
    def wants_gradients(self) -> bool:
        """True: results are differentiated."""
        return bool(self.parameters or self.needs_grad)


class Bucket(Protocol):
    """Answers calls of up to ``capacity`` rows."""

    capacity: int

    def run(
        self, call: dict[str, Any], n: int, *, cut: bool, meanwhile: Callable[[], None]
    ) -> tuple[str | None, Any]:
        """Answer a call.

        Args:
            call: Leaves of its arguments by path.
            n: Number of its rows.
            cut: Leave padding out of the result.
            meanwhile: A function that the host calls while the device works; it may raise.

        Returns:
            The reason why there is no result, or None; and the result.
        """
        ...


class PaddedBucket:
    """Runs a function on padded rows, without a graph; for CPUs.

    Args:
        problem: The function and its arguments.
        capacity: Rows of the arguments.
        plan: Rows of each set of output sites.
    """

    def __init__(self, problem: Problem, capacity: int, plan: SitePlan) -> None:
        self.capacity = capacity
        self._problem, self._plan = problem, plan

    def run(
        self, call: dict[str, Any], n: int, *, cut: bool, meanwhile: Callable[[], None]
    ) -> tuple[str | None, Any]:
        """Run the function; see :class:`Bucket`."""
        meanwhile()
        return run_padded(self._problem, self.capacity, self._plan, call, n, cut=cut)


def run_padded(
    problem: Problem,
    capacity: int,
    plan: SitePlan,
    call: dict[str, Any],
    n: int,
    *,
    cut: bool,
) -> tuple[str | None, Any]:
    """Run a function on rows that are padded to ``capacity``; arguments as for :class:`Bucket`."""
    status = Status(plan)
    bounds = RowBounds(torch.tensor(n, device=plan.flags.device), plan)
    before = Saved(problem.buffers)
    outputs = run_bounded(problem, padded(problem.signature, call, capacity), bounds, status)
    reason, counts = status.read()
    if reason is not None:
        before.restore()
        return reason, None
    return None, outputs.rebuilt(call, outputs.tensors(), counts if cut else None)


def run_bounded(
    problem: Problem, tensors: dict[str, Tensor], bounds: RowBounds, status: Status
) -> Outputs:
    """Run the function on padded rows and write how the run went; part of every graph.

    Args:
        problem: The function and its arguments.
        tensors: The padded tensors among the arguments, by path.
        bounds: How many rows are real, and the plan of the run.
        status: Flags and counts, which are copied to the host.
    """
    bounds.plan.start()
    inputs = RowInputs(problem.template, problem.signature, tensors, bounds)
    outputs = Outputs.of(problem.function, inputs)
    bounds.plan.finish()
    status.write(outputs.counts())
    return outputs


class StaticRun:
    """A run of the function on static memory, to be captured in a graph.

    Args:
        problem: The function and its arguments.
        capacity: Rows of the arguments.
        plan: Rows of each set of output sites.
        example: Leaves of the example's arguments by path; the memory is filled with them.

    Attributes:
        buffers: The arguments.
    """

    def __init__(
        self, problem: Problem, capacity: int, plan: SitePlan, example: dict[str, Any]
    ) -> None:
        self.buffers = StaticBuffers(example, problem.signature, capacity, problem.needs_grad)
        self._problem, self._plan = problem, plan
        self._status, self._before = Status(plan), Saved(problem.buffers)

    def work(self) -> Outputs:
        """Run the function; part of the graph."""
        self._before.update()
        bounds = RowBounds(self.buffers.count, self._plan)
        return run_bounded(self._problem, self.buffers.tensors, bounds, self._status)

    def read(self) -> tuple[str | None, dict[int, int]]:
        """Wait for the run; see :meth:`Status.read`. A failed run leaves the modules unchanged."""
        reason, counts = self._status.read()
        if reason is not None:
            self._before.restore()
        return reason, counts


class GraphedBucket:
    """Replays CUDA graphs of a function: one forward, and one backward where gradients are wanted.

    Args:
        problem: The function and its arguments.
        capacity: Rows of the arguments.
        plan: Rows of each set of output sites.
        example: Leaves of the example's arguments by path.
        graphs: Memory and stream of all graphs of the captured function.
    """

    def __init__(
        self,
        problem: Problem,
        capacity: int,
        plan: SitePlan,
        example: dict[str, Any],
        graphs: GraphMemory,
    ) -> None:
        self.capacity = capacity
        self._problem = problem
        self._run = StaticRun(problem, capacity, plan, example)
        self.generation = 0
        self._differentiable: dict[str, Tensor] = {}
        self._grads: list[Tensor] = []
        # Forward and backward run together. Kernel maps make some of their forms once, in the
        # backward pass, and the graph of the backward pass has to contain this work.
        unchanged = Saved(problem.buffers)
        warm_up(
            lambda: self._differentiate(self._run.work()), graphs.stream, graphs.compile_processes
        )
        unchanged.restore()
        self._forward = Program(self._run.work, graphs)
        outputs = self._forward.result
        self._differentiable = self._results_with_gradient(outputs)
        self._grads = [torch.zeros_like(value) for value in self._differentiable.values()]
        self._backward = (
            Program(lambda: self._differentiate(outputs, self._grads), graphs)
            if self._differentiable
            else None
        )

    def _sources(self) -> list[Tensor]:
        return [self._run.buffers.tensors[path] for path in sorted(self._problem.needs_grad)]

    def _results_with_gradient(self, outputs: Outputs) -> dict[str, Tensor]:
        if not self._problem.wants_gradients:
            return {}
        made = {path: plain(value) for path, value in outputs.tensors().items()}
        return {path: value for path, value in made.items() if value.requires_grad}

    def _differentiate(
        self, outputs: Outputs, grads: list[Tensor] | None = None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of rows and parameters; ``grads`` default to zeros."""
        results = list(self._results_with_gradient(outputs).values())
        if not results:
            return ()
        if grads is None:
            grads = [torch.zeros_like(value) for value in results]
        wanted = [*self._sources(), *self._problem.aliases]
        return torch.autograd.grad(results, wanted, grads, allow_unused=True)

    def run(
        self, call: dict[str, Any], n: int, *, cut: bool, meanwhile: Callable[[], None]
    ) -> tuple[str | None, Any]:
        """Replay the graph; see :class:`Bucket`. The result has memory of its own."""
        self._run.buffers.load(call, n)
        if self._backward is not None and torch.is_grad_enabled():
            sources = [call[path] for path in sorted(self._problem.needs_grad)]
            made = _Replay.apply(self, n, *sources, *self._problem.parameters)
            tensors = dict(zip(self._differentiable, made, strict=True))
        else:
            self.replay()
            tensors = {}
        outputs = self._forward.result
        for path, value in outputs.tensors().items():
            if path not in tensors:
                tensors[path] = plain(value).detach().clone()
        meanwhile()
        reason, counts = self._run.read()
        if reason is not None:
            return reason, None
        return None, outputs.rebuilt(call, tensors, counts if cut else None)

    def replay(self) -> list[Tensor]:
        """Run forward; return copies of the differentiable results."""
        self.generation += 1
        self._forward.run()
        return [value.detach().clone() for value in self._differentiable.values()]

    def replay_backward(self, grads: tuple[Tensor | None, ...], n: int) -> list[Tensor | None]:
        """Run backward; return copies of the gradients of the rows and the parameters."""
        assert self._backward is not None
        for static, grad in zip(self._grads, grads, strict=True):
            if grad is None:
                static.zero_()
            else:
                static.copy_(grad)
        found = self._backward.run()
        rows = len(self._problem.needs_grad)
        return [
            None if grad is None else (grad[:n] if place < rows else grad).clone()
            for place, grad in enumerate(found)
        ]


class _Replay(torch.autograd.Function):
    """The forward graph of a bucket; the gradient is its backward graph."""

    @staticmethod
    def forward(ctx: Any, bucket: GraphedBucket, n: int, *_sources: Tensor) -> Any:
        made = tuple(bucket.replay())
        ctx.bucket, ctx.n, ctx.generation = bucket, n, bucket.generation
        return made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        bucket: GraphedBucket = ctx.bucket
        if bucket.generation != ctx.generation:
            raise RuntimeError(
                "captured function: it was called again with this capacity before the gradients of "
                "the earlier call were computed, which overwrote what they need. Call backward "
                "first, or capture the function twice."
            )
        return None, None, *bucket.replay_backward(grads, ctx.n)
