"""The brute-force reference: every operation in loops that a reader can check by eye.

Pure torch on the CPU, for any float dtype (float64 is the one to trust), differentiable and slow.
It shares no code with the package that it judges: every rule is written here a second time.

Sites are rows ``(batch, x0, .., x_{D-1})``. A *triple* ``(in_row, out_row, tap)`` says that an
output row reads an input row through one tap of the window; a list of triples is a kernel map.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Triple = tuple[int, int, int]
Site = tuple[int, ...]


class Box(NamedTuple):
    """The cells that count: sites outside take no part.

    Attributes:
        lower: Smallest coordinate of each axis, inclusive.
        shape: Number of cells along each axis.
        batch_size: Number of samples.
    """

    lower: tuple[int, ...]
    shape: tuple[int, ...]
    batch_size: int

    def holds(self, site: Site) -> bool:
        """Return whether ``site`` lies in the box."""
        batch, *cell = site
        axes = zip(self.lower, self.shape, cell, strict=True)
        return 0 <= batch < self.batch_size and all(lo <= x < lo + n for lo, n, x in axes)


def taps(kernel_size: Sequence[int], tap_order: str = "last_axis_fastest") -> list[Site]:
    """Return the position of every tap in the window, in the order of the weight's first axis."""
    positions = list(itertools.product(*(range(k) for k in kernel_size)))
    if tap_order == "first_axis_fastest":
        positions.sort(key=lambda position: position[::-1])
    return positions


def relation(
    in_coords: Tensor,
    out_coords: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    transposed: bool = False,
    tap_order: str = "last_axis_fastest",
    submanifold: bool = False,
    in_box: Box | None = None,
    out_box: Box | None = None,
) -> list[Triple]:
    """Return every triple with ``fine = stride * coarse - padding + dilation * tap``.

    Outputs are coarse and inputs fine; ``transposed`` swaps the two. If several rows of a side
    share a site, the lowest row represents the site. The other rows, and rows outside the boxes,
    take no part.

    Args:
        in_coords: Input sites, int ``[n_in, 1 + D]``.
        out_coords: Output sites, int ``[n_out, 1 + D]``.
        kernel_size: Taps per axis.
        stride: Fine cells per coarse cell, per axis.
        padding: Shift of the window, in fine cells, per axis.
        dilation: Fine cells between taps, per axis.
        transposed: Inputs are coarse and outputs fine.
        tap_order: ``"last_axis_fastest"`` or ``"first_axis_fastest"``.
        submanifold: Inputs and outputs are the same rows: a row that takes no part sees itself,
            through the tap whose offset is zero, and nothing else.
        in_box: Input rows outside it take no part.
        out_box: Output rows outside it take no part.

    Returns:
        Triples in ascending ``(tap, out_row)``.
    """
    in_rows = _row_of_site(in_coords, in_box)
    out_rows = _row_of_site(out_coords, out_box)
    idle = sorted(set(range(len(out_coords))) - set(out_rows.values()))
    link = _coarse_of if transposed else _fine_of

    triples = []
    for tap, position in enumerate(taps(kernel_size, tap_order)):
        for site, out_row in out_rows.items():
            partner = link(site, position, stride, padding, dilation)
            if partner in in_rows:
                triples.append((in_rows[partner], out_row, tap))
        offset = [d * t - p for t, p, d in zip(position, padding, dilation, strict=True)]
        if submanifold and not any(offset):
            triples.extend((row, row, tap) for row in idle)
    return sorted(triples, key=lambda triple: (triple[2], triple[1]))


