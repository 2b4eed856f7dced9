"""From coordinate maps and a window to the engine's geometry, output sites and kernel maps.

MinkowskiEngine's relation is ``fine = coarse + dilation * tensor_stride * tap`` in input units,
with the tensor stride of the fine side. In cells of the fine side it is the engine's.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from compat.minkowski._coordinate_map import (
    CoordinateMap,
    IntTuple,
    check_fits,
    common_unit,
    scaled,
)
from compat.minkowski._errors import MinkowskiError
from compat.minkowski.enums import RegionType
from compat.minkowski.MinkowskiKernelGenerator import Window
from tritonspconv.coords import ActiveSites
from tritonspconv.coords.row_tensor import RowBounds
from tritonspconv.geometry import ConvGeometry, SiteRule
from tritonspconv.kernel_map import KernelMap, kernel_map, output_sites


def map_between(fine: CoordinateMap, coarse: CoordinateMap, window: Window) -> KernelMap:
    """Return the kernel map of a window from fine to coarse sites."""
    sites, stride, unit = _in_cells(fine, coarse)
    if fine is coarse:
        return kernel_map(sites, _geometry(window, stride, _step(window, fine, unit), "same"))
    geometry = _geometry(window, stride, _step(window, fine, unit), "cells")
    return kernel_map(sites, geometry, out_sites=coarse.sites)


def transposed_map_between(coarse: CoordinateMap, fine: CoordinateMap, window: Window) -> KernelMap:
    """Return the kernel map of a window from coarse to fine sites."""
    if fine is coarse:
        return map_between(fine, coarse, window).inverse()
    sites, stride, unit = _in_cells(fine, coarse)
    geometry = _geometry(window, stride, _step(window, fine, unit), "reached")
    geometry = dataclasses.replace(geometry, transposed=True)
    return kernel_map(coarse.sites, geometry, out_sites=sites)


def cell_map_between(fine: CoordinateMap, coarse: CoordinateMap) -> KernelMap:
    """Return the map that takes every fine site to the one cell of the coarse stride it is in."""
    sites, stride, unit = _in_cells(fine, coarse)
    extent = tuple(
        max(step // cell, 1) for step, cell in zip(coarse.tensor_stride, unit, strict=True)
    )
    # Cells begin at their coordinate: the window has no centre.
    geometry = ConvGeometry(
        kernel_size=extent,
        stride=stride,
        padding=(0,) * len(extent),
        dilation=(1,) * len(extent),
        sites="cells",
        tap_order="first_axis_fastest",
    )
    return kernel_map(sites, geometry, out_sites=coarse.sites)


def strided_sites(fine: CoordinateMap, tensor_stride: IntTuple) -> CoordinateMap:
    """Return the map of the occupied cells of a coarser tensor stride."""
    stride = tuple(new // own for new, own in zip(tensor_stride, fine.unit, strict=True))
    ones = (1,) * len(stride)
    geometry = ConvGeometry(ones, stride, (0,) * len(stride), ones, sites="cells")
    return _made_map(fine, geometry, tensor_stride, tensor_stride)


def expanded_sites(fine: CoordinateMap, tensor_stride: IntTuple, window: Window) -> CoordinateMap:
    """Return the map of all ``site + tap`` that are multiples of a tensor stride."""
    stride = tuple(new // own for new, own in zip(tensor_stride, fine.unit, strict=True))
    # The engine's coarse sites are fine sites minus offsets.
    mirrored = [tuple(-x for x in tap) for tap in window.taps()]
    step = _step(window, fine, fine.unit)
    geometry = ConvGeometry.of_taps(mirrored, stride, step)
    return _made_map(fine, geometry, tensor_stride, tensor_stride)


def generated_sites(
    coarse: CoordinateMap, tensor_stride: IntTuple, window: Window
) -> CoordinateMap:
    """Return the map of all ``site + tap`` at a finer tensor stride.

    Where no two sites reach one, rows come site by site, and the taps of a site in their order.
    """
    unit = common_unit(coarse.unit, tensor_stride)
    stride = tuple(own // new for own, new in zip(coarse.unit, unit, strict=True))
    step = tuple(
        d * ts // cell for d, ts, cell in zip(window.dilation, tensor_stride, unit, strict=True)
    )
    geometry = _geometry(window, stride, step, "reached")
    geometry = dataclasses.replace(geometry, transposed=True)
    if not _reach_apart(geometry):
        return _made_map(coarse, geometry, tensor_stride, unit)
    grid = coarse.sites.grid
    box = geometry.output_range(grid.lower, grid.upper)
    offsets = tuple((0, *offset) for offset in geometry.offsets)
    bounds, device = coarse.sites.bounds, coarse.sites.device
    if bounds is None:
        taps = torch.tensor(offsets, dtype=torch.int32, device=device)
    else:
        taps = bounds.plan.constant(*offsets)
        if bounds.count is not None:
            bounds = RowBounds(bounds.count * len(offsets), bounds.plan)
    reached = (scaled(coarse.sites.coords, stride)[:, None] + taps).flatten(0, 1)
    sites = ActiveSites(reached, grid.with_box(*box), bounds=bounds)
    sites.note_repeats(False)
    return CoordinateMap(sites, tensor_stride, unit, coarse.batch_is_known_to_ascend)


def _reach_apart(geometry: ConvGeometry) -> bool:
    """Return whether no two coarse sites reach one fine site through any taps."""
    remainders = {
        tuple(x % step for x, step in zip(offset, geometry.stride, strict=True))
        for offset in geometry.offsets
    }
    return len(remainders) == geometry.kernel_volume


def _made_map(
    source: CoordinateMap, geometry: ConvGeometry, tensor_stride: IntTuple, unit: IntTuple
) -> CoordinateMap:
    """Return the map of the sites that a geometry's rule makes, ascending.

    Raises:
        MinkowskiError: Their coordinates would not fit int32.
    """
    grid = source.sites.grid
    if source.num_rows:
        check_fits(*geometry.output_range(grid.lower, grid.upper), unit)
    return CoordinateMap(output_sites(source.sites, geometry), tensor_stride, unit, ascends=True)


def _in_cells(fine: CoordinateMap, coarse: CoordinateMap) -> tuple[ActiveSites, IntTuple, IntTuple]:
    """Return the fine sites in a unit that divides the coarse one, the quotient, and that unit."""
    unit = common_unit(fine.unit, coarse.unit)
    stride = tuple(own // cell for own, cell in zip(coarse.unit, unit, strict=True))
    return fine.sites_in(unit), stride, unit


def _step(window: Window, fine: CoordinateMap, unit: IntTuple) -> IntTuple:
    """Return the cells between neighbouring taps.

    Raises:
        MinkowskiError: The fine side is an origin, whose tensor stride is 0.
    """
    if min(fine.tensor_stride) < 1:
        raise MinkowskiError(
            f"tensor stride {list(fine.tensor_stride)} leaves no room for a window: a global "
            "pool's output has one site per sample. Use kernel_size=1, or MinkowskiBroadcast."
        )
    axes = zip(window.dilation, fine.tensor_stride, unit, strict=True)
    return tuple(dilation * stride // cell for dilation, stride, cell in axes)


@functools.lru_cache(maxsize=1024)
def _geometry(window: Window, stride: IntTuple, step: IntTuple, sites: SiteRule) -> ConvGeometry:
    if window.region_type != RegionType.HYPER_CUBE:
        return ConvGeometry.of_taps(window.taps(), stride, step, sites=sites)
    return ConvGeometry(
        kernel_size=window.kernel_size,
        stride=stride,
        padding=tuple(
            s * (k // 2) if k % 2 else 0 for s, k in zip(step, window.kernel_size, strict=True)
        ),
        dilation=step,
        sites=sites,
        tap_order="first_axis_fastest",
    )
