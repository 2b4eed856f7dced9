"""Neighbour tables: which row each row relates to through each tap (Triton).

A table has one column per row of its side, and the columns stand in an order that puts rows with
like masks side by side. Each column looks its taps up in the index of the other side: once for the
mask, by which columns are sorted, and once more, in that order, for the taps that are present. So
entries are written once, in contiguous runs.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.index import CellGrid, IndexKind, SiteIndex
from tritonspconv.kernels.triton._blocks import next_power_of_2, num_blocks
from tritonspconv.kernels.triton._grid import (
    box_args,
    index_args,
    is_narrow,
    window_taps,
)
from tritonspconv.kernels.triton._index import find_rows, row_keys, row_starts, tap_keys
from tritonspconv.kernels.triton._launch import BoundKernel, bind, launch

_ABSENT: tl.constexpr = tl.constexpr(2**31 - 1)
_KEY_BITS: tl.constexpr = tl.constexpr(16)
_BLOCK_N = 128
# Rows in a block of the kernels that hold rows times taps.
_SCRATCH_BLOCK_N = 32
# Below this many rows a sort takes the host longer than the taps that it saves take the GPU.
_MIN_ROWS_TO_ORDER = 65536

Offsets = tuple[tuple[int, ...], ...]
Table = tuple[Tensor, Tensor, Tensor | None]


@triton.jit
def sort_key(mask, groups_ptr):
    """int16 key of int32 masks; masks with like keys have like taps.

    Bit g is set where a tap of group g is present, groups from rare to common. Read as a Gray code,
    so that neighbours in the order differ in few groups.
    """
    key = tl.zeros_like(mask)
    for g in tl.static_range(_KEY_BITS):
        group = tl.load(groups_ptr + g)
        key = (key << 1) | ((mask & group) != 0).to(tl.int32)
    key = key ^ (key >> 8)
    key = key ^ (key >> 4)
    key = key ^ (key >> 2)
    key = key ^ (key >> 1)
    return (key - 2**15).to(tl.int16)


@triton.jit
def mask_word(present, lane):
    """Bits of up to 32 taps: int32 [BLOCK_N] from bool [BLOCK_N, BLOCK_V]."""
    return tl.sum(tl.where(present, (tl.zeros_like(lane) + 1) << lane, 0), axis=1)


@triton.jit(do_not_specialize=["n", "first", "batch_size", "size", "own_size"])
def lookup_kernel(
    coords_ptr,
    table_ptr,
    index_rows_ptr,
    size,
    own_table_ptr,
    own_rows_ptr,
    own_size,
    sorted_ptr,
    found_ptr,
    groups_ptr,
    rows_ptr,
    mask_ptr,
    order_ptr,
    key_ptr,
    n,
    first,
    batch_size,
    lower,
    shape,
    own_lower,
    own_shape,
    KIND: tl.constexpr,
    OWN_KIND: tl.constexpr,
    STAGE: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    NARROW: tl.constexpr,
    V: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Look up to 32 taps of each row up, from tap ``first`` on; ``_lookup`` says what stages write.

    A row that its own index, where there is one, does not hold meets nothing, except that a
    submanifold row sees itself through tap ``CENTER``.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    if STAGE == "ordered":
        # What the first look found, in which all conditions on the row took part.
        row = tl.load(sorted_ptr + offs_n, mask=mask_n, other=0).to(tl.int32)
        bits = tl.load(found_ptr + row, mask=mask_n, other=0)
        tl.store(order_ptr + offs_n, row, mask=mask_n)
        inside = mask_n
    else:
        row = offs_n
        bits = tl.zeros_like(row)
        own_key, inside = row_keys(coords_ptr, row, mask_n, own_lower, own_shape, batch_size, NDIM)
        if OWN_KIND is not None:
            site, exists = find_rows(
                own_key, inside, own_table_ptr, own_rows_ptr, own_size, OWN_KIND
            )
            inside = exists & (site == row)
    starts = row_starts(coords_ptr, row, inside, lower, STRIDE, DIVIDE, NDIM, NARROW)
    entries = ()
    for v in tl.static_range(V):
        if v == CENTER:
            other, found = row, mask_n
        else:
            key, valid = tap_keys(starts, inside, shape, v, TAPS, STRIDE, DIVIDE, NDIM, NARROW)
            if STAGE == "ordered":
                valid = mask_n & (((bits >> v) & 1) != 0)
            other, found = find_rows(key, valid, table_ptr, index_rows_ptr, size, KIND)
        entries = entries + (tl.where(found, other, -1),)  # noqa: RUF005 - Triton has no *
        if STAGE != "ordered":
            bits = bits | (found.to(tl.int32) << v)
    if STAGE != "masks":
        # After all loads, which could not move up across a store.
        column = rows_ptr + first.to(tl.int64) * n + offs_n
        for v in tl.static_range(V):
            tl.store(column, entries[v], mask=mask_n)
            column += n
    tl.store(mask_ptr + (first // 32).to(tl.int64) * n + offs_n, bits, mask=mask_n)
    if STAGE == "masks":
        tl.store(key_ptr + offs_n, sort_key(bits, groups_ptr), mask=mask_n)


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
def scratch_key_kernel(
    scratch_ptr,
    groups_ptr,
    key_ptr,
    n,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sort key of each row of a scratch."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_V)
    mask = (offs_n < n)[:, None] & (lane < V)[None, :]
    scratch = scratch_ptr + offs_n.to(tl.int64)[:, None] * V + lane[None, :]
    present = tl.load(scratch, mask=mask, other=_ABSENT) != _ABSENT
    key = sort_key(mask_word(present, lane), groups_ptr)
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
    tl.store(mask_ptr + word.to(tl.int64) * n + offs_n, mask_word(present, lane), mask=mask_n)


@functools.lru_cache(maxsize=512)
def _tap_groups(offsets: Offsets, device: torch.device) -> Tensor:
    """Return the tap masks, int32, by which columns are grouped, rare ones first.

    Up to 16 taps stand for themselves. Of more, lines of taps along the middle axis and along the
    first one, corners before edges: surfaces run along a line, so that its taps come together.
    """
    ndim, bits = len(offsets[0]), _KEY_BITS.value
    middle = [sum(o[d] for o in offsets) / len(offsets) for d in range(ndim)]
    everything = range(ndim)

    def lines(axes: tuple[int, ...]) -> list[int]:
        """Masks of the taps that agree on ``axes``, from far to near the middle."""
        masks: dict[tuple[int, ...], int] = {}
        for v, offset in enumerate(offsets):
            place = tuple(offset[d] for d in axes)
            masks[place] = masks.get(place, 0) | 1 << v
        far = {
            place: sum(abs(x - middle[d]) for x, d in zip(place, axes, strict=True))
            for place in masks
        }
        return [masks[place] for place in sorted(masks, key=lambda place: (-far[place], place))]

    groups = lines(tuple(everything))
    if len(offsets) > bits:
        split = [lines(tuple(d for d in everything if d != axis)) for axis in (ndim // 2, 0)]
        # The line through the middle is nearly always there.
        groups = [mask for some in split for mask in some[:-1]] + groups
    groups = [0] * (bits - len(groups)) + groups[:bits]
    return torch.tensor(groups, dtype=torch.int64, device=device).to(torch.int32)


def _has_order(n: int, volume: int) -> bool:
    return 1 < volume <= 32 and n >= _MIN_ROWS_TO_ORDER


def _lookup(
    coords: Tensor,
    offsets: Offsets,
    stride: tuple[int, ...],
    divide: bool,
    index: SiteIndex,
    grid: CellGrid,
    own_grid: CellGrid,
    own_index: SiteIndex | None,
    center: int,
) -> Table:
    """Build the table whose columns are the rows of ``coords``, out of the other side's ``index``.

    Where columns are to be ordered the kernel runs twice. Stage "masks" writes masks in row order
    and sort keys; stage "ordered" writes order, masks and table in column order. Else stage
    "plain" writes masks and table.
    """
    n, volume, device = coords.shape[0], len(offsets), coords.device
    words = num_blocks(volume, 32)
    rows = torch.empty(volume, n, dtype=torch.int32, device=device)
    if n == 0:
        return rows, rows.new_empty(words, 0), None
    own = (None, None, 0) if own_index is None else index_args(own_index)
    inputs = coords, *index_args(index), *own
    boxes = min(grid.batch_size, own_grid.batch_size), *box_args(grid), *box_args(own_grid)
    blocks = (num_blocks(n, _BLOCK_N),)
    bound = functools.partial(
        _bind_lookup, offsets, stride, divide, center, is_narrow(grid, offsets), index.kind,
        None if own_index is None else own_index.kind,
    )  # fmt: skip
    mask = torch.empty(words, n, dtype=torch.int32, device=device)
    if not _has_order(n, volume):
        for run, first in bound("plain"):
            run(
                blocks, device,
                *inputs, None, None, None, rows, mask, None, None, n, first, *boxes,
            )  # fmt: skip
        return rows, mask, None
    found = torch.empty(n, dtype=torch.int32, device=device)
    keys = torch.empty(n, dtype=torch.int16, device=device)
    groups = _tap_groups(offsets, device)
    ((look, _),) = bound("masks")
    look(blocks, device, *inputs, None, None, groups, None, found, None, keys, n, 0, *boxes)
    permutation = torch.sort(keys, stable=True)[1]
    order = torch.empty(n, dtype=torch.int32, device=device)
    ((fill, _),) = bound("ordered")
    fill(blocks, device, *inputs, permutation, found, None, rows, mask, order, None, n, 0, *boxes)
    return rows, mask, order


@functools.lru_cache(maxsize=1024)
def _bind_lookup(
    offsets: Offsets,
    stride: tuple[int, ...],
    divide: bool,
    center: int,
    narrow: bool,
    kind: IndexKind,
    own_kind: IndexKind | None,
    stage: str,
) -> list[tuple[BoundKernel, int]]:
    """Return the kernels that look a window up, 32 taps each, and the first tap of each."""
    return [
        (
            bind(
                lookup_kernel, KIND=kind, OWN_KIND=own_kind, STAGE=stage, TAPS=taps.constants,
                STRIDE=stride, DIVIDE=divide, NDIM=len(stride), NARROW=narrow, V=taps.volume,
                CENTER=center - taps.first, BLOCK_N=_BLOCK_N,
            ),
            taps.first,
        )
        for taps in window_taps(offsets)
    ]  # fmt: skip


def lookup_table(coords: Tensor, offsets: Offsets, index: SiteIndex, grid: CellGrid) -> Table:
    """Build the table of a submanifold geometry: every row looks its own neighbours up.

    Args:
        coords: int32 [n, 1 + D], the sites.
        offsets: V tap offsets, one of them zero.
        index: Index of the sites.
        grid: Their grid.

    Returns:
        rows int32 [V, n], mask int32 [ceil(V/32), n], order int32 [n] or None.
    """
    ndim = coords.shape[1] - 1
    center = offsets.index((0,) * ndim)
    return _lookup(coords, offsets, (1,) * ndim, False, index, grid, grid, index, center)


def reach_table(
    out_coords: Tensor,
    offsets: Offsets,
    stride: tuple[int, ...],
    divide: bool,
    in_index: SiteIndex,
    in_grid: CellGrid,
    out_grid: CellGrid,
    out_index: SiteIndex | None = None,
) -> Table:
    """Build the table of any geometry: every output looks up the inputs that reach it.

    Args:
        out_coords: int32 [n_out, 1 + D].
        offsets: V tap offsets.
        stride: Fine sites per coarse site.
        divide: True when inputs are fine.
        in_index: Index of the input sites.
        in_grid: Grid of the input sites.
        out_grid: Grid of the output sites; rows outside it are reached by nothing.
        out_index: Index of the output sites, to leave repeated rows out; None: none repeats.

    Returns:
        rows int32 [V, n_out], mask int32 [ceil(V/32), n_out], order int32 [n_out] or None.
    """
    return _lookup(
        out_coords, offsets, stride, not divide, in_index, in_grid, out_grid, out_index, -1
    )  # fmt: skip


def reverse_table(
    rows: Tensor,
    in_coords: Tensor,
    offsets: Offsets,
    stride: tuple[int, ...],
    divide: bool,
    in_index: SiteIndex,
    out_index: SiteIndex,
    in_grid: CellGrid,
    out_grid: CellGrid,
    order: Tensor | None = None,
) -> Table:
    """Build the table of a map's inputs: every input looks up the outputs that it reaches.

    Args:
        rows: int32 [V, n_out], the table of the outputs; not needed to look up.
        in_coords: int32 [n_in, 1 + D].
        offsets: V tap offsets.
        stride: Fine sites per coarse site.
        divide: True when inputs are fine.
        in_index: Index of the input sites, to leave repeated rows out.
        out_index: Index of the output sites.
        in_grid: Grid of the input sites; rows outside it reach nothing.
        out_grid: Grid of the output sites.
        order: Order of the columns of ``rows``, or None.

    Returns:
        rows int32 [V, n_in], mask int32 [ceil(V/32), n_in], order int32 [n_in] or None.
    """
    return _lookup(in_coords, offsets, stride, divide, out_index, out_grid, in_grid, in_index, -1)


def _arrange(scratch: Tensor, offsets: Offsets) -> Table:
    """Turn a scratch [n, V] into rows [V, n], mask [W, n] and order [n] (None: not reordered)."""
    n, volume = scratch.shape
    device = scratch.device
    words = num_blocks(volume, 32)
    blocks, block_v = num_blocks(n, _SCRATCH_BLOCK_N), min(next_power_of_2(volume), 32)
    rows = torch.empty(volume, n, dtype=torch.int32, device=device)
    mask = torch.empty(words, n, dtype=torch.int32, device=device)
    if n == 0:
        return rows, mask, None
    order = permutation = None
    if _has_order(n, volume):
        keys = torch.empty(n, dtype=torch.int16, device=device)
        launch(
            scratch_key_kernel, (blocks,), device,
            scratch, _tap_groups(offsets, device), keys, n,
            V=volume, BLOCK_N=_SCRATCH_BLOCK_N, BLOCK_V=block_v,
        )  # fmt: skip
        permutation = torch.sort(keys, stable=True)[1]
        order = torch.empty(n, dtype=torch.int32, device=device)
    launch(
        arrange_kernel, (blocks, words), device,
        scratch, permutation, rows, mask, order, n,
        HAS_ORDER=order is not None, V=volume, BLOCK_N=_SCRATCH_BLOCK_N, BLOCK_V=block_v,
    )  # fmt: skip
    return rows, mask, order


def invert_table(rows: Tensor, order: Tensor | None, n_other: int, offsets: Offsets) -> Table:
    """Build the table of the other side: rows [V, n] of entries below ``n_other`` -> [V, n_other].

    ``offsets`` only steer the order of columns.
    """
    volume, n = rows.shape
    scratch = torch.full((n_other, volume), 2**31 - 1, dtype=torch.int32, device=rows.device)
    if n and n_other:
        block = 256
        launch(
            invert_kernel, (num_blocks(n, block), volume), rows.device,
            rows, order, scratch, n, HAS_ORDER=order is not None, V=volume, BLOCK_N=block,
        )  # fmt: skip
    return _arrange(scratch, offsets)
