"""Kernel maps from pairs that the caller lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map.kernel_map import KernelMap, Relation
from tritonspconv.kernels.invert_table import invert_table
from tritonspconv.waits import wait_for_number, wait_for_values

if TYPE_CHECKING:
    from jaxtyping import Int, Int64


def map_from_pairs(
    in_rows: Int[Tensor, "P"],
    out_rows: Int[Tensor, "P"],
    tap_ptr: Int64[Tensor, "ends"],
    n_in: int,
    n_out: int,
) -> KernelMap:
    """Build a kernel map from explicit pairs; the reverse of :meth:`KernelMap.pairs`.

    The map has rows and no coordinates: its geometry is a window of V taps on a line, and its sites
    are the row numbers. Convolution and pooling need nothing else.

    Args:
        in_rows: Input row of each pair, integer [P], in tap order.
        out_rows: Output row of each pair, integer [P].
        tap_ptr: The place where each tap's pairs begin, int64 [V+1]; the last entry is P.
        n_in: Number of input rows.
        n_out: Number of output rows.

    Raises:
        ValueError: Shapes or devices disagree, a row is out of range, or two pairs of one tap share
            an input or an output row.

    This call waits for the device. Extra memory: twice V * n_in, once V * n_out of int32.
    """
    _check_metadata(in_rows, out_rows, tap_ptr)
    volume, device = tap_ptr.shape[0] - 1, in_rows.device
    _check_rows(in_rows, out_rows, tap_ptr, n_in, n_out)
    taps = torch.repeat_interleave(tap_ptr.diff(), output_size=in_rows.shape[0])
    reached = torch.full((volume, n_in), -1, dtype=torch.int32, device=device)
    reached[taps, in_rows.long()] = out_rows.int()
    geometry = ConvGeometry((volume,), (1,), (0,), (1,))
    table = invert_table(reached, None, n_out, geometry.offsets)
    # If a tap has a row twice, the second pair overwrote an entry, so the table has too few
    # entries.
    if wait_for_number((table.rows >= 0).sum()) != in_rows.shape[0]:
        raise ValueError(
            "map_from_pairs: within a tap, every input row and every output row may occur once; "
            f"{in_rows.shape[0]} pairs hold repeated rows. Merge repeated coordinates before "
            "listing pairs."
        )
    relation = Relation(geometry, n_in, n_out, table, listed=True)
    return KernelMap(relation, _row_sites(n_in, device), _row_sites(n_out, device))


def _check_metadata(in_rows: Tensor, out_rows: Tensor, tap_ptr: Tensor) -> None:
    if in_rows.ndim != 1 or out_rows.shape != in_rows.shape:
        raise ValueError(
            "map_from_pairs: in_rows and out_rows must both be [P]; got "
            f"{list(in_rows.shape)} and {list(out_rows.shape)}."
        )
    if tap_ptr.ndim != 1 or tap_ptr.shape[0] < 2:
        raise ValueError(
            f"map_from_pairs: tap_ptr must be [V+1] with V at least 1; got {list(tap_ptr.shape)}."
        )
    devices = [str(tensor.device) for tensor in (in_rows, out_rows, tap_ptr)]
    if len(set(devices)) > 1:
        raise ValueError(f"map_from_pairs: all tensors must be on one device; got {devices}.")


def _check_rows(in_rows: Tensor, out_rows: Tensor, tap_ptr: Tensor, n_in: int, n_out: int) -> None:
    """Check values that are used as indices into memory."""
    total = in_rows.shape[0]
    outside = (in_rows < 0) | (in_rows >= n_in) | (out_rows < 0) | (out_rows >= n_out)
    descends = (tap_ptr.diff() < 0).sum()
    first, last, bad_taps, bad_rows = wait_for_values(
        torch.stack([tap_ptr[0], tap_ptr[-1], descends, outside.sum()])
    )
    if (first, last, bad_taps) != (0, total, 0):
        raise ValueError(
            f"map_from_pairs: tap_ptr must ascend from 0 to the {total} pairs; got {first} to "
            f"{last} with {bad_taps} descents. Pass the running sum of pairs per tap."
        )
    if bad_rows:
        raise ValueError(
            f"map_from_pairs: {bad_rows} of {total} pairs lie outside n_in={n_in}, "
            f"n_out={n_out} rows. Leave out the -1 that fill up a list."
        )


def _row_sites(n: int, device: torch.device) -> ActiveSites:
    rows = torch.arange(n, dtype=torch.int32, device=device)
    coords = torch.stack([torch.zeros_like(rows), rows], 1)
    return ActiveSites(coords, Grid((0,), (max(n, 1),), 1))
