"""Helpers of ``MinkowskiEngine.utils``: quantisation, collation, initial weights, summaries."""

from compat.minkowski.utils.collation import (
    SparseCollation,
    batch_sparse_collate,
    batched_coordinates,
    sparse_collate,
)
from compat.minkowski.utils.init import kaiming_normal_
from compat.minkowski.utils.quantization import (
    fnv_hash_vec,
    ravel_hash_vec,
    sparse_quantize,
    unique_coordinate_map,
)
from compat.minkowski.utils.summary import summary

__all__ = [
    "SparseCollation",
    "batch_sparse_collate",
    "batched_coordinates",
    "fnv_hash_vec",
    "kaiming_normal_",
    "ravel_hash_vec",
    "sparse_collate",
    "sparse_quantize",
    "summary",
    "unique_coordinate_map",
]
