"""NumPy arrays as arguments, without NumPy as a dependency."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import TypeIs


def is_array(value: Any) -> TypeIs[np.ndarray]:
    """Return whether a value is a NumPy array. A caller who has an array has imported NumPy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)
