"""Helpers for tests, examples and measurements: made-up sites and scans, the tolerance rule."""

from tritonspconv.testing.sites import block_sites, random_sites, surface_sites
from tritonspconv.testing.tolerance import assert_close, assert_matches, tolerance

__all__ = [
    "assert_close",
    "assert_matches",
    "block_sites",
    "random_sites",
    "surface_sites",
    "tolerance",
]
