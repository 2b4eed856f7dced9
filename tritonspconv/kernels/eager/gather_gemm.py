"""Gather, multiply, sum over a neighbour table: forward and input gradient (torch)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonspconv.kernels import acc_dtype
from tritonspconv.kernels.channel_norm import ChannelNorm
from tritonspconv.kernels.eager.pairs import PairBlock, PairBlocks

# Bytes of the rows that a core gathers at a time, to find them in its cache.
_CACHED_BYTES = 2**20
_FEWEST_ROWS = 256


def rows_in_cache(channels: int, dtype: torch.dtype) -> int:
    """Return how many rows of so many channels to work on at a time."""
    cached = _CACHED_BYTES * torch.get_num_threads()
    return max(cached // max(channels * dtype.itemsize, 1), _FEWEST_ROWS)


def gather_gemm(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    mask: Tensor | None,
    order: Tensor | None,
    *,
    mirrored: bool,
    precision: str = "ieee",
    norm: ChannelNorm | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    blocks: PairBlocks | None = None,
) -> Tensor:
    """Multiply gathered rows with the taps' matrices, then sum them by column, block by block.

    See :func:`tritonspconv.kernels.triton.gather_gemm.gather_gemm`; ``mask`` and ``precision`` are
    not needed here. ``blocks`` are the pairs of ``rows``; None: list them.
    """
    dtype = acc_dtype(feats.dtype)
    _, c_in, c_out = weight.shape
    out = torch.empty(rows.shape[1], c_out, dtype=dtype, device=feats.device)
    feats, matrices = feats.to(dtype), weight.to(dtype).unbind()
    if mirrored:
        matrices = matrices[::-1]
    blocks = PairBlocks(rows) if blocks is None else blocks
    listed, identity = blocks.listed(max(c_in, c_out)), blocks.identity
    # Memory that is used over and over stays in the cache; new memory is cleared page by page.
    at_once = rows_in_cache(c_in, dtype)
    largest_tap = max((max(block.counts) for block in listed), default=0)
    products = out.new_empty(max((len(block.rows) for block in listed), default=0), c_out)
    gathered = out.new_empty(min(max(at_once, largest_tap), len(products)), c_in)
    # Autocast would round the operands of the products below once more.
    with torch.autocast(feats.device.type, enabled=False):
        start = 0
        for block in listed:
            end = start + len(block.ends) - 1
            made, sums = products[: len(block.rows)], out[start:end]
            _multiply(feats, matrices, block, gathered, made)
            if identity is not None:
                # The rows are where they belong, and so are their products.
                torch.mm(feats[start:end], matrices[identity], out=sums)
                sums += _sum_by_column(made, block)
            elif block.is_one_each:
                torch.index_select(made, 0, block.by_column, out=sums)
            else:
                sums.copy_(_sum_by_column(made, block))
            start = end
    if order is not None:
        out = torch.empty_like(out).index_copy_(0, order.long(), out)
    if bias is not None:
        out += bias
    if norm is not None:
        _normalise(out, norm)
    if residual is not None:
        out += residual
    if relu:
        out.relu_()
    return out.to(weight.dtype)


def _normalise(out: Tensor, norm: ChannelNorm) -> None:
    """Normalise ``out`` [n_out, c_out] in place."""
    scale = (norm.variance.to(out.dtype) + norm.eps).rsqrt_()
    if norm.weight is not None:
        scale *= norm.weight
    out -= norm.mean
    out *= scale
    if norm.bias is not None:
        out += norm.bias


def _multiply(
    feats: Tensor, matrices: tuple[Tensor, ...], block: PairBlock, gathered: Tensor, out: Tensor
) -> None:
    """Write the product of each pair of a block to ``out`` [P, c_out]; ``gathered`` is scratch."""
    start = 0
    for first, stop in _runs(block.counts, gathered.shape[0]):
        counts = block.counts[first:stop]
        end = start + sum(counts)
        operands = gathered[: end - start]
        torch.index_select(feats, 0, block.rows[start:end], out=operands)
        parts = zip(operands.split(counts), out[start:end].split(counts), strict=True)
        for (operand, product), matrix in zip(parts, matrices[first:stop], strict=True):
            if operand.shape[0]:
                torch.mm(operand, matrix, out=product)
        start = end


def _runs(counts: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield the ends of runs of taps that have at most ``most`` pairs together, or of one tap."""
    first = held = 0
    for tap, count in enumerate(counts):
        if held and held + count > most:
            yield first, tap
            first, held = tap, 0
        held += count
    yield first, len(counts)


def _sum_by_column(products: Tensor, block: PairBlock) -> Tensor:
    """Return the sum of each column's products, in the order of taps."""
    return F.embedding_bag(
        block.by_column, products, block.ends, mode="sum", include_last_offset=True
    )
