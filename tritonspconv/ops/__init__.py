"""Public functions on features, sites and kernel maps."""

from tritonspconv.kernels.channel_norm import ChannelNorm, TrainingNorm
from tritonspconv.ops import registered as _registered  # noqa: F401 - registers operators
from tritonspconv.ops import registered_norm as _registered_norm  # noqa: F401 - the same
from tritonspconv.ops import rowwise as _rowwise  # noqa: F401 - fills the rules of row tensors
from tritonspconv.ops.channelwise import sparse_channelwise_conv
from tritonspconv.ops.conv import sparse_conv
from tritonspconv.ops.dense import from_dense, to_dense
from tritonspconv.ops.global_pool import global_broadcast, global_pool
from tritonspconv.ops.pointwise import pointwise_conv
from tritonspconv.ops.pool import sparse_pool
from tritonspconv.ops.voxelize import Voxels, voxelize
from tritonspconv.ops.weighted import gather_weighted, scatter_weighted

__all__ = [
    "ChannelNorm",
    "TrainingNorm",
    "Voxels",
    "from_dense",
    "gather_weighted",
    "global_broadcast",
    "global_pool",
    "pointwise_conv",
    "scatter_weighted",
    "sparse_channelwise_conv",
    "sparse_conv",
    "sparse_pool",
    "to_dense",
    "voxelize",
]
