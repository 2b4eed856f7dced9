"""Neighbour tables: which row each row relates to through each tap (Triton).

All tables start as a row-major scratch [n, V] (a row's taps lie in one or two cache lines, so
filling it by lookup or by scatter is cheap) and end tap-major, in an order of columns that puts
rows with like masks side by side.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.index import CellGrid, SiteIndex
from tritonspconv.kernels.triton._blocks import num_blocks
from tritonspconv.kernels.triton._grid import (
    box_args,
    flatten_offsets,
    index_args,
    index_flags,
    int32_constant,
    tap_grid,
)
from tritonspconv.kernels.triton._index import find_rows, tap_keys
from tritonspconv.kernels.triton._launch import launch

_ABSENT: tl.constexpr = tl.constexpr(2**31 - 1)
_BLOCK_N = 32
# Below this many rows the time to sort exceeds what skipping taps saves.
_MIN_ROWS_TO_ORDER = 16384

Table = tuple[Tensor, Tensor, Tensor | None]


@triton.jit(do_not_specialize=["n", "batch_size", "log2_capacity"])
def lookup_kernel(
    coords_ptr,
    offsets_ptr,
    table_ptr,
    ranks_ptr,
    block_rank_ptr,
    row_of_rank_ptr,
    log2_capacity,
    scratch_ptr,
    n,
    lower,
    shape,
    batch_size,
    BITMAP: tl.constexpr,
    HAS_ROW_OF_RANK: tl.constexpr,
    NDIM: tl.constexpr,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``scratch[row, v]`` = row of the site at tap v of each row, or absent.

    Tap ``CENTER`` has offset zero. A row that is not its site's representative sees itself alone.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_V)
    if V <= BLOCK_V:
        offs_v = lane
    else:
        # Every block of taps needs the centre, to tell whether a row is its site's.
        offs_v = tl.where(lane == 0, CENTER, tl.program_id(1) * (BLOCK_V - 1) + lane - 1)
    mask_n = offs_n < n
    mask_v = offs_v < V
    # [BLOCK_N, BLOCK_V]
    key, valid = tap_keys(
        coords_ptr, offsets_ptr, offs_n, mask_n, offs_v, mask_v, lower, shape, batch_size,
        lower, shape, STRIDE, False, NDIM, False,
    )  # fmt: skip
    found = find_rows(
        key, valid, table_ptr, ranks_ptr, block_rank_ptr, row_of_rank_ptr, log2_capacity,
        BITMAP, HAS_ROW_OF_RANK,
    )  # fmt: skip
    is_center = (offs_v == CENTER)[None, :]
    # [BLOCK_N, 1]
    site = tl.max(tl.where(is_center, found, -1), axis=1)[:, None]
    found = tl.where((found >= 0) & (site == offs_n[:, None]), found, _ABSENT)
    found = tl.where(is_center, offs_n[:, None], found)
    scratch = scratch_ptr + offs_n.to(tl.int64)[:, None] * V + offs_v[None, :]
    tl.store(scratch, found, mask=mask_n[:, None] & mask_v[None, :])


@triton.jit(do_not_specialize=["n", "batch_size", "log2_capacity"])
def scatter_kernel(
    coords_ptr,
    offsets_ptr,
    table_ptr,
    ranks_ptr,
    block_rank_ptr,
    row_of_rank_ptr,
    log2_capacity,
    scratch_ptr,
    n,
    lower,
    shape,
    batch_size,
    own_lower,
    own_shape,
    BITMAP: tl.constexpr,
    HAS_ROW_OF_RANK: tl.constexpr,
    NDIM: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    HAS_OWN: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``scratch[out, v]`` = lowest input row that reaches output ``out`` through tap v."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    key, valid = tap_keys(
        coords_ptr, offsets_ptr, offs_n, offs_n < n, offs_v, offs_v < V, lower, shape, batch_size,
        own_lower, own_shape, STRIDE, DIVIDE, NDIM, HAS_OWN,
    )  # fmt: skip
    out = find_rows(
        key, valid, table_ptr, ranks_ptr, block_rank_ptr, row_of_rank_ptr, log2_capacity,
        BITMAP, HAS_ROW_OF_RANK,
    )  # fmt: skip
    scratch = scratch_ptr + out.to(tl.int64) * V + offs_v[None, :]
    row = offs_n[:, None] + tl.zeros_like(offs_v)[None, :]
    tl.atomic_min(scratch, row, mask=out >= 0, sem="relaxed")


@triton.jit(do_not_specialize=["n"])
def invert_kernel(
    rows_ptr,
    order_ptr,
    scratch_ptr,
    n,
    HAS_ORDER: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``scratch[i, v]`` = the row whose tap v is i: the table seen from its other side."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tl.program_id(1)
    mask_n = offs_n < n
    row = tl.load(order_ptr + offs_n, mask=mask_n, other=0) if HAS_ORDER else offs_n
    other = tl.load(rows_ptr + v.to(tl.int64) * n + offs_n, mask=mask_n, other=-1)
    tl.atomic_min(scratch_ptr + other.to(tl.int64) * V + v, row, mask=other >= 0, sem="relaxed")


@triton.jit(do_not_specialize=["n"])
def sort_key_kernel(
    scratch_ptr,
    rank_ptr,
    key_ptr,
    n,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Mask of each row with its bits moved to ``rank``: rows sorted by it share their rare taps."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = tl.arange(0, BLOCK_V)
    mask = (offs_n < n)[:, None] & (offs_v < V)[None, :]
    scratch = scratch_ptr + offs_n.to(tl.int64)[:, None] * V + offs_v[None, :]
    present = tl.load(scratch, mask=mask, other=_ABSENT) != _ABSENT
    rank = tl.load(rank_ptr + offs_v, mask=offs_v < V, other=0)
    key = tl.sum(tl.where(present, (tl.zeros_like(rank) + 1) << rank, 0), axis=1)
    tl.store(key_ptr + offs_n, key, mask=offs_n < n)


@triton.jit(do_not_specialize=["n"])
def arrange_kernel(
    scratch_ptr,
    sorted_ptr,
    rows_ptr,
    mask_ptr,
    order_ptr,
    n,
    HAS_ORDER: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the scratch tap by tap, in column order, with the mask word of 32 taps."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.program_id(1)
    lane = tl.arange(0, BLOCK_V)
    offs_v = word * 32 + lane
    mask_n = offs_n < n
    mask_v = offs_v < V
    if HAS_ORDER:
        row = tl.load(sorted_ptr + offs_n, mask=mask_n, other=0)
        if word == 0:
            tl.store(order_ptr + offs_n, row.to(tl.int32), mask=mask_n)
    else:
        row = offs_n
    mask = mask_n[:, None] & mask_v[None, :]
    scratch = scratch_ptr + row.to(tl.int64)[:, None] * V + offs_v[None, :]
    found = tl.load(scratch, mask=mask, other=_ABSENT)
    present = found != _ABSENT
    rows = rows_ptr + offs_v.to(tl.int64)[None, :] * n + offs_n[:, None]
    tl.store(rows, tl.where(present, found, -1), mask=mask)
    bits = tl.sum(tl.where(present, (tl.zeros_like(lane) + 1) << lane, 0), axis=1)
    tl.store(mask_ptr + word.to(tl.int64) * n + offs_n, bits, mask=mask_n)


@functools.lru_cache(maxsize=512)
def _tap_ranks(offsets: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Rank taps from common to rare: taps far from the window's middle find fewer neighbours."""
    ndim = len(offsets[0])
    middle = [sum(o[d] for o in offsets) / len(offsets) for d in range(ndim)]
    distance = [sum(abs(o[d] - middle[d]) for d in range(ndim)) for o in offsets]
    ranks = [0] * len(offsets)
    for rank, v in enumerate(sorted(range(len(offsets)), key=lambda v: (distance[v], v))):
        ranks[v] = rank
    return tuple(ranks)


