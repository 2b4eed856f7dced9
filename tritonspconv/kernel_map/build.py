"""Building of kernel maps, and the cache that each set of sites owns."""

from __future__ import annotations

import functools
import weakref

from torch import Tensor

from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.coords.row_tensor import RowBounds
from tritonspconv.coords.site_plan import MapBuilder
from tritonspconv.geometry import ConvGeometry
from tritonspconv.guide import more
from tritonspconv.kernel_map.kernel_map import KernelMap, Relation
from tritonspconv.kernels.index import SiteIndex
from tritonspconv.kernels.neighbor_table import lookup_table, reach_table, reads_every_index
from tritonspconv.kernels.scatter_table import scatter_table, scatters
from tritonspconv.kernels.sites import reached_sites
from tritonspconv.kernels.table import NeighborTable
from tritonspconv.kernels.window import Box, window_corner


def kernel_map(
    sites: ActiveSites,
    geometry: ConvGeometry,
    *,
    out_sites: ActiveSites | None = None,
    out_grid: Grid | None = None,
) -> KernelMap:
    """Return the kernel map of ``geometry`` from ``sites``; built once and kept with the sites.

    Args:
        sites: The input sites.
        geometry: The relation, and the rule for output sites.
        out_sites: Output sites to use instead of the geometry's rule.
        out_grid: Grid of the generated output sites; None: derived from the input grid.

    Returns:
        The map; equal arguments return the same object as long as ``sites`` lives.

    Raises:
        ValueError: Dimensions, devices or batch sizes disagree, or the output grid has no cells.

    Example:
        >>> x = ts.SparseTensor.from_dense(torch.ones(1, 4, 1, 3))  # three cells in a row
        >>> window = ts.ConvGeometry.submanifold((3, 3), (1, 1))
        >>> ts.kernel_map(x.sites, window).num_pairs()  # each cell, and two pairs of neighbours
        7
    """
    key = (geometry, None if out_sites is None else weakref.ref(out_sites), out_grid)
    entry = sites.map_cache.get(key)
    if entry is None or entry.is_edited():
        _check(sites, geometry, out_sites, out_grid)
        entry = _build(sites, geometry, out_sites, out_grid)
        sites.map_cache[key] = entry
    found = entry.view() if entry.view else None
    if found is None:
        found = KernelMap(entry.relation, sites, entry.made_sites or out_sites or sites)
        entry.view = weakref.ref(found)
    return found


def recorded_maps(sites: ActiveSites) -> list[KernelMap]:
    """Return every map made so far from ``sites`` whose output sites are still alive."""
    found = []
    for geometry, given, out_grid in list(sites.map_cache):
        out_sites = None if given is None else given()
        if given is None or out_sites is not None:
            found.append(kernel_map(sites, geometry, out_sites=out_sites, out_grid=out_grid))
    return found


def inverse_maps(
    sites: ActiveSites, out_sites: ActiveSites, kernel_size: tuple[int, ...]
) -> list[KernelMap]:
    """Return the maps from ``sites`` back to ``out_sites``, from which an earlier layer came.

    Args:
        sites: The output sites of the earlier layer.
        out_sites: Its input sites.
        kernel_size: Its window.

    Returns:
        One map for each geometry with this window that led from ``out_sites`` to ``sites``.
    """
    return [
        found.inverse()
        for found in recorded_maps(out_sites)
        if found.out_sites is sites and found.geometry.kernel_size == kernel_size
    ]


class _CacheEntry:
    """An entry of ``ActiveSites.map_cache``: all of one map but its sites.

    Sites own their maps, so an entry holds no reference to the input sites, and none to output
    sites that a caller gave. Memory is then freed with the sites, and does not wait for the garbage
    collector.
    """

    __slots__ = ("_made_version", "made_sites", "relation", "view")

    def __init__(self, relation: Relation, made_sites: ActiveSites | None) -> None:
        self.relation = relation
        self.made_sites = made_sites
        self._made_version = None if made_sites is None else made_sites.version
        self.view: weakref.ref[KernelMap] | None = None

    def is_edited(self) -> bool:
        """Return whether the coordinates of the generated output sites were edited."""
        made = self.made_sites
        return made is not None and made.version != self._made_version


