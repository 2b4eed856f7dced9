"""What both back ends see of a grid, and what they use to find the row of a coordinate."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from torch import Tensor

IndexKind = Literal["sorted", "hash", "bitmap"]


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
        kind: ``"sorted"`` (eager), ``"hash"`` or ``"bitmap"`` (Triton).
        table: sorted: int64 [N] ascending keys. hash: int64 [capacity, 2] of (key, ~row). bitmap:
            int64 [words], bit ``key % 64`` of word ``key // 64``.
        rows: sorted: int64 [N] row of each key. bitmap: int32 [words] rank of each word's first
            set bit within its block of words. hash: None.
        block_rank: bitmap: int64 [blocks + 1] rank of each block's first set bit. Else None.
        row_of_rank: bitmap: int32 row of each rank; None where rows ascend by key. Else None.
    """

    kind: IndexKind
    table: Tensor
    rows: Tensor | None
    block_rank: Tensor | None = None
    row_of_rank: Tensor | None = None
