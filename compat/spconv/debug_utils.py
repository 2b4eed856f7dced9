"""``spconv.debug_utils``: functions that users' own layers call when they fail."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from compat.spconv import constants
from compat.spconv._names import module_getattr

__all__ = ["spconv_save_debug_data"]

__getattr__ = module_getattr(
    __name__, elsewhere={"compat.spconv.constants": "SPCONV_DEBUG_SAVE_PATH"}
)


def spconv_save_debug_data(data: Any) -> None:
    """Pickle ``data`` to the file ``constants.SPCONV_DEBUG_SAVE_PATH``; "" saves nothing."""
    if constants.SPCONV_DEBUG_SAVE_PATH:
        Path(constants.SPCONV_DEBUG_SAVE_PATH).write_bytes(pickle.dumps(data))