def _build(
    sites: ActiveSites,
    geometry: ConvGeometry,
    out_sites: ActiveSites | None,
    out_grid: Grid | None,
) -> _CacheEntry:
    if sites.bounds is not None and sites.bounds.plan.builder is not None:
        return _recorded(sites, geometry, out_sites, out_grid, sites.bounds.plan.builder)
    n_in = sites.num_rows
    if geometry.sites == "same" and out_sites is None and geometry.has_center:
        make_table = functools.partial(_look_up, geometry)
        relation = Relation(
            geometry, n_in, n_in, make_table(sites, sites), mirrored=geometry.is_mirrored,
            in_count=sites.count, make_table=make_table,
        )  # fmt: skip
        return _CacheEntry(relation, None)
    # Build this first: the repeat flag is read in the same synchronisation as the number of sites.
    # Inputs that write themselves need no index.
    in_index = None if geometry.feeds_one_output else sites.index
    made_sites = out_index = reached = None
    if geometry.sites == "same" and out_sites is None:
        out_sites = sites
    elif out_sites is None:
        out_sites, out_index, reached = _made_sites(sites, geometry, out_grid)
        made_sites = out_sites
    is_made = made_sites is not None
    table, repeats = _relate(geometry, sites, out_sites, is_made, in_index, out_index, reached)
    relation = Relation(
        geometry, n_in, out_sites.num_rows, table, repeats=repeats, in_count=sites.count,
        versions=(sites.version, out_sites.version),
        make_table=functools.partial(_relate_again, geometry, is_made),
    )  # fmt: skip
    return _CacheEntry(relation, made_sites)


def _look_up(geometry: ConvGeometry, sites: ActiveSites, _: ActiveSites) -> NeighborTable:
    """Return the table of a submanifold window with a centre."""
    return lookup_table(
        sites.coords, geometry.offsets, sites.index, sites.grid,
        distinct=not sites.may_repeat, count=sites.count,
    )  # fmt: skip


def _relate(
    geometry: ConvGeometry,
    sites: ActiveSites,
    out_sites: ActiveSites,
    is_made: bool,
    in_index: SiteIndex | None = None,
    out_index: SiteIndex | None = None,
    reached: Tensor | None = None,
) -> tuple[NeighborTable, Tensor | None]:
    """Return the table of the outputs between two sets of sites, and the flag of repeated inputs.

    Args:
        geometry: The geometry.
        sites: The sites of the inputs.
        out_sites: The sites of the outputs.
        is_made: The map generates the sites of the outputs.
        in_index: The index of the inputs, if the caller has it.
        out_index: The index of the outputs, if the caller has it.
        reached: The output that each input reaches, if the caller knows it.
    """
    if reached is not None or (geometry.feeds_one_output and scatters(sites.device)):
        return scatter_table(
            sites.coords,
            geometry.offsets,
            geometry.stride,
            not geometry.transposed,
            out_sites.index if out_index is None else out_index,
            sites.grid,
            out_sites.grid,
            out_sites.num_rows,
            count=out_sites.count,
            reached=reached,
        )
    # Sites that the map makes do not repeat.
    looks = not is_made or reads_every_index(sites.device)
    table = reach_table(
        out_sites.coords,
        geometry.offsets,
        geometry.stride,
        not geometry.transposed,
        sites.index if in_index is None else in_index,
        sites.grid,
        out_sites.grid,
        out_sites.index if looks and out_sites.may_repeat else None,
        count=out_sites.count,
    )
    return table, None


def _relate_again(
    geometry: ConvGeometry, is_made: bool, sites: ActiveSites, out_sites: ActiveSites
) -> NeighborTable:
    """Return the table of :func:`_relate` for a map that exists."""
    return _relate(geometry, sites, out_sites, is_made)[0]


def _recorded(
    sites: ActiveSites,
    geometry: ConvGeometry,
    out_sites: ActiveSites | None,
    out_grid: Grid | None,
    builder: MapBuilder,
) -> _CacheEntry:
    """Return the map that a builder makes of bounded sites; see :class:`MapBuilder`."""
    made_sites = None
    if out_sites is None and geometry.sites == "same":
        out_sites = sites
    elif out_sites is None:
        out_sites = made_sites = _made_sites(sites, geometry, out_grid)[0]
    return _CacheEntry(builder.relate(geometry, sites, out_sites), made_sites)


