"""Constants of ``spconv.constants``; assign to them as downstream code does.

Read by the adapter: ``SPCONV_ALLOW_TF32`` (at every call), ``SAVED_WEIGHT_LAYOUT`` (at every load),
``SPCONV_FX_TRACE_MODE`` and ``SPCONV_DEBUG_SAVE_PATH``. The others may be assigned and read;
nothing depends on them. Settings that spconv takes from the environment are read on first use, not
at import.
"""

import os
from pathlib import Path
from typing import Any

from compat.spconv._names import module_getattr

PACKAGE_NAME = "spconv"
PACKAGE_ROOT = Path(__file__).parent.resolve()
EDITABLE_INSTALLED = False
DISABLE_JIT = False
BOOST_ROOT = None
NDIM_DONT_CARE = 3
ALL_WEIGHT_IS_KRSC = True
FILTER_HWIO = False

# Layout of weights in checkpoints that are loaded: "KRSC" or "" [out, *k, in], "RSKC" [*k, out, in]
# (spconv 2.0 and 2.1, Native), "RSCK" [*k, in, out] (spconv 1.x, mmcv).
SAVED_WEIGHT_LAYOUT: str

# True switches off the checks of SparseConvTensor while torch.fx traces it.
SPCONV_FX_TRACE_MODE: bool

# False: float32 layers multiply at IEEE grade. True: TF32 products where the GPU has them.
SPCONV_ALLOW_TF32 = False

SPCONV_USE_DIRECT_TABLE = True
SPCONV_DO_SORT = True
SPCONV_DIRECT_TABLE_HASH_SIZE_SCALE = 1.1
SPCONV_BWD_SPLITK = [1, 2, 4, 8, 16, 32, 64]
SPCONV_CPP_GEMM = True
SPCONV_CPP_INDICE_PAIRS = True
SPCONV_CPP_INDICE_PAIRS_IGEMM = False
SPCONV_INT8_DEBUG = False
SPCONV_DEBUG_WEIGHT = False
SPCONV_DEBUG_NVRTC_KERNELS = False
SPCONV_DEBUG_CPP_ONLY = False

# The folder into which debug_utils.spconv_save_debug_data writes; "": it writes nothing.
SPCONV_DEBUG_SAVE_PATH: str


class AllocKeys:
    """Names under which spconv's C++ asks for memory; kept for code that reads them."""

    PairBwd = "PairBwd"
    IndiceNumPerLoc = "IndiceNumPerLoc"
    PairMask = "PairMask"
    MaskArgSort = "MaskArgSort"
    OutIndices = "OutIndices"
    PairFwd = "PairFwd"
    PairMaskBwd = "PairMaskBwd"
    MaskArgSortBwd = "MaskArgSortBwd"
    MaskOutputFwd = "MaskOutputFwd"
    OutFeatures = "OutFeatures"
    Features = "Features"
    Filters = "Filters"
    OutBp = "OutBp"
    DIn = "DIn"
    DFilters = "DFilters"
    InpBuffer = "InpBuffer"
    OutBuffer = "OutBuffer"
    IndicePairsUniq = "IndicePairsUniq"
    IndicePairsUniqBackup = "IndicePairsUniqBackup"
    HashKOrKV = "HashKOrKV"
    HashV = "HashV"
    ThrustTemp = "ThrustTemp"
    TightUniqueCount = "TightUniqueCount"


def _saved_weight_layout() -> str:
    if os.getenv("SPCONV_FILTER_HWIO", "0") == "1":
        raise NotImplementedError(
            "SPCONV_FILTER_HWIO=1 is not supported: weights are [out, *kernel_size, in]. Unset it, "
            "and set SPCONV_SAVED_WEIGHT_LAYOUT=RSCK to load checkpoints of spconv 1.x."
        )
    layout = os.getenv("SPCONV_SAVED_WEIGHT_LAYOUT", "")
    if layout not in ("", "KRSC", "RSKC", "RSCK"):
        raise ValueError(
            f"SPCONV_SAVED_WEIGHT_LAYOUT must be KRSC, RSKC, RSCK or unset; got {layout!r}."
        )
    return layout


_refuse = module_getattr(
    __name__,
    refused={
        "project_is_editable project_is_installed NVRTCMode SPCONV_NVRTC_MODE": (
            "It belongs to the build of spconv's C++; nothing is compiled here."
        )
    },
)


def __getattr__(name: str) -> Any:
    if name == "SAVED_WEIGHT_LAYOUT":
        value = _saved_weight_layout()
    elif name == "SPCONV_FX_TRACE_MODE":
        value = os.getenv(name, "0") == "1"
    elif name == "SPCONV_DEBUG_SAVE_PATH":
        value = os.getenv(name, "")
    else:
        return _refuse(name)
    globals()[name] = value
    return value
