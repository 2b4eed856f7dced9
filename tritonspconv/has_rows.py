"""How ``capture`` and ``export`` ask a sparse tensor for its rows, whichever library it is of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from tritonspconv.coords import ActiveSites


class HasRows(Protocol):
    """A sparse tensor of the engine or of an adapter.

    Two pairs of methods give rows and take others. The first pair has the coordinates that users
    see. The second pair has cells: MinkowskiEngine keeps coordinates in input units, and a cell
    covers as many of them as the tensor stride says. In the other libraries both are the same.
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
        """Do as :meth:`_with_row_tensors`, where ``coords`` count cells."""
        ...

    def _grid_of_rows(self) -> str:
        """Return what tensors must share so that one may stand for the other, but for their rows.

        That is the grid, or the tensor stride where every run finds its own grid.
        """
        ...


def has_rows(value: Any) -> TypeGuard[HasRows]:
    """Return whether ``value`` is a sparse tensor of the engine or of an adapter."""
    return hasattr(type(value), "_with_row_tensors")
