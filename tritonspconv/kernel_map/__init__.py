"""Kernel maps: which input row meets which output row under which tap."""

from tritonspconv.kernel_map.build import inverse_maps, kernel_map, output_sites, recorded_maps
from tritonspconv.kernel_map.from_pairs import map_from_pairs
from tritonspconv.kernel_map.kernel_map import KernelMap
from tritonspconv.kernels.table import NeighborTable, PairList

__all__ = [
    "KernelMap",
    "NeighborTable",
    "PairList",
    "inverse_maps",
    "kernel_map",
    "map_from_pairs",
    "output_sites",
    "recorded_maps",
]
