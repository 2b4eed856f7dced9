"""Enums of ``spconv.core``. They label layers and cached entries; no result depends on them."""

from enum import Enum

from compat.spconv._names import module_getattr


class ConvAlgo(Enum):
    """spconv's convolution algorithms.

    The engine has one algorithm. The label exists because layers that share an ``indice_key`` must
    have the same label, as in spconv.
    """

    Native = 0
    MaskImplicitGemm = 1
    MaskSplitImplicitGemm = 2


class AlgoHint(Enum):
    """spconv's hints for the tuning of a kernel. The original misspells the name too."""

    NoHint = 0
    Fowrard = 1
    BackwardInput = 2
    BackwardWeight = 4


class Activation(Enum):
    """Activations that ``SparseConvolution(act_type=...)`` applies to its output."""

    None_ = 0
    ReLU = 1
    Sigmoid = 2
    LeakyReLU = 3


__getattr__ = module_getattr(
    __name__,
    elsewhere={
        "compat.cumm.conv.bases": (
            "NCHW NHWC ConvIterAlgo ConvLayout ConvLayoutType ConvMode ConvOpType"
        ),
        "compat.spconv.constants": "NDIM_DONT_CARE SPCONV_INT8_DEBUG",
    },
    refused={
        "ALL_NATIVE_PARAMS ALL_IMPGEMM_PARAMS SHUFFLE_SIMT_PARAMS SHUFFLE_VOLTA_PARAMS "
        "SHUFFLE_TURING_PARAMS SHUFFLE_AMPERE_PARAMS IMPLGEMM_SIMT_PARAMS IMPLGEMM_VOLTA_PARAMS "
        "IMPLGEMM_AMPERE_PARAMS IMPLGEMM_TURING_PARAMS": (
            "Tiles of spconv's kernels; tritonspconv tune finds those of tritonspconv."
        ),
        "gen_shuffle_params gen_conv_params GemmAlgoParams GemmAlgo TensorOp kernel "
        "ConvFwdAndBwdInput ConvBwdWeight": "It makes spconv's kernels; nothing is compiled here.",
    },
)
