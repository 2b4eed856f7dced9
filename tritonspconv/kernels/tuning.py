"""Access to the matrix kernels for a tuner: tiles, the fixed choice, launches with a tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tritonspconv.kernels.eager.invert_table import mask_words
from tritonspconv.kernels.table import NeighborTable, PairList
from tritonspconv.kernels.triton.configs import (
    Card,
    GemmConfig,
    card_of,
    gather_gemm_config,
    weight_grad_config,
)
from tritonspconv.kernels.triton.tuned_tiles import MatrixOp, Problem, problem, read_tiles

__all__ = [
    "Card",
    "GemmConfig",
    "MatrixOp",
    "Problem",
    "TunableLaunch",
    "card_of",
    "gather_gemm_launch",
    "read_tiles",
    "weight_grad_launch",
]


class TunableLaunch(NamedTuple):
    """A matrix kernel on a fixed set of operands.

    Attributes:
        problem: The problem that a tile is for.
        log2_rows: Bits of the number of rows, or of pairs.
        fixed: The tile that the library chooses.
        run: Computes with a tile; returns None where the device cannot run it.
    """

    problem: Problem
    log2_rows: int
    fixed: GemmConfig
    run: Callable[[GemmConfig], Tensor | None]


def gather_gemm_launch(
    feats: Tensor, weight: Tensor, table: NeighborTable, *, precision: str
) -> TunableLaunch:
    """Return the launch of a forward pass or an input gradient.

    Args:
        feats: [n_in, c_in], contiguous.
        weight: [V, c_in, c_out], same dtype.
        table: For each of n_out rows, the rows of ``feats``.
        precision: ``"ieee"`` or ``"tf32"`` products for float32.
    """
    from tritonspconv.kernels.triton import gather_gemm, half_parts

    volume, c_in, c_out = weight.shape
    n_out = table.rows.shape[1]
    work = max(len(feats), n_out) * c_in * c_out
    operand = half_parts.as_operand(feats, work, precision)
    matrices = half_parts.as_operand(weight, work, precision)
    parts, leading, _, _ = half_parts.leading_part(operand)
    # The map of a CPU, where the interpreter runs the kernel, has no mask.
    mask = mask_words(table.entries(volume)) if table.mask is None else table.mask
    log2_rows = n_out.bit_length()
    fixed = gather_gemm_config(card_of(feats.device), log2_rows, c_in, c_out, leading.dtype, parts)

    def run(tile: GemmConfig) -> Tensor:
        return gather_gemm.gather_gemm(
            operand, matrices, None, table.rows, mask, table.order,
            mirrored=table.mirrored, precision=precision, config=tile,
        )  # fmt: skip

    wanted = problem("gather_gemm", leading.dtype, parts, c_in, c_out)
    return TunableLaunch(wanted, log2_rows, fixed, _where_it_runs(run))


def weight_grad_launch(
    feats: Tensor, grad: Tensor, pairs: PairList, volume: int, *, precision: str
) -> TunableLaunch:
    """Return the launch of a weight gradient.

    Args:
        feats: [n_in, c_in], contiguous.
        grad: [n_out, c_out], contiguous, same dtype.
        pairs: Input and output rows by tap.
        volume: Number of taps.
        precision: ``"ieee"`` or ``"tf32"`` products for float32.
    """
    from tritonspconv.kernels.triton import half_parts, weight_grad

    c_in, c_out = feats.shape[1], grad.shape[1]
    work = max(len(feats), len(grad)) * c_in * c_out
    rows = half_parts.as_operand(feats, work, precision)
    grads = half_parts.as_operand(grad, work, precision)
    parts, leading, _, _ = half_parts.leading_part(rows)
    shape, device = (volume, c_in, c_out), feats.device
    fixed = weight_grad_config(card_of(device), c_in, c_out, leading.dtype, parts)

    def run(tile: GemmConfig) -> Tensor:
        return weight_grad.weight_grad(
            rows, grads, pairs.pairs, pairs.tap_ptr, torch.empty(shape, device=device),
            mirrored=pairs.mirrored, precision=precision, config=tile,
        )  # fmt: skip

    wanted = problem("weight_grad", leading.dtype, parts, c_in, c_out)
    log2_pairs = pairs.pairs.shape[1].bit_length()
    return TunableLaunch(wanted, log2_pairs, fixed, _where_it_runs(run))


def _where_it_runs(run: Callable[[GemmConfig], Tensor]) -> Callable[[GemmConfig], Tensor | None]:
    """Return ``run``, but None for a tile that the compiler or the card refuses."""
    from tritonspconv.kernels.triton.refused import REFUSED

    def run_or_none(tile: GemmConfig) -> Tensor | None:
        try:
            return run(tile)
        except REFUSED:
            return None

    return run_or_none
