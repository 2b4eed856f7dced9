"""SitePlan: how many sites each strided layer of a network may make, fixed before the network runs.

A CUDA graph has fixed shapes. The number of output sites of a strided layer depends on the
coordinates, so a captured network gives each set of sites a fixed capacity, and the number of real
rows stays on the device. Rows behind that number are padding; see "Bounded sites" in the
architecture page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor


class MapBuilder(Protocol):
    """Builds sites and maps in place of the kernels, without a look at values on the host.

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
    """The capacities of the site sets that one network makes, in the order in which it makes them.

    A plan without capacities only records how many sites each set has: run a network once with such
    a plan, and derive the capacities from :attr:`sizes`.

    Args:
        capacities: Rows of each site set, in order; None: record.
        device: Device of the flags.

    Attributes:
        sizes: Number of sites of each set that was recorded.
        flags: int32 [1 + number of capacities]: entry 0 is set if input rows repeat each other,
            entry ``1 + i`` if set ``i`` needed more rows than its capacity.
        builder: Builds sites and maps; None: the kernels do.
        rules: Rules of row tensors that hold in this run, before those that always hold.
        on_alias: Called with a tensor and a row tensor, or the reverse, whenever one is made on the
            memory of the other; None: nobody asks.
        grid: A ``Grid`` for tensors whose grid is else found in their coordinates; None: there is
            none.
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
        # Every flag is aligned to 16 bytes, so that kernels compile once for all of them.
        self.flags = torch.zeros(1 + len(capacities or ()), 4, dtype=torch.int32, device=device)[
            :, 0
        ]
        self._repeats: list[Tensor] = []
        self._next = 0

    @property
    def records(self) -> bool:
        """True: the plan records sizes, and sites are not bounded."""
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
            raise RuntimeError(
                f"SitePlan: the network makes more than {place} sets of output sites, but the plan "
                f"was recorded with {place}. Capture a network that takes the same branches at "
                "every call."
            )
        self._next = place + 1
        return self.capacities[place], self.flags[1 + place]

    def note_repeats(self, flag: Tensor) -> None:
        """Keep a flag on the device that is not zero if input rows repeat each other."""
        self._repeats.append(flag)

    def start(self) -> None:
        """Begin a run: clear the flags and start again at the first capacity."""
        self.flags.zero_()
        self._repeats.clear()
        self._next = 0

    def finish(self) -> None:
        """End a run: write whether any input rows repeat each other into ``flags[0]``."""
        for flag in self._repeats:
            self.flags[:1].logical_or_(flag.reshape(1) != 0)
