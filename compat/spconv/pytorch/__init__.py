"""``spconv.pytorch``: layers, tensors and functions, usually imported ``as spconv``."""

from torch import Tensor

from compat.spconv._names import module_getattr
from compat.spconv.core import ConvAlgo
from compat.spconv.pytorch import (
    constants,
    conv,
    core,
    functional,
    hash,
    identity,
    modules,
    ops,
    pool,
    spatial,
    tables,
    utils,
)
from compat.spconv.pytorch.conv import (
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SparseConv4d,
    SparseConvTranspose1d,
    SparseConvTranspose2d,
    SparseConvTranspose3d,
    SparseConvTranspose4d,
    SparseInverseConv1d,
    SparseInverseConv2d,
    SparseInverseConv3d,
    SparseInverseConv4d,
    SubMConv1d,
    SubMConv2d,
    SubMConv3d,
    SubMConv4d,
)
from compat.spconv.pytorch.core import SparseConvTensor
from compat.spconv.pytorch.identity import Identity
from compat.spconv.pytorch.modules import (
    SparseBatchNorm,
    SparseIdentity,
    SparseModule,
    SparseReLU,
    SparseSequential,
    SparseSyncBatchNorm,
    assign_name_for_sparse_modules,
    is_spconv_module,
)
from compat.spconv.pytorch.pool import (
    SparseAvgPool1d,
    SparseAvgPool2d,
    SparseAvgPool3d,
    SparseGlobalAvgPool,
    SparseGlobalMaxPool,
    SparseMaxPool1d,
    SparseMaxPool2d,
    SparseMaxPool3d,
    SparseMaxPool4d,
)
from compat.spconv.pytorch.tables import (
    AddTable,
    AddTableMisaligned,
    ConcatTable,
    JoinTable,
)
from tritonspconv.graph_capture import make_opaque


class ToDense(SparseModule):
    """Return ``x.dense()``: ``[B, C, *spatial]``."""

    def forward(self, x: SparseConvTensor) -> Tensor:
        """Return the dense grid."""
        return x.dense()


class RemoveGrid(SparseModule):
    """Set ``x.grid`` to None and return ``x``."""

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Drop the grid, in place as spconv does."""
        x.grid = None
        return x


__all__ = [
    "AddTable",
    "AddTableMisaligned",
    "ConcatTable",
    "ConvAlgo",
    "Identity",
    "JoinTable",
    "RemoveGrid",
    "SparseAvgPool1d",
    "SparseAvgPool2d",
    "SparseAvgPool3d",
    "SparseBatchNorm",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseConv4d",
    "SparseConvTensor",
    "SparseConvTranspose1d",
    "SparseConvTranspose2d",
    "SparseConvTranspose3d",
    "SparseConvTranspose4d",
    "SparseGlobalAvgPool",
    "SparseGlobalMaxPool",
    "SparseIdentity",
    "SparseInverseConv1d",
    "SparseInverseConv2d",
    "SparseInverseConv3d",
    "SparseInverseConv4d",
    "SparseMaxPool1d",
    "SparseMaxPool2d",
    "SparseMaxPool3d",
    "SparseMaxPool4d",
    "SparseModule",
    "SparseReLU",
    "SparseSequential",
    "SparseSyncBatchNorm",
    "SubMConv1d",
    "SubMConv2d",
    "SubMConv3d",
    "SubMConv4d",
    "ToDense",
    "assign_name_for_sparse_modules",
    "constants",
    "conv",
    "core",
    "functional",
    "hash",
    "identity",
    "is_spconv_module",
    "modules",
    "ops",
    "pool",
    "spatial",
    "tables",
    "utils",
]

__getattr__ = module_getattr(
    __name__,
    modules={"cppcore": "compat.spconv.pytorch.cppcore"},
    refused={
        "SpatialGroupConv3d FocalsConv3d": (
            "It belongs to the spconv-plus fork, not to spconv 2.3.8."
        ),
        "quantization": "Quantised layers do not exist here; use float16 or bfloat16.",
    },
)

make_opaque(
    __name__,
    traceable=(
        "SparseConvTensor._derive",
        "SparseConvTensor.find_indice_pair",
        "SparseConvolution.forward",
        "_Followers.__new__",
        "_call_operator",
        "SparseSequential.forward",
        "is_new",
        "_is_faster_whole",
        "_apply",
        "trace_convolution",
        "_trace_submanifold",
        "_trace_strided",
        "_trace_inverse",
        "_is_plain",
        "step_of",
        "output_size",
        "get_conv_output_size",
        "get_deconv_output_size",
        "_axes_of",
        "LocatedSites.__init__",
        "LocatedSites.traced",
        "_own_sites",
        "submanifold_difference",
        "inverse_difference",
        "_entry",
        "algo_of",
        "_Record.__init__",
        "_Record.of_map",
        "record_type",
        "IndiceDict.__init__",
        "SparseConvTensor.replace_feature",
        "SparseBatchNorm.forward",
        "SparseIdentity.forward",
        "SparseReLU.forward",
        "SparseSyncBatchNorm.forward",
    ),
)
