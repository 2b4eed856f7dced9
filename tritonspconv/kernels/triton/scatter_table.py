"""The table of a map whose inputs feed one output at most: each input writes itself (Triton)."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.index import CellGrid, IndexKind, SiteIndex
from tritonspconv.kernels.table import NeighborTable
from tritonspconv.kernels.triton._blocks import num_blocks
from tritonspconv.kernels.triton._grid import (
    IntTuple,
    Offsets,
    box_args,
    index_args,
    is_narrow,
    window_steps,
)
from tritonspconv.kernels.triton._index import find_rows, row_keys, row_starts, tap_keys
from tritonspconv.kernels.triton._launch import BoundKernel, bind
from tritonspconv.kernels.triton._scratch_table import SCRATCH_ABSENT, new_scratch, table_of
from tritonspconv.kernels.window import tap_steps

_BLOCK_N = 128


@triton.jit(do_not_specialize=["n", "batch_size", "size"])
def scatter_kernel(
    coords_ptr,
    table_ptr,
    index_rows_ptr,
    size,
    scratch_ptr,
    repeats_ptr,
    n,
    batch_size,
    box,
    KIND: tl.constexpr,
    STEP: tl.constexpr,
    TAP_STEPS: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    NDIM: tl.constexpr,
    NARROW: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``scratch[o, v]`` = the lowest of the inputs that reach output o through tap v.

    If several inputs reach o through v, they share a cell: set ``repeats``. STEP is the one step of
    ``window.reach_steps``. Its remainder on each axis gives the tap; taps are TAP_STEPS apart.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    _own, inside = row_keys(coords_ptr, rows, rows < n, box, batch_size, 2 * NDIM, NDIM)
    starts = row_starts(coords_ptr, rows, inside, box, STRIDE, DIVIDE, NDIM, NARROW)
    key, valid = tap_keys(starts, inside, box, 0, STEP, STRIDE, DIVIDE, NDIM, NARROW)
    other, found = find_rows(key, valid, table_ptr, index_rows_ptr, size, KIND)
    entry = scratch_ptr + other.to(tl.int64) * V
    for d in tl.static_range(NDIM):
        if TAP_STEPS[d] != 0:
            entry += (starts[d + 1] % STRIDE[d]) * TAP_STEPS[d]
    before = tl.atomic_min(entry, rows, mask=found, sem="relaxed")
    repeats = repeats_ptr + tl.zeros_like(rows)
    tl.store(repeats, 1, mask=found & (before != SCRATCH_ABSENT))


def scatter_table(
    in_coords: Tensor,
    offsets: Offsets,
    stride: tuple[int, ...],
    divide: bool,
    out_index: SiteIndex,
    in_grid: CellGrid,
    out_grid: CellGrid,
    n_out: int,
    *,
    count: Tensor | None = None,
    reached: Tensor | None = None,
) -> tuple[NeighborTable, Tensor]:
    """Write inputs into a scratch [n_out, V], then make the table of it."""
    n, device = in_coords.shape[0], in_coords.device
    scratch = new_scratch(n_out, len(offsets), device)
    repeats = torch.zeros(1, dtype=torch.int32, device=device)
    if n and n_out:
        run, place = _bind_scatter(offsets, stride, divide, out_index.kind, out_grid, in_grid)
        run(
            (num_blocks(n, _BLOCK_N),), device,
            in_coords, *index_args(out_index, in_coords), scratch, repeats, n, *place,
        )  # fmt: skip
    return table_of(scratch, offsets, count), repeats


@functools.lru_cache(maxsize=1024)
def _bind_scatter(
    offsets: Offsets,
    stride: tuple[int, ...],
    divide: bool,
    kind: IndexKind,
    grid: CellGrid,
    own_grid: CellGrid,
) -> tuple[BoundKernel, tuple[int, IntTuple]]:
    """Return the kernel of a geometry between two grids, and its last arguments."""
    (step,) = window_steps(offsets, stride, divide)
    if step.volume != 1:
        raise ValueError(f"an input feeds up to {step.volume} outputs; at most one is supported.")
    run = bind(
        scatter_kernel, KIND=kind, STEP=step.constants, TAP_STEPS=tap_steps(offsets),
        STRIDE=stride, DIVIDE=divide, NDIM=len(stride), NARROW=is_narrow(grid, offsets, stride),
        V=len(offsets), BLOCK_N=_BLOCK_N,
    )  # fmt: skip
    return run, box_args(grid, own_grid, offsets)