def _arrange(scratch: Tensor, offsets: tuple[tuple[int, ...], ...]) -> Table:
    """Turn a scratch [n, V] into rows [V, n], mask [W, n] and order [n] (None: not reordered)."""
    n, volume = scratch.shape
    device = scratch.device
    words = num_blocks(volume, 32)
    (blocks, _), block_v = tap_grid(n, volume, _BLOCK_N)
    rows = torch.empty(volume, n, dtype=torch.int32, device=device)
    mask = torch.empty(words, n, dtype=torch.int32, device=device)
    if n == 0:
        return rows, mask, None
    ordered = words == 1 and volume > 1 and n >= _MIN_ROWS_TO_ORDER
    order = permutation = None
    if ordered:
        keys = torch.empty(n, dtype=torch.int32, device=device)
        launch(
            sort_key_kernel, (blocks,), device,
            scratch, int32_constant(_tap_ranks(offsets), device), keys, n,
            V=volume, BLOCK_N=_BLOCK_N, BLOCK_V=block_v,
        )  # fmt: skip
        permutation = torch.sort(keys, stable=True)[1]
        order = torch.empty(n, dtype=torch.int32, device=device)
    launch(
            arrange_kernel, (blocks, words), device,
        scratch, permutation, rows, mask, order, n,
        HAS_ORDER=ordered, V=volume, BLOCK_N=_BLOCK_N, BLOCK_V=block_v,
    )  # fmt: skip
    return rows, mask, order


