"""Enums of ``spconv.core``. They label layers and cached entries; no result depends on them."""

from enum import Enum


class ConvAlgo(Enum):
    """spconv's convolution algorithms.

    The engine has one algorithm. The label survives because layers that share an ``indice_key``
    must agree on it, as in spconv.
    """

    Native = 0
    MaskImplicitGemm = 1
    MaskSplitImplicitGemm = 2


class AlgoHint(Enum):
    """spconv's hints of what a kernel is tuned for; the misspelt name is the original's."""

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
