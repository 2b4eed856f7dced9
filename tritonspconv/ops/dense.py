"""Conversion between rows at sites and dense tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from tritonspconv.arguments import check_tensor
from tritonspconv.coords import ActiveSites
from tritonspconv.graph_capture import is_traced, refuse_capture, run_untraced

if TYPE_CHECKING:
    from jaxtyping import Int32, Shaped


def to_dense(
    feats: Shaped[Tensor, "N C"], sites: ActiveSites, *, channels_first: bool = True
) -> Shaped[Tensor, "B ..."]:
    """Write rows into a dense tensor over their grid, zero elsewhere.

    Args:
        feats: Rows [N, C], any dtype.
        sites: The sites of the rows. The dense tensor covers ``sites.grid``, and its first cell is
            the lower corner of the grid. A bounded grid has its lower corner at the origin.
        channels_first: Layout of the result.

    Returns:
        ``[batch_size, C, *shape]``, or ``[batch_size, *shape, C]``; contiguous. If several rows
        have the same coordinates, the last row is written. Rows outside the grid are left out.

    Raises:
        ValueError: Rows or devices disagree.

    Deterministic; the host never waits. Differentiable in ``feats``. Extra memory: 4 bytes a cell,
    and with ``channels_first`` a second dense tensor for a moment.
    """
    if is_traced():
        return _trace(feats, sites, channels_first)
    refuse_capture("to_dense")
    check_tensor("to_dense: feats", feats)
    if has_torch_function_unary(feats):
        return handle_torch_function(
            to_dense, (feats,), feats, sites, channels_first=channels_first
        )
    if feats.ndim != 2 or feats.shape[0] != sites.num_rows:
        raise ValueError(
            f"to_dense: feats must have shape [{sites.num_rows}, C] to match the sites; got "
            f"{list(feats.shape)}."
        )
    if feats.device != sites.device:
        raise ValueError(
            f"to_dense: feats and sites must share a device; got {feats.device} and {sites.device}."
        )
    grid = sites.grid
    cells = grid.num_cells
    flat = torch.zeros(cells + 1, feats.shape[1], dtype=feats.dtype, device=feats.device)
    flat[_places(sites)] = feats
    dense = flat[:cells].reshape(grid.batch_size, *grid.shape, feats.shape[1])
    return dense.movedim(-1, 1).contiguous() if channels_first else dense


def _trace(feats: Tensor, sites: ActiveSites, channels_first: bool) -> Tensor:
    """Return the result of :func:`to_dense`, in operations that ``torch.compile`` traces."""
    grid = sites.grid
    # The shape of an unbounded grid depends on the coordinates.
    if type(feats) is not Tensor or feats.ndim != 2 or not grid.bounded:
        return run_untraced(to_dense, feats, sites, channels_first=channels_first)
    channels = feats.shape[1]
    if channels_first:
        shape = [grid.batch_size, channels, *grid.shape]
    else:
        shape = [grid.batch_size, *grid.shape, channels]
    return torch.ops.tritonspconv.to_dense(feats, sites, shape, channels_first)


def rows_of_dense(dense: Tensor, sites: ActiveSites, channels_first: bool) -> Tensor:
    """Return the gradient [N, C] of the rows that :func:`to_dense` wrote.

    Hidden rows, which a later row overwrote or which lie outside, get zeros.
    """
    last = dense.movedim(1, -1) if channels_first else dense
    if sites.grid.num_cells == 0:
        return dense.new_zeros(sites.num_rows, last.shape[-1])
    places = _places(sites)
    is_shown = places < sites.grid.num_cells
    rows = last.reshape(-1, last.shape[-1])[places * is_shown]
    return torch.where(is_shown[:, None], rows, rows.new_zeros(()))


def _places(sites: ActiveSites) -> Tensor:
    """Return the cell of each row, int64 [N]; hidden rows get the cell behind the last."""
    cells = sites.grid.num_cells
    key = sites.grid.keys(sites.coords)
    key = torch.where(key < 0, cells, key)
    row = torch.arange(sites.num_rows, dtype=torch.int32, device=key.device)
    last_row = torch.full((cells + 1,), -1, dtype=torch.int32, device=key.device)
    last_row.scatter_reduce_(0, key, row, "amax")
    return torch.where(last_row[key] == row, key, cells)


def from_dense(
    x: Shaped[Tensor, "B ..."], *, channels_first: bool = True
) -> tuple[Shaped[Tensor, "N C"], Int32[Tensor, "N axes"]]:
    """Collect the cells of a dense tensor in which any channel is not zero.

    Args:
        x: ``[batch_size, C, *shape]``, or ``[batch_size, *shape, C]``.
        channels_first: Layout of ``x``.

    Returns:
        Rows [N, C] and their coordinates, int32 [N, 1 + D], ascending.

    Raises:
        ValueError: ``x`` has no spatial axis.

    Deterministic. This call waits for the device once, for N. Differentiable in ``x``.
    """
    refuse_capture("from_dense")
    check_tensor("from_dense: x", x)
    if x.ndim < 3:
        raise ValueError(
            "from_dense: x must have a batch, a channel and at least one spatial axis; got shape "
            f"{list(x.shape)}."
        )
    channels_last = x.movedim(1, -1) if channels_first else x
    site = (channels_last != 0).any(-1).nonzero()
    return channels_last[site.unbind(1)], site.int()
