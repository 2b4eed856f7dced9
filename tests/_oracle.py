"""The expected maps by the brute-force reference, and the engine's maps, as plain triples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonspconv import reference
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import KernelMap
from tritonspconv.kernels.eager.invert_table import mask_words
from tritonspconv.reference import Box, Triple


def box_of(grid: Grid) -> Box:
    return Box(grid.lower, grid.shape, grid.batch_size)


def fields(geometry: ConvGeometry) -> tuple[Sequence[int], ...]:
    """Return the arguments that both functions of the reference take."""
    return geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation


def expected_out_coords(sites: ActiveSites, geometry: ConvGeometry) -> Tensor:
    """Return the coordinates of the output rows that ``geometry`` chooses."""
    if geometry.sites == "same":
        return sites.coords.cpu()
    grid = sites.grid
    out_box = None
    if grid.bounded:
        out_box = Box((0,) * grid.ndim, geometry.output_shape(grid.shape), grid.batch_size)
    if geometry.taps:
        # One tap at a time, because the box around the taps has further taps.
        ones = (1,) * grid.ndim
        reached = [
            reference.output_sites(
                sites.coords, ones, geometry.stride, padding, ones, transposed=geometry.transposed
            )
            for padding in _paddings(geometry)
        ]
        return torch.cat(reached).unique(dim=0)
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
    """Return every triple of a map from ``in_sites`` to ``out_sites``."""
    size, stride, padding, dilation = fields(geometry)
    first: list[int] = []
    if geometry.taps:
        first = [min(axis) for axis in zip(*geometry.taps, strict=True)]
        padding = [-d * f for d, f in zip(dilation, first, strict=True)]
    triples = reference.relation(
        in_sites.coords,
        out_sites.coords,
        size,
        stride,
        padding,
        dilation,
        transposed=geometry.transposed,
        tap_order=geometry.tap_order,
        submanifold=geometry.sites == "same",
        in_box=box_of(in_sites.grid),
        out_box=box_of(out_sites.grid),
    )
    if not geometry.taps:
        return triples
    # Triples of the box around the taps, without those of taps that the window lacks.
    box = reference.taps(size, geometry.tap_order)
    places: dict[int, list[int]] = {}
    for number, tap in enumerate(geometry.taps):
        at = box.index(tuple(x - f for x, f in zip(tap, first, strict=True)))
        places.setdefault(at, []).append(number)
    return [(i, o, place) for i, o, tap in triples for place in places.get(tap, ())]


def _paddings(geometry: ConvGeometry) -> list[list[int]]:
    """Return for each of a list of taps the padding of a window of that tap alone."""
    return [[-d * x for d, x in zip(geometry.dilation, tap, strict=True)] for tap in geometry.taps]


def map_triples(kmap: KernelMap) -> list[Triple]:
    """Return every triple that a kernel map should hold."""
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
    """Return the triples with inputs and outputs swapped."""
    return [(out_row, in_row, tap) for in_row, out_row, tap in triples]
