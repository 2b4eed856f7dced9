"""Public functions on features, sites and kernel maps."""

from tritonspconv.ops.conv import sparse_conv
from tritonspconv.ops.dense import from_dense, to_dense
from tritonspconv.ops.global_pool import global_broadcast, global_pool
from tritonspconv.ops.pool import sparse_pool
from tritonspconv.ops.voxelize import Voxels, voxelize

__all__ = [
    "Voxels",
    "from_dense",
    "global_broadcast",
    "global_pool",
    "sparse_conv",
    "sparse_pool",
    "to_dense",
    "voxelize",
]
