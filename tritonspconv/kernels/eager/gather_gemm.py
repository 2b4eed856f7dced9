"""Gather, multiply, sum over a neighbour table: forward and input gradient (torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonspconv.kernels import acc_dtype
from tritonspconv.kernels.channel_norm import ChannelNorm
from tritonspconv.kernels.eager.pairs import PairPanel, PairPanels, largest_tap, taken_taps

# Bytes of rows that a core gathers at a time: they stay in its cache.
_CACHED_BYTES = 2**20
_FEWEST_ROWS = 256

# A function of a tap, the columns that have a pair through it, and the rows that they meet [P, C].
Use = Callable[[int, Tensor | slice, Tensor], None]


def rows_in_cache(channels: int, dtype: torch.dtype) -> int:
    """Return the number of rows of ``channels`` channels to work on at a time."""
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
    panels: object = None,
    count: Tensor | None = None,
    in_count: Tensor | None = None,
) -> Tensor:
    """Multiply and sum panel by panel of columns. Panels that are not torch's are listed first."""
    dtype = acc_dtype(feats.dtype)
    matrices = weight.to(dtype).unbind()
    out = sum_products(
        feats.to(dtype),
        matrices[::-1] if mirrored else matrices,
        panels if isinstance(panels, PairPanels) else PairPanels(rows),
        rows.shape[1],
    )
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
    if count is not None:
        clear_padding(out, count)
    return out.to(weight.dtype)


def clear_padding(rows: Tensor, count: Tensor) -> None:
    """Make all rows behind the first ``count`` zero, in place."""
    is_padding = torch.arange(rows.shape[0], device=rows.device) >= count
    rows.masked_fill_(is_padding.reshape(-1, *(1,) * (rows.ndim - 1)), 0)


def sum_products(
    feats: Tensor,
    matrices: Sequence[Tensor],
    panels: PairPanels,
    n: int,
    use: Use | None = None,
) -> Tensor:
    """Return for each of ``n`` columns the sum of ``feats[row] @ matrices[tap]`` over its pairs.

    Args:
        feats: [N, c_in].
        matrices: V of [c_in, c_out], of the same dtype.
        panels: The pairs.
        n: Number of columns of all panels.
        use: Called with gathered rows while they are in the cache.
    """
    c_in, c_out = matrices[0].shape
    out = feats.new_empty(n, c_out)
    listed, identity = panels.listed(max(c_in, c_out)), panels.identity
    # Reuse memory: it stays in the cache, and the system clears new memory page by page.
    at_once = rows_in_cache(c_in, feats.dtype)
    products = out.new_empty(max((len(panel.rows) for panel in listed), default=0), c_out)
    gathered = out.new_empty(min(max(at_once, largest_tap(listed)), len(products)), c_in)
    # Autocast would round the operands of these products once more.
    with torch.autocast(feats.device.type, enabled=False):
        start = 0
        for panel in listed:
            end = start + len(panel.ends) - 1
            made, sums = products[: len(panel.rows)], out[start:end]
            _multiply(feats, matrices, panel, gathered, made, use)
            if identity is not None:
                # The rows are in column order, and their products are too.
                torch.mm(feats[start:end], matrices[identity], out=sums)
                sums += _sum_by_column(made, panel)
                if use is not None:
                    use(identity, slice(start, end), feats[start:end])
            elif panel.is_one_each:
                torch.index_select(made, 0, panel.by_column, out=sums)
            else:
                sums.copy_(_sum_by_column(made, panel))
            start = end
    return out


def _normalise(out: Tensor, norm: ChannelNorm) -> None:
    """Normalise ``out`` [n_out, c_out] in place."""
    out -= norm.mean
    out *= norm.scale(out.dtype)
    if norm.bias is not None:
        out += norm.bias


def _multiply(
    feats: Tensor,
    matrices: Sequence[Tensor],
    panel: PairPanel,
    gathered: Tensor,
    out: Tensor,
    use: Use | None,
) -> None:
    """Write the product of each pair of a panel to ``out`` [P, c_out]; ``gathered`` is scratch."""
    start = 0
    for first, stop in _runs(panel.counts, gathered.shape[0]):
        counts = panel.counts[first:stop]
        end = start + sum(counts)
        operands = gathered[: end - start]
        torch.index_select(feats, 0, panel.rows[start:end], out=operands)
        products, columns = out[start:end], panel.columns[start:end]
        for tap, begin, last in taken_taps(counts):
            operand = operands[begin:last]
            torch.mm(operand, matrices[first + tap], out=products[begin:last])
            if use is not None:
                use(first + tap, columns[begin:last], operand)
        start = end


def _runs(counts: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield first and last of runs of taps: one tap, or several with at most ``most`` pairs."""
    first = held = 0
    for tap, count in enumerate(counts):
        if held and held + count > most:
            yield first, tap
            first, held = tap, 0
        held += count
    yield first, len(counts)


def _sum_by_column(products: Tensor, panel: PairPanel) -> Tensor:
    """Return the sum of each column's products, in the order of taps."""
    return F.embedding_bag(
        panel.by_column, products, panel.ends, mode="sum", include_last_offset=True
    )
