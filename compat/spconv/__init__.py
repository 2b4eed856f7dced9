"""spconv 2.3.8's interface on the tritonspconv engine: CPU and GPU, one result everywhere.

Replace ``import spconv.pytorch as spconv`` by ``import compat.spconv.pytorch as spconv`` (and
``import spconv`` by ``import compat.spconv as spconv``). Kept oddities and intended differences are
listed in ``QUIRKS.md`` beside this file.
"""

from compat.spconv import constants, core
from compat.spconv._names import module_getattr
from compat.spconv.core import AlgoHint, ConvAlgo

# Downstream code computes float(__version__[2:]) and compares strings: keep a plain "2.3.N".
__version__ = "2.3.8"
SPCONV_VERSION_NUMBERS = [2, 3, 8]

__all__ = ["SPCONV_VERSION_NUMBERS", "AlgoHint", "ConvAlgo", "__version__", "constants", "core"]

__getattr__ = module_getattr(
    __name__,
    modules={
        name: f"compat.spconv.{name}"
        for name in ("cppconstants", "debug_utils", "pytorch", "tools", "utils")
    },
    refused={
        "build core_cc": "Nothing is compiled here.",
    },
)
