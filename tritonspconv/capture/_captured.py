"""``capture``: a network over sparse tensors as CUDA graphs, with new coordinates at every call."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Module

from tritonspconv import nn
from tritonspconv.arguments import whole_number, whole_numbers
from tritonspconv.capture._buckets import Bucket, GraphedBucket, PaddedBucket, Problem
from tritonspconv.capture._inputs import RowInputs, Signature
from tritonspconv.capture._program import GraphMemory
from tritonspconv.capture._state import (
    Addresses,
    Aliases,
    changing_buffers,
    modes,
    rehearsal,
    without_autocast_cache,
)
from tritonspconv.capture._tree import leaves
from tritonspconv.coords import Grid
from tritonspconv.coords.row_tensor import RowBounds, plain
from tritonspconv.coords.site_plan import SitePlan
from tritonspconv.guide import more
from tritonspconv.kernels.compile_ahead import maps_only

Rows = Literal["cut", "padded"]
Overflow = Literal["eager", "raise"]
Box = tuple[Sequence[int], Sequence[int]]


class CaptureOverflow(RuntimeError):
    """A call does not fit the capacities of a captured function."""


def capture(
    function: Callable[..., Any],
    *args: Any,
    coords: str | int | None = None,
    reads: Sequence[str] | None = None,
    capacities: Sequence[int] | None = None,
    headroom: float = 1.25,
    box: Box | None = None,
    rows: Rows = "cut",
    on_overflow: Overflow = "eager",
    modules: Sequence[Module] | None = None,
    optimize: bool = True,
    compile_processes: int = 0,
    **kwargs: Any,
) -> Captured:
    """Capture a network, or a function over sparse tensors, as CUDA graphs.

    A graph runs all kernels of the network without the host in between. Ordinary CUDA graphs have
    fixed shapes; here coordinates and the number of voxels may differ at every call, up to a
    capacity. The function runs once on the example to find out how many sites each strided layer
    makes. On a CPU the function runs on padded rows without a graph, with equal results.

    Args:
        function: A module, a bound ``forward``, or any function. It may take and return nested
            dicts, lists and tuples of tensors and sparse tensors.
        args: Arguments of an example call. Its sizes decide the capacities of inner levels.
        coords: Key, argument name or place of the int32 coordinates ``[N, 1 + D]``, batch index
            first; None: those of the sparse tensor among the arguments. Every argument with N rows
            is padded along with the coordinates.
        reads: Keys or argument names that the function reads, among entries of dicts; None: all.
            Other entries may hold anything, and go into the result as they are.
        capacities: Largest numbers of input rows, one graph each; a call takes the smallest that
            fits. Default: 1.25 times the example's.
        headroom: How many more sites than in the example, in proportion to the input rows, a
            strided layer may make.
        box: Lower and upper corner of the coordinates, both inclusive, batch index left out. It is
            for tensors that find their grid in their coordinates, as MinkowskiEngine's do.
            Default: the box of the example, which grows by half its extent on every side if an
            index of it takes little memory, and by less otherwise. A call with coordinates outside
            does not fit.
        rows: ``"cut"``: results hold real rows only. ``"padded"``: results are row tensors, with
            their count on the device. The host waits for the graph in either case.
        on_overflow: What happens to a call with more rows than the largest capacity, more sites
            than a layer's capacity, repeated coordinates, coordinates outside the box, or a global
            pool of other samples than the example's: ``"eager"`` runs the function in the ordinary
            way; ``"raise"`` raises :class:`CaptureOverflow`.
        modules: Modules whose parameters get gradients and whose buffers a call may change.
            Default: ``function``, or the module that it is a method of.
        optimize: Call :func:`tritonspconv.optimize` on the modules, which stay optimised: blocks
            that are written by hand then take fewer kernels.
        compile_processes: Number of processes that compile kernels in parallel before a graph is
            captured; below 2, kernels compile one after the other as they are launched. Other
            threads must not launch kernels of this package during the capture then. Not yet
            measured on a GPU.
        kwargs: Keyword arguments of the example call.

    Returns:
        A callable that takes what ``function`` takes.

    Raises:
        RowwiseError: The function does something to rows that would count the padding.
        RuntimeError: The function reads values on the host.
        ValueError: An option is wrong, or the coordinates are not found.
    """
    check_options(rows, on_overflow, headroom, capacities, compile_processes)
    modules = _modules_of(function) if modules is None else list(modules)
    if optimize:
        for module in modules:
            nn.optimize(module)
    return Captured(
        function, (args, kwargs), coords=coords, reads=reads, capacities=capacities,
        headroom=headroom, box=box, rows=rows, on_overflow=on_overflow, modules=modules,
        compile_processes=compile_processes,
    )  # fmt: skip


class Captured:
    """A captured function; see :func:`capture`.

    Attributes:
        function: The function as it was.
        eager_calls: How many calls ran eagerly, by reason.
        replays: How many calls a graph answered.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        example: tuple[tuple[Any, ...], dict[str, Any]],
        *,
        coords: str | int | None,
        reads: Sequence[str] | None,
        capacities: Sequence[int] | None,
        headroom: float,
        box: Box | None,
        rows: Rows,
        on_overflow: Overflow,
        modules: Sequence[Module],
        compile_processes: int,
    ) -> None:
        # A user may replace a module's ``forward`` by this object.
        self.function = function.forward if isinstance(function, Module) else function
        self.eager_calls: Counter[str] = Counter()
        self.replays = 0
        self._cut, self._on_overflow = rows == "cut", on_overflow
        self._modules, self._compile_processes = list(modules), compile_processes
        self._signature = Signature.of(example, coords, None if reads is None else tuple(reads))
        found = leaves(example)
        self._device = plain(found[self._signature.coords]).device
        self._aliases = Aliases(self._modules)
        self._problem = self._describe(example, found)
        self._modes = modes(self._device, self._modules)
        self._addresses = Addresses(self._modules)
        self._buckets = self._capture(found, capacities, headroom, box)

    def _describe(self, example: Any, found: dict[str, Any]) -> Problem:
        is_trained = torch.is_grad_enabled()
        parameters: list[Tensor] = []
        if is_trained:
            found_parameters = (p for m in self._modules for p in m.parameters())
            parameters = [p for p in found_parameters if p.requires_grad]
        needs_grad = frozenset(
            path
            for path, kind in self._signature.kinds.items()
            if kind == "rows" and is_trained and found[path].requires_grad
        )
        return Problem(
            self.function, self._signature.without_data(example), self._signature, parameters,
            self._aliases.of(parameters), needs_grad, changing_buffers(self._modules),
        )  # fmt: skip

    def _capture(
        self,
        found: dict[str, Any],
        capacities: Sequence[int] | None,
        headroom: float,
        box: Box | None,
    ) -> list[Bucket]:
        problem, n = self._problem, found[self._signature.coords].shape[0]
        if n == 0:
            raise ValueError("capture: the example must have at least one row; got 0.")
        with (
            rehearsal(self._modules),
            without_autocast_cache(),
            torch.no_grad(),
            maps_only(self._device) if self._compile_processes > 1 else nullcontext(),
        ):
            recorded = SitePlan(None, self._device)
            recorded.grid = None if box is None else _grid_of(box)
            inputs = RowInputs(
                problem.template, self._signature,
                {p: plain(found[p]) for p, k in self._signature.kinds.items() if k in _TENSORS},
                RowBounds(None, recorded),
            )  # fmt: skip
            args, kwargs = inputs.arguments
            self.function(*args, **kwargs)
        sizes = capacities or [math.ceil(1.25 * n)]
        graphs = None
        if self._device.type == "cuda":
            pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
            graphs = GraphMemory(pool, stream, self._compile_processes)
        buckets: list[Bucket] = []
        # The largest graph comes first, so that smaller graphs reuse its memory.
        for capacity in sorted(set(sizes), reverse=True):
            plan = recorded.bounded(
                [max(math.ceil(size / n * capacity * headroom), 1) for size in recorded.sizes]
            )
            with rehearsal(self._modules), without_autocast_cache(), self._aliases.in_place():
                buckets.append(self._bucket(problem, capacity, plan, found, graphs))
        return buckets[::-1]

    def _bucket(
        self,
        problem: Problem,
        capacity: int,
        plan: SitePlan,
        example: dict[str, Any],
        graphs: GraphMemory | None,
    ) -> Bucket:
        if graphs is None:
            return PaddedBucket(problem, capacity, plan)
        return GraphedBucket(problem, capacity, plan, example, graphs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a call by a graph if it fits, and otherwise as ``on_overflow`` says."""
        call = leaves((args, kwargs))
        n = self._signature.check(call)
        self._check_modes()
        bucket = next((bucket for bucket in self._buckets if n <= bucket.capacity), None)
        if bucket is None:
            reason = f"rows are more than the largest capacity, {self._buckets[-1].capacity}"
            return self._overflow(reason, args, kwargs, details=f"{n} {reason}")
        reason, result = bucket.run(call, n, cut=self._cut, meanwhile=self._check_addresses)
        if reason is not None:
            return self._overflow(reason, args, kwargs, details=reason)
        self.replays += 1
        return result

    def _overflow(
        self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any], details: str
    ) -> Any:
        """Answer a call that does not fit; one of few reasons is counted, and details are told."""
        text = f"captured function: {details}"
        if self._on_overflow == "raise":
            raise CaptureOverflow(
                f"{text}. Capture it with larger capacities or headroom." + more("over-capacity")
            )
        if not self.eager_calls:
            warnings.warn(
                f"{text}; the call runs eagerly. Capture the function with larger capacities or "
                "headroom if this happens often; `eager_calls` counts it." + more("over-capacity"),
                RuntimeWarning,
                stacklevel=3,
            )
        self.eager_calls[reason] += 1
        return self._run_eagerly(args, kwargs)

    def _run_eagerly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.function(*args, **kwargs)

    def _check_modes(self) -> None:
        now = modes(self._device, self._modules)
        if now != self._modes:
            names = "gradients", "autocast", "its dtype", *("training" for _ in self._modules)
            raise RuntimeError(
                "captured function: gradients, autocast and train / eval mode must be as at the "
                f"capture, {dict(zip(names, self._modes, strict=True))}; got "
                f"{dict(zip(names, now, strict=True))}. Capture the function again in this mode."
                + more("capture-again")
            )

    def _check_addresses(self) -> None:
        if not self._addresses.hold():
            raise RuntimeError(
                "captured function: a parameter or buffer has moved to other memory since the "
                "capture, as .half(), .to() and load_state_dict(assign=True) do. The graph would "
                "go on with the old one. Capture the function again." + more("capture-again")
            )


_TENSORS = ("coords", "rows", "fixed")


def _grid_of(box: Box) -> Grid:
    """Return the unbounded grid of a box.

    Raises:
        TypeError: A corner has other than whole numbers.
        ValueError: The corners are no box.
    """
    lower, upper = (whole_numbers("capture: box", corner) for corner in box)
    if len(lower) != len(upper) or any(lo > hi for lo, hi in zip(lower, upper, strict=True)):
        raise ValueError(
            "capture: box must be a lower and an upper corner of as many axes, both inclusive; got "
            f"{box}."
        )
    shape = tuple(hi - lo + 1 for lo, hi in zip(lower, upper, strict=True))
    return Grid(lower, shape, 1, bounded=False)


def _modules_of(function: Callable[..., Any]) -> list[Module]:
    owner = function if isinstance(function, Module) else getattr(function, "__self__", None)
    return [owner] if isinstance(owner, Module) else []


def check_options(
    rows: str,
    on_overflow: str,
    headroom: float,
    capacities: Sequence[int] | None,
    compile_processes: int,
) -> None:
    """Check the options of a capture.

    Raises:
        TypeError: The number of processes is no whole number.
        ValueError: One of them is wrong.
    """
    whole_number("capture: compile_processes", compile_processes, least=0)
    if rows not in get_args(Rows):
        raise ValueError(f"capture: rows must be one of {get_args(Rows)}; got {rows!r}.")
    if on_overflow not in get_args(Overflow):
        raise ValueError(
            f"capture: on_overflow must be one of {get_args(Overflow)}; got {on_overflow!r}."
        )
    if not headroom >= 1:
        raise ValueError(f"capture: headroom must be at least 1; got {headroom}.")
    if capacities is not None and (not capacities or min(capacities) < 1):
        raise ValueError(
            f"capture: capacities must be one or more positive numbers; got {list(capacities)}."
        )