@functools.lru_cache(maxsize=1024)
def output_grid(grid: Grid, geometry: ConvGeometry) -> Grid:
    """Return the grid of a geometry's outputs.

    Raises:
        ValueError: A bounded output grid would have no cells along some axis, or int32 could not
            hold the coordinates of the outputs.
    """
    if not grid.bounded:
        lower, upper = geometry.output_range(grid.lower, grid.upper)
        if grid.num_cells and (min(lower) < -(2**31) or max(upper) > 2**31 - 1):
            raise ValueError(
                f"the outputs would have coordinates from {lower} to {upper}, which int32 cannot "
                f"hold: inputs from {grid.lower} to {grid.upper} under {geometry}. Shift the "
                "coordinates towards 0."
            )
        return grid.with_box(lower, upper)
    shape = geometry.output_shape(grid.shape)
    if min(shape) < 1:
        raise ValueError(
            f"the output would have spatial shape {shape}: input shape {grid.shape} is too small "
            f"for {geometry}." + more("small-grid")
        )
    if max(shape) > 2**31:
        raise ValueError(
            f"the output would have spatial shape {shape}, whose coordinates int32 cannot hold: "
            f"input shape {grid.shape} is too large for {geometry}."
        )
    return Grid((0,) * grid.ndim, shape, grid.batch_size)


def output_sites(
    sites: ActiveSites, geometry: ConvGeometry, out_grid: Grid | None = None
) -> ActiveSites:
    """Generate the output sites of a geometry's rule, ascending by key.

    Args:
        sites: The input sites.
        geometry: A geometry with the rule ``"reached"`` or ``"cells"``.
        out_grid: Grid of the output sites; None: derived from the input grid.

    This call waits for the device once, for the number of sites. :func:`kernel_map` generates sites
    itself. Call this function if several geometries are to write the same sites.
    """
    return _made_sites(sites, geometry, out_grid)[0]


def _made_sites(
    sites: ActiveSites, geometry: ConvGeometry, out_grid: Grid | None
) -> tuple[ActiveSites, SiteIndex | None, Tensor | None]:
    """Return the output sites, their index, and the output that each input reaches.

    The sites keep the index only if it is small. It is None if a builder makes the sites. The last
    value is None where it is not known; see ``ReachedSites``.
    """
    grid = out_grid or output_grid(sites.grid, geometry)
    stride = geometry.stride
    if geometry.sites == "cells":
        # A window as large as the stride reaches the cell that a site lies in, and no other.
        offsets = Box((0,) * sites.ndim, tuple(step - 1 for step in stride))
    else:
        offsets = geometry.offsets
    if sites.bounds is not None and sites.bounds.plan.builder is not None:
        divide = not geometry.transposed
        made = sites.bounds.plan.builder.make_sites(sites, offsets, stride, divide, grid)
        return made, None, None
    unread = sites.unread_repeats
    bounds, capacity, overflow = sites.bounds, None, None
    if bounds is not None and bounds.count is not None:
        capacity, overflow = bounds.plan.take()
        capacity = min(capacity, max(grid.num_cells, 1))
    out_coords, index, repeats, count, reached = reached_sites(
        sites.coords, offsets, stride, not geometry.transposed, grid, sites.grid, unread,
        capacity, overflow,
    )  # fmt: skip
    if repeats is not None:
        sites.note_repeats(repeats)
    if bounds is not None:
        if bounds.count is None:
            bounds.plan.record(len(out_coords))
        bounds = RowBounds(count, bounds.plan)
    is_beside = geometry.sites == "cells" and any(window_corner(geometry.offsets))
    if is_beside or not geometry.feeds_one_output:
        # An input feeds other outputs than the cell that it lies in.
        reached = None
    return ActiveSites(out_coords, grid, index, bounds), index, reached


def _check(
    sites: ActiveSites,
    geometry: ConvGeometry,
    out_sites: ActiveSites | None,
    out_grid: Grid | None,
) -> None:
    if geometry.ndim != sites.ndim:
        raise ValueError(
            f"the geometry has {geometry.ndim} axes but the sites have {sites.ndim}: {geometry}."
        )
    if out_sites is not None and out_grid is not None:
        raise ValueError("give out_sites or out_grid, not both: out_sites bring their own grid.")
    if out_sites is not None and (out_sites.device != sites.device or out_sites.ndim != sites.ndim):
        raise ValueError(
            f"out_sites must have {sites.ndim} axes on {sites.device}; got {out_sites.ndim} axes "
            f"on {out_sites.device}."
        )
    if out_grid is not None and out_grid.batch_size != sites.grid.batch_size:
        raise ValueError(
            f"out_grid must have the batch size of the sites, {sites.grid.batch_size}; got "
            f"{out_grid.batch_size}."
        )
    if geometry.sites == "same" and out_grid is not None:
        raise ValueError("a submanifold geometry keeps its input grid; out_grid must be None.")
