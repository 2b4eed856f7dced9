"""KernelMap: the relation of one geometry between two sets of sites, in each form of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspconv.coords import ActiveSites
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernels.invert_table import invert_table
from tritonspconv.kernels.neighbor_table import reverse_table
from tritonspconv.kernels.order_columns import order_columns, pays_to_order
from tritonspconv.kernels.pairs import list_inputs, pair_lists
from tritonspconv.kernels.table import NeighborTable, PairList, held_bytes
from tritonspconv.opaque_types import OpaqueMeta, register_opaque
from tritonspconv.waits import wait_for_flag, wait_for_indices, wait_for_number

if TYPE_CHECKING:
    from jaxtyping import Int32, Int64


class Relation:
    """Tables and pairs of one geometry, each made once. A map and its inverse share them.

    Args:
        geometry: The geometry.
        n_in: Number of input rows.
        n_out: Number of output rows.
        out_table: The table of the outputs.
        mirrored: Inputs and outputs are one set of sites, and the geometry is mirrored.
        listed: A caller listed the pairs, so they do not follow from the geometry.
        versions: Versions of the input and of the output coordinates that the table was made of.
        repeats: Flag on the device: inputs that reach an output share a cell. None: the sites of
            the inputs know the answer.
        in_count: Number of real inputs, int64 [] on the device; None: all. The number of real
            outputs is ``out_table.real_columns``.
        make_table: Makes the table of the outputs again from the sites of the inputs and those of
            the outputs; None: the table cannot be made again.

    Attributes:
        table: The table of the outputs; None from :meth:`release` to :meth:`restore`.
        feeds_one_output: The geometry says that an input feeds one output at most, and the pairs
            follow from the geometry. Then the inputs have one table row and need no look-up.
    """

    __slots__ = (
        "_in_table",
        "_make_table",
        "_ordered",
        "_pairs",
        "_released_versions",
        "_repeats",
        "_versions",
        "feeds_one_output",
        "geometry",
        "in_count",
        "listed",
        "mirrored",
        "n_in",
        "n_out",
        "table",
    )  # fmt: skip

    def __init__(
        self,
        geometry: ConvGeometry,
        n_in: int,
        n_out: int,
        out_table: NeighborTable,
        mirrored: bool = False,
        listed: bool = False,
        versions: tuple[int | None, int | None] = (None, None),
        repeats: Tensor | None = None,
        in_count: Tensor | None = None,
        make_table: Callable[[ActiveSites, ActiveSites], NeighborTable] | None = None,
    ) -> None:
        self.geometry = geometry
        self.feeds_one_output = geometry.feeds_one_output and not listed and not mirrored
        self.mirrored = mirrored
        self.listed = listed
        self.n_in = n_in
        self.n_out = n_out
        self.table: NeighborTable | None = out_table
        self.in_count = in_count
        self._make_table = make_table
        self._versions = versions
        self._released_versions: tuple[int | None, int | None] = (None, None)
        self._repeats: Tensor | bool | None = repeats
        self._in_table: NeighborTable | None = None
        self._pairs: PairList | None = None
        # The tables of the outputs and of the inputs with ordered columns.
        self._ordered: list[NeighborTable | None] = [None, None]

    @property
    def out_table(self) -> NeighborTable:
        """The table of the outputs of a relation that is not released."""
        assert self.table is not None, "call restore() before"
        return self.table

    def release(self, in_sites: ActiveSites, out_sites: ActiveSites) -> None:
        """Free tables and pairs, if :meth:`restore` can make them again."""
        if self._make_table is None or self.table is None:
            return
        self._released_versions = in_sites.version, out_sites.version
        self.table = self._in_table = self._pairs = None
        self._ordered = [None, None]

    def restore(self, in_sites: ActiveSites, out_sites: ActiveSites) -> NeighborTable:
        """Make the table of the outputs again, and return it."""
        assert self._make_table is not None, "only such a relation is released"
        if (in_sites.version, out_sites.version) != self._released_versions:
            raise RuntimeError(
                f"the kernel map of {self.geometry} was released and cannot be made again, because "
                "somebody wrote to the coordinates since. Write to a copy of the coordinates."
            )
        self.table = self._make_table(in_sites, out_sites)
        return self.table

    @property
    def num_bytes(self) -> int:
        """Memory of all forms that exist now."""
        forms = (self.table, self._in_table, self._pairs, *self._ordered)
        return held_bytes(form for form in forms if form is not None)

    def in_table(self, in_sites: ActiveSites, out_sites: ActiveSites) -> NeighborTable:
        """Return the table seen from the inputs, made on first use, between the relation's sites.

        The sites are arguments, because sites own relations: a relation holds no reference to them.
        """
        if self._in_table is None:
            self._list_inputs()
        if self._in_table is None:
            self._in_table = self._make_in_table(in_sites, out_sites)
        return self._in_table

    def _list_inputs(self) -> None:
        """Make pairs and table of the inputs at once, where an input feeds one output at most."""
        if not self.feeds_one_output:
            return
        found = list_inputs(self.out_table, self.n_in, self.in_count)
        if found is not None:
            self._pairs, self._in_table = found

    def _make_in_table(self, in_sites: ActiveSites, out_sites: ActiveSites) -> NeighborTable:
        table, geometry = self.out_table, self.geometry
        if self.mirrored:
            return table._replace(mirrored=True)
        # If a user has edited the coordinates since, they no longer give the old sites.
        edited = (in_sites.version, out_sites.version) != self._versions
        if self.listed or geometry.sites == "same" or edited or self.feeds_one_output:
            return invert_table(
                table.rows, table.order, self.n_in, geometry.offsets,
                count=table.real_columns, other_count=self.in_count,
            )  # fmt: skip
        return reverse_table(
            table.rows,
            in_sites.coords,
            geometry.offsets,
            geometry.stride,
            not geometry.transposed,
            in_sites.index if in_sites.may_repeat else None,
            out_sites.index,
            in_sites.grid,
            out_sites.grid,
            table.order,
            count=table.real_columns,
            in_count=self.in_count,
        )

    def ordered(self, table: NeighborTable) -> NeighborTable:
        """Return one of the relation's two tables with its columns in order; made once and kept.

        Pairs are listed from the plain table, so this changes no other result.
        """
        place = int(table is not self.out_table)
        found = self._ordered[place]
        if found is None:
            if table.mirrored:
                found = self.ordered(self.out_table)._replace(mirrored=True)
            else:
                found = order_columns(table, self.geometry.offsets)
            self._ordered[place] = found
        return found

    def has_repeats(self, in_sites: ActiveSites) -> bool:
        """Return whether inputs of the map share a cell. This call waits for the device, once."""
        if self._repeats is None:
            return in_sites.has_repeats()
        if self.in_count is not None and isinstance(self._repeats, Tensor):
            in_sites.report_repeats(self._repeats)
            self._repeats = False
        self._repeats = wait_for_flag(self._repeats)
        return self._repeats

    @property
    def pairs(self) -> PairList:
        """The pairs, listed on first use."""
        if self._pairs is None:
            self._list_inputs()
        if self._pairs is None:
            self._pairs = self._list_pairs()
        return self._pairs

    def _list_pairs(self) -> PairList:
        table, volume = self.out_table, self.geometry.kernel_volume
        taps = (volume + 1) // 2 if self.mirrored else volume
        capacity = min(
            taps * self.n_out, taps * self.n_in, self.geometry.max_outputs_per_input * self.n_in
        )
        return pair_lists(table, taps, capacity, self.mirrored)


@register_opaque
class KernelMap(metaclass=OpaqueMeta):
    """Every (input row, output row, tap) of one geometry between two sets of sites.

    :func:`tritonspconv.kernel_map.kernel_map` makes maps. Pairs and tables never change; derived
    forms are made on first use and kept.

    Attributes:
        geometry: The geometry the map was built from.
        kernel_volume: Number of taps.
        in_sites: Sites of the input rows.
        out_sites: Sites of the output rows.
        n_in: Number of input rows.
        n_out: Number of output rows.
        in_count, out_count: Numbers of real rows, int64 [] on the device; None: all rows are real.
        is_inverse: True for a map that runs ``geometry`` from its outputs to its inputs.
    """

    __slots__ = (
        "__weakref__", "_relation", "geometry", "in_count", "in_sites", "is_inverse",
        "kernel_volume", "n_in", "n_out", "out_count", "out_sites",
    )  # fmt: skip

    def __init__(
        self,
        relation: Relation,
        in_sites: ActiveSites,
        out_sites: ActiveSites,
        is_inverse: bool = False,
    ) -> None:
        self._relation = relation
        self.in_sites = in_sites
        self.out_sites = out_sites
        self.is_inverse = is_inverse
        self.geometry = relation.geometry
        self.kernel_volume = relation.geometry.kernel_volume
        self.in_count, self.out_count = in_sites.count, out_sites.count
        sizes = relation.n_in, relation.n_out
        self.n_in, self.n_out = sizes[::-1] if is_inverse else sizes

    @property
    def is_listed(self) -> bool:
        """True: a caller listed the pairs, so they do not follow from the geometry."""
        return self._relation.listed

    @property
    def out_table(self) -> NeighborTable:
        """Per output row, the input row of each tap."""
        return self._seen_from_inputs() if self.is_inverse else self._seen_from_outputs()

    @property
    def in_table(self) -> NeighborTable:
        """Per input row, the output row of each tap."""
        return self._seen_from_outputs() if self.is_inverse else self._seen_from_inputs()

    def out_table_for(self, c_in: int, c_out: int) -> NeighborTable:
        """Return ``out_table``, with ordered columns if a layer of these channels gains by it."""
        return self._ordered_for(self.out_table, c_in, c_out)

    def in_table_for(self, c_in: int, c_out: int) -> NeighborTable:
        """Return ``in_table``, with ordered columns if a gradient of these channels gains by it."""
        return self._ordered_for(self.in_table, c_in, c_out)

    def _ordered_for(self, table: NeighborTable, c_in: int, c_out: int) -> NeighborTable:
        if pays_to_order(table, self.kernel_volume, c_in, c_out):
            return self._relation.ordered(table)
        return table

    def _seen_from_outputs(self) -> NeighborTable:
        """Return the relation's table, made again if it was released."""
        table = self._relation.table
        return self._relation.restore(*self._relation_sites()) if table is None else table

    def _seen_from_inputs(self) -> NeighborTable:
        return self._whole().in_table(*self._relation_sites())

    def _relation_sites(self) -> tuple[ActiveSites, ActiveSites]:
        """Return the sites of the relation's inputs and outputs."""
        if self.is_inverse:
            return self.out_sites, self.in_sites
        return self.in_sites, self.out_sites

    def _whole(self) -> Relation:
        """Return the relation, with its table made again if it was released."""
        if self._relation.table is None:
            self._relation.restore(*self._relation_sites())
        return self._relation

    @property
    def pair_list(self) -> PairList:
        """Pairs by tap as (input, output) rows of the geometry; see ``is_inverse``."""
        return self._whole().pairs

    def release(self) -> None:
        """Free the tables and the pairs of the map and of its inverse.

        Whoever uses the map next makes the same tables again from the coordinates, and waits as
        long as for a new map. A map of pairs that a caller listed keeps its tables.

        Raises:
            RuntimeError: At the next use, if somebody has written to the coordinates since.
        """
        self._relation.release(*self._relation_sites())

    @property
    def num_bytes(self) -> int:
        """Memory of the tables and pairs that the map and its inverse hold now, in bytes.

        docs/memory.md has the formula. Coordinates and their index are not counted.
        """
        return self._relation.num_bytes

    def inverse(self) -> KernelMap:
        """Return the same pairs under the same taps with inputs and outputs swapped."""
        return KernelMap(self._relation, self.out_sites, self.in_sites, not self.is_inverse)

    def has_repeats(self) -> bool:
        """Return whether rows that the geometry reads share a cell.

        This call waits for the device once. A map has pairs of the first row of each cell only. If
        windows do not overlap, only rows that reach an output count.
        """
        return self._relation.has_repeats(self.out_sites if self.is_inverse else self.in_sites)

    def num_pairs(self) -> int:
        """Count the pairs. This call waits for the device."""
        return wait_for_number((self._seen_from_outputs().entries(self.kernel_volume) >= 0).sum())

    def pairs(
        self,
    ) -> tuple[Int32[Tensor, "P"], Int32[Tensor, "P"], Int64[Tensor, "ends"]]:
        """List all pairs: input rows [P], output rows [P], tap_ptr [V+1].

        This call waits for the device.
        """
        table = self._seen_from_outputs()
        rows = table.entries(self.kernel_volume)
        tap, column = wait_for_indices(rows >= 0)
        rows = rows[tap, column]
        others = column.int() if table.order is None else table.order[column]
        tap_ptr = torch.zeros(self.kernel_volume + 1, dtype=torch.int64, device=rows.device)
        torch.cumsum(torch.bincount(tap, minlength=self.kernel_volume), 0, out=tap_ptr[1:])
        return (others, rows, tap_ptr) if self.is_inverse else (rows, others, tap_ptr)

    def __repr__(self) -> str:
        """Return rows on both sides and the geometry."""
        arrow = "inverse of " if self.is_inverse else ""
        return f"KernelMap({self.n_in} -> {self.n_out} rows, {arrow}{self.geometry})"
