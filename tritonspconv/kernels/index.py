"""What both back ends see of a grid, and what they use to find the row of a coordinate."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from torch import Tensor

IndexKind = Literal["sorted", "bitmap"]


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

    ``"sorted"`` (any device): keys in ascending order and the row of each. ``"bitmap"`` (Triton):
    one bit for each block of ``2**shift`` consecutive keys that holds a site. The rank of a bit
    among all set bits is the block's slot.

    Attributes:
        kind: ``"sorted"`` or ``"bitmap"``.
        table: sorted: int64 [N] keys. bitmap: int64 words, and counters behind them; bit b of word
            w stands for block ``32 * w + b``, and the upper half of a word is the rank of its
            first set bit.
        rows: sorted: int64 [N]. bitmap: int32 [slots * 2**shift], ``2**31 - 1 - row`` of each cell
            of a slot, 0 where there is no site; None: blocks are cells, and slots are rows.
        shift: bitmap: log2 of the cells in a block.
    """

    kind: IndexKind
    table: Tensor
    rows: Tensor | None
    shift: int = 0
