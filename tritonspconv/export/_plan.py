"""The plan of a recorded run: capacities, maps of fixed shapes, and rows that did not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.coords.row_tensor import RowBounds, RowwiseError
from tritonspconv.coords.site_plan import Report, SitePlan
from tritonspconv.export._maps import (
    IntTuple,
    SortedSites,
    inverted_rows,
    neighbor_rows,
    reached_sites,
)
from tritonspconv.export._rules import RULES
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map.kernel_map import Relation
from tritonspconv.kernels.table import NeighborTable
from tritonspconv.kernels.window import Window

T = TypeVar("T")


class RecordedPlan(SitePlan):
    """A plan whose maps are made of torch operations of fixed shapes.

    Args:
        capacities: Rows of each set of sites that the network makes, in order; None: as many as
            there are sites, which :attr:`sizes` then lists.
        grid: The grid of tensors that have none of their own, in input units, with its batch size.
        device: Device of the run.
        on_alias: See :class:`SitePlan`.
    """

    rules = RULES

    def __init__(
        self,
        capacities: Sequence[int] | None,
        grid: Grid,
        device: torch.device,
        on_alias: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        super().__init__(capacities, device)
        self.builder = self
        self.grid = grid
        self.is_running = True
        self.on_alias = on_alias
        # By ``id`` of sites; the sites live as long as their ``id`` is used.
        self._indices: dict[int, tuple[ActiveSites, SortedSites]] = {}
        self._outside: list[Tensor] = []
        self._repeated: list[Tensor] = []
        self._lacking: list[Tensor] = []

    def faults(self) -> list[Tensor]:
        """Return the faults of the run, int64 [] each; all are 0 if the results are right.

        These are the rows outside their grid, the rows that repeat an earlier row, and for each set
        of sites the number of sites for which there was no room.
        """
        none = torch.zeros((), dtype=torch.int64, device=self.flags.device)
        given = [
            torch.stack(numbers).amax() if numbers else none
            for numbers in (self._outside, self._repeated)
        ]
        return [*given, *self._lacking]

    def recall(self, ask: Callable[[], T], assumed: T | None = None) -> T:
        """Return ``assumed``: a record with an answer of one scan would be wrong for the next."""
        assert assumed is not None, "a recorded run reads no values"
        return assumed

    def report(self, kind: Report, flag: Tensor) -> None:
        """Keep no flag: the program counts rows outside and repeated rows; see :meth:`faults`."""

    def inspect(self, sites: ActiveSites) -> None:
        """Note the rows of given sites that repeat or lie outside the grid."""
        self._index(sites)

    def make_sites(
        self, sites: ActiveSites, offsets: Window, stride: IntTuple, divide: bool, grid: Grid
    ) -> ActiveSites:
        """Return the sites that a window reaches, ascending by key; no more than fit."""
        index = self._index(sites)
        capacity = None
        if self.capacities is not None:
            capacity = min(self.take()[0], max(grid.num_cells, 1))
        is_inside = index.numbering.contains(sites.coords)
        made = reached_sites(sites.coords, is_inside, offsets, stride, divide, grid, capacity)
        if self.capacities is None:
            self.record(made.coords.shape[0])
        self._lacking.append(made.lacking)
        found = ActiveSites(made.coords, grid, bounds=RowBounds(made.count, self))
        self._indices[id(found)] = found, made.index
        return found

    def relate(
        self, geometry: ConvGeometry, sites: ActiveSites, out_sites: ActiveSites
    ) -> Relation:
        """Return the relation between two sets of sites."""
        self._index(out_sites)
        rows = neighbor_rows(
            out_sites.coords, out_sites.grid, geometry.offsets, geometry.stride,
            not geometry.transposed, self._index(sites),
        )  # fmt: skip
        return _RecordedRelation(
            geometry, sites.num_rows, out_sites.num_rows, NeighborTable(rows.t(), None, None),
            mirrored=sites is out_sites and geometry.is_mirrored, in_count=sites.count,
        )  # fmt: skip

    def _index(self, sites: ActiveSites) -> SortedSites:
        held = self._indices.get(id(sites))
        if held is not None:
            return held[1]
        if sites.count is None:
            raise RowwiseError(
                f"{sites} were made of values of other coordinates, so that their number has no "
                "bound. Use layers that make their own output sites."
            )
        index = SortedSites.of(sites.coords, sites.grid)
        self._indices[id(sites)] = sites, index
        self._repeated.append(index.num_repeats())
        self._outside.append(sites.count - index.num_sites())
        return index


class _RecordedRelation(Relation):
    """A relation whose table of the inputs is made without reading values."""

    def in_table(self, in_sites: ActiveSites, out_sites: ActiveSites) -> NeighborTable:
        """Return the table seen from the inputs."""
        if self._in_table is None:
            if self.mirrored:
                self._in_table = self.out_table._replace(mirrored=True)
            else:
                rows = inverted_rows(self.out_table.rows.t(), self.n_in)
                self._in_table = NeighborTable(rows.t(), None, None)
        return self._in_table
