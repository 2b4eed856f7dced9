"""Coordinates: grids, keys and sets of active sites."""

from tritonspconv.coords.active_sites import ActiveSites
from tritonspconv.coords.grid import Grid

__all__ = ["ActiveSites", "Grid"]
