"""SitePlan: facts about a network's coordinates that the host needs, fixed before the network runs.

A CUDA graph has fixed shapes, and the host reads nothing while it runs. The number of output sites
of a strided layer depends on the coordinates, so a captured network gives each set of sites a fixed
capacity, and the number of real rows stays on the device. Rows behind that number are padding; see
"Bounded sites" in the architecture page. Other facts, such as the box around the coordinates, are
those of an example; a run for which they do not hold is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Report(IntEnum):
    """A reason not to use a result, besides too many sites; its value is its place in the flags."""

    REPEATS = 0
    OUTSIDE = 1
    SAMPLES = 2


class MapBuilder(Protocol):
    """Builds sites and maps in place of the kernels; the host reads no values.

    The engine's kernels on a CPU count sites on the host. A run that is recorded must not do that:
    the record would hold the numbers of one scan.
    """

    def inspect(self, sites: Any) -> None:
        """Let the run report rows of ``ActiveSites`` that repeat or lie outside the grid."""
        ...

    def make_sites(
        self, sites: Any, offsets: Any, stride: tuple[int, ...], divide: bool, grid: Any
    ) -> Any:
        """Return the ``ActiveSites`` that a window reaches; see ``kernels.sites.reached_sites``."""
        ...

    def relate(self, geometry: Any, sites: Any, out_sites: Any) -> Any:
        """Return the ``Relation`` of a geometry between two ``ActiveSites``."""
        ...


class SitePlan:
    """The capacities of the site sets that one network makes, and the facts that its host asks for.

    A plan without capacities only records: run a network once with such a plan, derive the
    capacities from :attr:`sizes`, and make the plan of later runs by :meth:`bounded`.

    Args:
        capacities: Rows of each site set, in the order in which the network makes them; None:
            record.
        device: Device of the flags.

    Attributes:
        sizes: Number of sites of each set that was recorded.
        facts: Answers to the questions of the host about the coordinates, in order; see
            :meth:`recall`.
        is_running: True while a run has begun and not ended.
        flags: int32 [number of reports + number of capacities]: one for each :class:`Report`, and
            then one for each set of sites, which is set if that set needed more rows than its
            capacity.
        builder: Builds sites and maps; None: the kernels do.
        rules: Rules of row tensors that hold in this run, before those that always hold.
        on_alias: Called with a tensor and a row tensor, or the reverse, whenever one is made on the
            memory of the other; None: no call.
        grid: The ``Grid``, in input units, of tensors whose grid is otherwise the box around their
            coordinates; None: the box of the example with a margin. See ``Grid.around``.
        show_rows: A function ``(tensor, bounds)`` that makes the row tensors that user code sees.
            None: :func:`tritonspconv.coords.row_tensor.as_rows` makes them. A recorder of the
            export sets it.
    """

    builder: MapBuilder | None = None
    rules: Mapping[Callable[..., Any], Callable[..., Any]] = MappingProxyType({})
    on_alias: Callable[[Tensor, Tensor], None] | None = None
    grid: Any = None
    show_rows: Callable[[Tensor, Any], Any] | None = None

    def __init__(
        self, capacities: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.capacities = None if capacities is None else tuple(capacities)
        self.sizes: list[int] = []
        self.facts: list[Any] = []
        # Every flag is aligned to 16 bytes, so that kernels compile once for all of them.
        flags = torch.zeros(
            len(Report) + len(capacities or ()), 4, dtype=torch.int32, device=device
        )
        self.flags = flags[:, 0]
        self._reports: list[tuple[Report, Tensor]] = []
        self._constants: dict[tuple[Any, ...], Tensor] = {}
        self._next = self._next_fact = 0
        self.is_running = self.records

    def bounded(self, capacities: Sequence[int]) -> SitePlan:
        """Return a plan with these capacities and the facts that this plan recorded."""
        made = SitePlan(capacities, self.flags.device)
        made.facts, made.grid = self.facts, self.grid
        return made

    @property
    def records(self) -> bool:
        """True: the plan records sizes and facts, and sites are not bounded."""
        return self.capacities is None

    def record(self, size: int) -> None:
        """Note how many sites the next set has."""
        self.sizes.append(size)

    def take(self) -> tuple[int, Tensor]:
        """Return the capacity of the next set of sites, and the int32 [] flag for too many of them.

        Raises:
            RuntimeError: The network makes more sets of sites than the plan has capacities.
        """
        place = self._next
        if self.capacities is None or place >= len(self.capacities):
            raise _other_branches("sets of output sites", place)
        self._next = place + 1
        return self.capacities[place], self.flags[len(Report) + place]

    def recall(self, ask: Callable[[], T], assumed: T | None = None) -> T:
        """Return a fact about the example's coordinates that the host needs.

        Args:
            ask: Reads the answer from the device. It is called while the plan records; later runs
                get the same answers in the same order, and have to report coordinates that have
                another answer.
            assumed: The answer in a run for export, which reads no values of the example either.

        Raises:
            RuntimeError: The network asks more often than when the plan recorded.
        """
        if self.records:
            self.facts.append(ask())
            return self.facts[-1]
        place = self._next_fact
        if place >= len(self.facts):
            raise _other_branches("tensors of coordinates", place)
        self._next_fact = place + 1
        return self.facts[place]

    def constant(self, *rows: tuple[int, ...]) -> Tensor:
        """Return int32 rows of numbers on the device, in memory that lives as long as the plan.

        A graph cannot copy numbers from the host: the run before the capture makes them.
        """
        if rows not in self._constants:
            self._constants[rows] = torch.tensor(rows, dtype=torch.int32, device=self.flags.device)
        return self._constants[rows]

    def report(self, kind: Report, flag: Tensor) -> None:
        """Keep a flag on the device, one element: if it is not zero, the run is of no use."""
        self._reports.append((kind, flag))

    def start(self) -> None:
        """Begin a run: clear the flags and start again at the first capacity."""
        self.flags.zero_()
        self._reports.clear()
        self._next = self._next_fact = 0
        self.is_running = True

    def finish(self) -> None:
        """End a run: write the flags that :meth:`report` got."""
        for kind, flag in self._reports:
            self.flags[kind : kind + 1].logical_or_(flag.reshape(1) != 0)
        self.is_running = False


def _other_branches(what: str, place: int) -> RuntimeError:
    return RuntimeError(
        f"SitePlan: the network makes more than {place} {what}, but the plan was recorded with "
        f"{place}. Capture a network that takes the same branches at every call."
    )
