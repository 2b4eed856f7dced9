"""Coordinates: grids, keys and sets of active sites."""

from tritonspconv.coords.active_sites import ActiveSites
from tritonspconv.coords.grid import Grid
from tritonspconv.coords.site_sets import (
    select_sites,
    union_sites,
    unique_rows,
    unique_sites,
)

__all__ = ["ActiveSites", "Grid", "select_sites", "union_sites", "unique_rows", "unique_sites"]