def output_sites(
    in_coords: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    transposed: bool = False,
    rule: Literal["reached", "cells"] = "reached",
    in_box: Box | None = None,
    out_box: Box | None = None,
) -> Tensor:
    """Return the sites an operation writes, int32 ``[n_out, 1 + D]``, ascending, each once.

    ``"reached"``: every site that some input feeds through some tap, as a dense layer would have a
    non-zero there. ``"cells"``: the cells ``floor(fine / stride)`` that hold an input. In a bounded
    space ``out_box`` cuts off sites beyond the output; without ``out_box`` the space has no end.
    """
    found: set[Site] = set()
    for site in _sites(in_coords):
        if in_box is not None and not in_box.holds(site):
            continue
        if rule == "cells":
            batch, *cell = site
            found.add((batch, *(x // s for x, s in zip(cell, stride, strict=True))))
            continue
        for position in taps(kernel_size):
            link = _fine_of if transposed else _coarse_of
            partner = link(site, position, stride, padding, dilation)
            if partner is not None:
                found.add(partner)
    kept = sorted(site for site in found if out_box is None or out_box.holds(site))
    return torch.tensor(kept, dtype=torch.int32).reshape(len(kept), in_coords.shape[1])


def conv(
    feats: Tensor,
    weight: Tensor,
    triples: Iterable[Triple],
    n_out: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Return ``out[o] = bias + sum(feats[i] @ weight[v] for (i, o, v) in triples)``.

    Args:
        feats: ``[n_in, c_in]``.
        weight: ``[V, c_in, c_out]``.
        triples: The kernel map.
        n_out: Number of output rows.
        bias: ``[c_out]``.

    Returns:
        ``[n_out, c_out]``; a row without triples is the bias.
    """
    out = feats.new_zeros(n_out, weight.shape[2])
    pairs = torch.tensor(list(triples), dtype=torch.int64).reshape(-1, 3)
    for tap, matrix in enumerate(weight):
        in_rows, out_rows, _ = pairs[pairs[:, 2] == tap].T
        out = out.index_add(0, out_rows, feats[in_rows] @ matrix)
    return out if bias is None else out + bias


def channel_norm(
    feats: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return ``(feats - mean) / sqrt(variance + eps) * weight + bias``, vectors ``[C]``."""
    out = (feats - mean) / (variance + eps).sqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def channelwise_conv(
    feats: Tensor, weight: Tensor, triples: Iterable[Triple], n_out: int
) -> Tensor:
    """Return ``out[o] = sum(feats[i] * weight[v] for (i, o, v) in triples)``; weight ``[V, C]``."""
    out = [feats.new_zeros(feats.shape[1]) for _ in range(n_out)]
    for in_row, out_row, tap in triples:
        out[out_row] = out[out_row] + feats[in_row] * weight[tap]
    return torch.stack(out) if out else feats.new_zeros(0, feats.shape[1])


def gather_weighted(feats: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Return ``out[m] = sum over k of weights[m, k] * feats[rows[m, k]]``; row -1 adds nothing."""
    out = []
    for row_list, weight_list in zip(rows.tolist(), weights, strict=True):
        total = feats.new_zeros(feats.shape[1])
        for row, weight in zip(row_list, weight_list, strict=True):
            if row >= 0:
                total = total + weight * feats[row]
        out.append(total)
    return torch.stack(out) if out else feats.new_zeros(0, feats.shape[1])


def pool(
    feats: Tensor,
    triples: Iterable[Triple],
    n_out: int,
    mode: Literal["max", "avg", "sum"],
    *,
    ties: Literal["all", "first"] = "first",
    floor: float | None = None,
) -> Tensor:
    """Reduce the inputs of every output row, channel by channel.

    Args:
        feats: ``[n_in, C]``.
        triples: The kernel map.
        n_out: Number of output rows.
        mode: ``"max"``; ``"sum"``; ``"avg"``: the sum over the number of inputs present.
        ties: The inputs that get the gradient of a maximum that several share: ``"all"`` of them,
            each in full, or the ``"first"`` in tap order.
        floor: A lower bound on a maximum. An input equal to it still gets the gradient; where every
            input lies below it, none does.

    Returns:
        ``[n_out, C]``; a row without inputs is ``floor`` if given, else 0.
    """
    inputs: list[list[int]] = [[] for _ in range(n_out)]
    for in_row, out_row, _ in sorted(triples, key=lambda triple: triple[2]):
        inputs[out_row].append(in_row)

    out = []
    for rows in inputs:
        if mode == "max":
            columns = [
                _max_of([feats[row, channel] for row in rows], feats, ties, floor)
                for channel in range(feats.shape[1])
            ]
            out.append(torch.stack(columns) if columns else feats.new_zeros(0))
        else:
            total = feats[rows].sum(0)
            out.append(total / max(len(rows), 1) if mode == "avg" else total)
    return torch.stack(out) if out else feats.new_zeros(0, feats.shape[1])


def global_pool(
    feats: Tensor, batch: Tensor, batch_size: int, mode: Literal["max", "avg", "sum"]
) -> Tensor:
    """Reduce all rows of each sample; ``[batch_size, C]``, 0 for a sample without rows."""
    triples = [(row, sample, 0) for row, sample in enumerate(batch.tolist())]
    return pool(feats, triples, batch_size, mode)


def to_dense(feats: Tensor, coords: Tensor, box: Box) -> Tensor:
    """Return zeros ``[batch_size, C, *shape]`` with the rows written in; a later row overwrites."""
    rows: dict[Site, int] = {}
    for row, site in enumerate(_sites(coords)):
        if box.holds(site):
            rows[site] = row
    dense = feats.new_zeros(box.batch_size, *box.shape, feats.shape[1])
    if rows:
        axes = zip(*rows, strict=True)
        shifted = [torch.tensor(x) - lo for x, lo in zip(axes, (0, *box.lower), strict=True)]
        dense = dense.index_put(tuple(shifted), feats[list(rows.values())])
    return dense.movedim(-1, 1)


def voxelize(
    coords: Tensor, feats: Tensor, mode: Literal["max", "avg", "sum", "first"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the rows that share a site.

    Args:
        coords: Sites of the rows, int ``[N, 1 + D]``, with repeats.
        feats: ``[N, C]``.
        mode: The rule by which the rows of a site combine.

    Returns:
        ``(sites, feats, site_of_row)``: int32 ``[M, 1 + D]`` ascending, ``[M, C]``, int64 ``[N]``.
    """
    rows = _sites(coords)
    sites = sorted(set(rows))
    index = {site: position for position, site in enumerate(sites)}
    triples = [(row, index[site], 0) for row, site in enumerate(rows)]
    if mode == "first":
        first = {out_row: in_row for in_row, out_row, _ in reversed(triples)}
        merged = feats[[first[out_row] for out_row in range(len(sites))]]
    else:
        merged = pool(feats, triples, len(sites), mode)
    unique = torch.tensor(sites, dtype=torch.int32).reshape(len(sites), coords.shape[1])
    return unique, merged, torch.tensor([index[site] for site in rows], dtype=torch.int64)


def _row_of_site(coords: Tensor, box: Box | None) -> dict[Site, int]:
    row_of: dict[Site, int] = {}
    for row, site in enumerate(_sites(coords)):
        if box is None or box.holds(site):
            row_of.setdefault(site, row)
    return row_of


def _sites(coords: Tensor) -> list[Site]:
    return [tuple(row) for row in coords.tolist()]


def _fine_of(
    site: Site, tap: Site, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Site:
    batch, *coarse = site
    axes = zip(coarse, tap, stride, padding, dilation, strict=True)
    return (batch, *(s * x - p + d * t for x, t, s, p, d in axes))


def _coarse_of(
    site: Site, tap: Site, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Site | None:
    """Solve the relation for the coarse site; None where it is no whole number."""
    batch, *fine = site
    coarse = []
    for x, t, s, p, d in zip(fine, tap, stride, padding, dilation, strict=True):
        quotient, remainder = divmod(x + p - d * t, s)
        if remainder:
            return None
        coarse.append(quotient)
    return (batch, *coarse)


def _max_of(values: list[Tensor], feats: Tensor, ties: str, floor: float | None) -> Tensor:
    """Return the largest value, wired so that autograd sends the gradient where ``ties`` says."""
    least = -math.inf if floor is None else floor
    largest = max((value.item() for value in values), default=-math.inf)
    winners = [value for value in values if value == largest and value >= least]
    if not winners:
        return feats.new_tensor(0.0 if floor is None else floor)
    first, *others = winners
    if ties == "all":
        # Adds zero to the value and one to each winner's gradient.
        for value in others:
            first = first + (value - value.detach())
    return first
