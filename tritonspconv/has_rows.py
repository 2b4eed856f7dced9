"""The methods by which ``capture`` and ``export`` read and replace a sparse tensor's rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from tritonspconv.coords import ActiveSites


class HasRows(Protocol):
    """A sparse tensor of the engine or of an adapter.

    Two pairs of methods return the rows and make a tensor with other rows. The first pair uses the
    coordinates that users see. The second pair counts cells: MinkowskiEngine keeps coordinates in
    input units, and the extent of a cell is the tensor stride. In the other libraries the two pairs
    are the same.
    """

    def _row_tensors(self) -> tuple[Tensor, Tensor]:
        """Return features [N, C] and coordinates int32 [N, 1 + D], batch index first."""
        ...

    def _with_row_tensors(self, feats: Tensor, coords: Tensor) -> Any:
        """Return a tensor of the same kind and grid with other rows and without kernel maps."""
        ...

    def _rows_in_cells(self) -> tuple[Tensor, ActiveSites]:
        """Return features [N, C] and their sites.

        Raises:
            ValueError: The coordinates have no cells.
        """
        ...

    def _with_rows_in_cells(self, feats: Tensor, coords: Tensor) -> Any:
        """Do the same as :meth:`_with_row_tensors`, with ``coords`` in cells."""
        ...

    def _grid_of_rows(self) -> str:
        """Return a description that two tensors must share so that one may replace the other.

        That is the grid, or the tensor stride where every run finds its own grid.
        """
        ...


def has_rows(value: Any) -> TypeGuard[HasRows]:
    """Return whether ``value`` is a sparse tensor of the engine or of an adapter."""
    return hasattr(type(value), "_with_row_tensors")
