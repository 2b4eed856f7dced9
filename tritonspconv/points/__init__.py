"""Point clouds: readers for the usual files, and a choice of voxel grid."""

from tritonspconv.points.grids import FINE, FRONT_CROP, SURROUND, VoxelGrid, voxel_range
from tritonspconv.points.scan import Scan, read_scan
from tritonspconv.points.table import parse_columns

__all__ = [
    "FINE",
    "FRONT_CROP",
    "SURROUND",
    "Scan",
    "VoxelGrid",
    "parse_columns",
    "read_scan",
    "voxel_range",
]