def lookup_table(
    coords: Tensor,
    offsets: tuple[tuple[int, ...], ...],
    index: SiteIndex,
    grid: CellGrid,
) -> Table:
    """Build the table of a submanifold geometry: every row looks its own neighbours up.

    Args:
        coords: int32 [n, 1 + D], the sites.
        offsets: V tap offsets, one of them zero.
        index: Index of the sites.
        grid: Their grid.

    Returns:
        rows int32 [V, n], mask int32 [ceil(V/32), n], order int32 [n] or None.
    """
    n, ndim, volume = coords.shape[0], coords.shape[1] - 1, len(offsets)
    scratch = torch.empty(n, volume, dtype=torch.int32, device=coords.device)
    if n:
        (blocks, _), block_v = tap_grid(n, volume, _BLOCK_N)
        tap_blocks = 1 if volume <= block_v else num_blocks(volume, block_v - 1)
        launch(
            lookup_kernel, (blocks, tap_blocks), coords.device,
            coords, flatten_offsets(offsets, coords.device), *index_args(index), scratch,
            n, *box_args(grid), grid.batch_size,
            **index_flags(index), NDIM=ndim, STRIDE=(1,) * ndim, V=volume,
            CENTER=offsets.index((0,) * ndim), BLOCK_N=_BLOCK_N, BLOCK_V=block_v, num_warps=4,
        )  # fmt: skip
    return _arrange(scratch, offsets)


def reach_table(
    in_coords: Tensor,
    n_out: int,
    offsets: tuple[tuple[int, ...], ...],
    stride: tuple[int, ...],
    divide: bool,
    out_index: SiteIndex,
    grid: CellGrid,
    own_grid: CellGrid | None = None,
) -> Table:
    """Build the table of any geometry: every input looks up the outputs it reaches.

    Args:
        in_coords: int32 [n_in, 1 + D].
        n_out: Number of output rows.
        offsets: V tap offsets.
        stride: Fine sites per coarse site.
        divide: True when inputs are fine.
        out_index: Index of the output sites.
        grid: Grid of the output sites.
        own_grid: Grid of the input sites; rows outside it reach nothing. None: every row is known
            to be inside.

    Returns:
        rows int32 [V, n_out], mask int32 [ceil(V/32), n_out], order int32 [n_out] or None.
    """
    n, ndim, volume = in_coords.shape[0], in_coords.shape[1] - 1, len(offsets)
    scratch = torch.full((n_out, volume), 2**31 - 1, dtype=torch.int32, device=in_coords.device)
    if n and n_out:
        blocks, block_v = tap_grid(n, volume, _BLOCK_N)
        batch_size = min(grid.batch_size, (own_grid or grid).batch_size)
        launch(
            scatter_kernel, blocks, in_coords.device,
            in_coords, flatten_offsets(offsets, in_coords.device),
            *index_args(out_index), scratch,
            n, *box_args(grid), batch_size, *box_args(own_grid or grid),
            **index_flags(out_index), HAS_OWN=own_grid is not None, NDIM=ndim,
            STRIDE=stride, DIVIDE=divide, V=volume,
            BLOCK_N=_BLOCK_N, BLOCK_V=block_v, num_warps=4,
        )  # fmt: skip
    return _arrange(scratch, offsets)


def invert_table(
    rows: Tensor, order: Tensor | None, n_other: int, offsets: tuple[tuple[int, ...], ...]
) -> Table:
    """Build the table of the other side: rows [V, n] of entries below ``n_other`` -> [V, n_other].

    ``offsets`` only steer the order of columns.
    """
    volume, n = rows.shape
    scratch = torch.full((n_other, volume), 2**31 - 1, dtype=torch.int32, device=rows.device)
    if n and n_other:
        block = 256
        launch(
            invert_kernel,
            (num_blocks(n, block), volume),
            rows.device,
            rows,
            order,
            scratch,
            n,
            HAS_ORDER=order is not None,
            V=volume,
            BLOCK_N=block,
        )
    return _arrange(scratch, offsets)
