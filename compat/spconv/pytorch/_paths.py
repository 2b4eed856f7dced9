"""Paths: the layers that lead from one set of sites to another, as text.

Compiled graphs hold constants and tensors. So a graph names the sites of a level by the sites of
its input and the windows of the layers between. A step is a letter and whole numbers, one for each
axis: ``"S kernel dilation;"`` of a submanifold layer, ``"C kernel stride padding dilation
output_padding;"`` of a convolution, and the same with ``"T"`` of a transposed one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from compat.spconv.pytorch._errors import SpconvError
from compat.spconv.pytorch._windows import output_size, window
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import KernelMap, kernel_map


def step_of(layer: Any) -> str:
    """Return the window of a layer as one step of a path."""
    # Each number that is read here is a guard of the graph, which every call pays for.
    if layer.subm:
        letter, numbers = "S", [*layer.kernel_size, *layer.dilation]
    else:
        letter = "T" if layer.transposed else "C"
        numbers = [
            *layer.kernel_size, *layer.stride, *layer.padding, *layer.dilation,
            *layer.output_padding,
        ]  # fmt: skip
    return " ".join([letter, *[str(number) for number in numbers]]) + ";"


def map_along(root: ActiveSites, route: str) -> KernelMap:
    """Return the map of the last step of a route that starts at ``root``."""
    path, own = split(route)
    return map_at(sites_along(root, path), own)


def map_at(sites: ActiveSites, step: str) -> KernelMap:
    """Return the map of a step from ``sites``."""
    return map_of_window(sites, _window(step))


def sites_along(root: ActiveSites, path: str) -> ActiveSites:
    """Return the sites to which a path leads; ``root`` keeps them."""
    if not path:
        return root
    if root.walks is None:
        root.walks = {}
    walk = root.walks.get(path)
    if walk is None or any(sites.version != version for sites, version in walk):
        before, own = split(path)
        last = map_at(sites_along(root, before), own).out_sites
        walk = root.walks[path] = (*root.walks.get(before, ()), (last, last.version))
    return walk[-1][0]


@lru_cache(maxsize=1024)
def split(route: str) -> tuple[str, str]:
    """Return a route without its last step, and the last step."""
    cut = route.rfind(";", 0, -1) + 1
    return route[:cut], route[cut:]


@lru_cache(maxsize=1024)
def _window(step: str) -> ConvGeometry:
    letter, *texts = step.rstrip(";").split()
    numbers = tuple(map(int, texts))
    ndim = len(numbers) // (2 if letter == "S" else 5)
    parts = [numbers[start : start + ndim] for start in range(0, len(numbers), ndim)]
    if letter == "S":
        kernel_size, dilation = parts
        ones = (1,) * ndim
        return window(kernel_size, ones, ones, dilation, ones, subm=True, transposed=False)
    return window(*parts, subm=False, transposed=letter == "T")


def map_of_window(sites: ActiveSites, geometry: ConvGeometry) -> KernelMap:
    """Return the map of a window; the outputs lie in the grid that spconv gives the layer.

    Raises:
        SpconvError: The grid of the outputs has too many cells, or cells that int32 cannot number.
    """
    try:
        if not geometry.transposed:
            return kernel_map(sites, geometry)
        # The extents of spconv's transposed layers ignore dilation. The engine's include it.
        grid = sites.grid
        out_grid = _grid(out_shape_of(grid.shape, geometry), grid.batch_size)
        return kernel_map(sites, geometry, out_grid=out_grid)
    except ValueError as error:
        raise SpconvError(str(error)) from error


@lru_cache(maxsize=1024)
def out_shape_of(shape: tuple[int, ...], geometry: ConvGeometry) -> tuple[int, ...]:
    """Return the extents of a strided layer's outputs, which may be less than 1."""
    return output_size(
        shape, geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation,
        geometry.output_padding, transposed=geometry.transposed,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _grid(shape: tuple[int, ...], batch_size: int) -> Grid:
    return Grid((0,) * len(shape), shape, batch_size)
