"""What the engine should do, by the brute-force reference, and what it did, as plain triples."""

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from tritonspconv import reference
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import KernelMap
from tritonspconv.kernels.eager.invert_table import mask_words
from tritonspconv.reference import Box, Triple

# Brute force takes time in proportion to rows times taps.
MAX_VOLUME = 250


def box_of(grid: Grid) -> Box:
    return Box(grid.lower, grid.shape, grid.batch_size)


def fields(geometry: ConvGeometry) -> tuple[Sequence[int], ...]:
    """The arguments of the reference that both of its functions take."""
    return geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation


def expected_out_coords(sites: ActiveSites, geometry: ConvGeometry) -> Tensor:
    """Coordinates of the output rows that ``geometry`` chooses."""
    if geometry.sites == "same":
        return sites.coords.cpu()
    grid = sites.grid
    out_box = None
    if grid.bounded:
        out_box = Box((0,) * grid.ndim, geometry.output_shape(grid.shape), grid.batch_size)
    return reference.output_sites(
        sites.coords,
        *fields(geometry),
        transposed=geometry.transposed,
        rule=geometry.sites,
        in_box=box_of(grid),
        out_box=out_box,
    )


def expected_triples(
    in_sites: ActiveSites, out_sites: ActiveSites, geometry: ConvGeometry
) -> list[Triple]:
    """Every triple of a map from ``in_sites`` to ``out_sites``."""
    return reference.relation(
        in_sites.coords,
        out_sites.coords,
        *fields(geometry),
        transposed=geometry.transposed,
        tap_order=geometry.tap_order,
        submanifold=geometry.sites == "same",
        in_box=box_of(in_sites.grid),
        out_box=box_of(out_sites.grid),
    )


def map_triples(kmap: KernelMap) -> list[Triple]:
    """Every triple that a kernel map is expected to hold."""
    if kmap.is_inverse:
        return swapped(map_triples(kmap.inverse()))
    return expected_triples(kmap.in_sites, kmap.out_sites, kmap.geometry)


def table_triples(table, volume: int | None = None) -> list[Triple]:
    """Decode a neighbour table into ``(entry, row, tap)``; check that masks and order agree."""
    rows = (table.rows if volume is None else table.entries(volume)).cpu()
    mask = mask_words(rows) if table.mask is None else table.mask.cpu()
    volume, n = rows.shape
    assert rows.dtype == mask.dtype == torch.int32
    assert mask.shape == (-(-volume // 32), n)
    order = list(range(n))
    if table.order is not None:
        assert table.order.dtype == torch.int32
        order = table.order.tolist()
        assert sorted(order) == list(range(n))

    taps = torch.arange(volume)
    bits = (mask[taps // 32] >> (taps % 32)[:, None]) & 1
    torch.testing.assert_close(bits.bool(), rows >= 0, msg="mask and rows disagree")
    spare = -(-volume // 32) * 32 - volume
    if spare and n:
        unused = (mask[-1].long() & 0xFFFFFFFF) >> (32 - spare)
        assert not unused.any(), "mask bits beyond the last tap are set"
    assert (rows >= -1).all()

    present = (rows >= 0).nonzero().tolist()
    tap_of = (lambda v: volume - 1 - v) if table.mirrored else (lambda v: v)
    return [(int(rows[v, c]), order[c], tap_of(v)) for v, c in present]


def pair_triples(in_rows: Tensor, out_rows: Tensor, tap_ptr: Tensor) -> list[Triple]:
    """Decode pair lists, one range per tap."""
    ends = tap_ptr.tolist()
    taps = [v for v in range(len(ends) - 1) for _ in range(ends[v], ends[v + 1])]
    total = ends[-1]
    return list(zip(in_rows.tolist()[:total], out_rows.tolist()[:total], taps, strict=True))


def swapped(triples: list[Triple]) -> list[Triple]:
    """The same triples seen from the other side."""
    return [(out_row, in_row, tap) for in_row, out_row, tap in triples]


@st.composite
def geometries(draw, ndim: int | None = None, rules=("same", "reached", "cells")) -> ConvGeometry:
    """Draw a geometry of 1 to 5 axes, with at most `MAX_VOLUME` taps."""
    ndim = ndim or draw(st.integers(1, 5))
    per_axis = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * ndim))  # noqa: E731
    rule = draw(st.sampled_from(rules))
    kernel_size = per_axis(1, {1: 7, 2: 5, 3: 4}.get(ndim, 3))
    while math.prod(kernel_size) > MAX_VOLUME:
        kernel_size = tuple(max(k - 1, 1) for k in kernel_size)
    dilation = per_axis(1, 3)
    tap_order = draw(st.sampled_from(["last_axis_fastest", "first_axis_fastest"]))
    if rule == "same":
        centred = ConvGeometry.submanifold(kernel_size, dilation, tap_order)
        if draw(st.booleans()):
            return centred
        padding = tuple(
            p if k % 2 else 0 for k, p in zip(kernel_size, centred.padding, strict=True)
        )
        return ConvGeometry(
            kernel_size, (1,) * ndim, padding, dilation, sites="same", tap_order=tap_order
        )
    transposed = rule == "reached" and draw(st.booleans())
    return ConvGeometry(
        kernel_size,
        per_axis(1, 4),
        per_axis(-1, 4),
        dilation,
        transposed=transposed,
        sites=rule,
        tap_order=tap_order,
        output_padding=per_axis(0, 1) if transposed else (),
    )


@st.composite
def site_sets(draw, ndim: int, bounded: bool | None = None, device="cpu") -> ActiveSites:
    """Draw up to 24 rows: repeated, negative, outside the grid where there is one, none at all."""
    bounded = draw(st.booleans()) if bounded is None else bounded
    cell = st.integers(-1, 8) if bounded else st.integers(-9, 9)
    batch = st.integers(-1, 2) if bounded else st.integers(0, 2)
    rows = draw(st.lists(st.tuples(batch, *[cell] * ndim), max_size=24))
    coords = torch.tensor(rows, dtype=torch.int32).reshape(len(rows), 1 + ndim)
    if bounded:
        shape = draw(st.tuples(*[st.integers(1, 8)] * ndim))
        grid = Grid((0,) * ndim, shape, draw(st.integers(1, 3)))
    else:
        grid = Grid.around(coords)
    return ActiveSites(coords.to(device), grid)
