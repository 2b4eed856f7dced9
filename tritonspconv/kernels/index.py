"""Grids as both back ends see them, and the indices that find the row of a coordinate."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from torch import Tensor

IndexKind = Literal["sorted", "pages", "bitmap"]


class CellGrid(Protocol):
    """A box of cells; see :class:`tritonspconv.coords.Grid`."""

    @property
    def lower(self) -> tuple[int, ...]:
        """Smallest coordinate of each spatial axis."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of cells along each spatial axis."""
        ...

    @property
    def batch_size(self) -> int:
        """Number of samples."""
        ...

    @property
    def num_cells(self) -> int:
        """Cells over all samples."""
        ...


class SiteIndex(NamedTuple):
    """A lookup structure over the active cells of a grid.

    Attributes:
        kind: ``"sorted"`` (any device): keys in ascending order, and their rows. ``"pages"``
            (Triton, given sites): ``2**shift`` consecutive keys are a page, and a page with a site
            has a slot of rows. ``"bitmap"`` (Triton, for generated sites; their rows ascend by
            key): the rank of a site's bit is its row.
        table: sorted: int64 [N], the keys. pages and bitmap: int64 words. The lower half of a word
            has the bits of 32 pages or cells. Its upper half has the slot or the row of the first
            bit that is set. Counters follow the words; the last entry of pages says whether rows
            repeat a site.
        rows: sorted: int64 [N]. pages: int32 [slots * 2**shift], ``2**31 - 1 - row`` for each cell
            of a slot, 0 where there is no site. bitmap: None.
        shift: pages: log2 of the keys in a page.
    """

    kind: IndexKind
    table: Tensor
    rows: Tensor | None
    shift: int = 0

    @property
    def num_bytes(self) -> int:
        """Memory that the index takes."""
        return self.table.nbytes + (0 if self.rows is None else self.rows.nbytes)


class ReachedSites(NamedTuple):
    """Generated sites.

    Attributes:
        coords: int32 [M, 1 + D], ascending by key; the batch index of padding rows is -1.
        site_index: Their index.
        flag: True if ``flag`` was not zero; None if no flag was passed.
        num_sites: int64 [], the number of sites, on the device; None: M.
        reached: int32 [N], the site that each row reaches, or -1; numba tells where a row reaches
            one site at most and there is no capacity. None: nobody knows.
    """

    coords: Tensor
    site_index: SiteIndex
    flag: bool | None = None
    num_sites: Tensor | None = None
    reached: Tensor | None = None
