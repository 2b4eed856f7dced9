"""``MinkowskiEngine.diagnostics``: facts about a machine for a bug report."""

from __future__ import annotations

import platform
import sys

import torch

import tritonspconv
from compat.minkowski._names import module_getattr


def print_diagnostics() -> None:
    """Print the versions of the system, Python, torch, the GPU and this package."""
    lines = [
        "==========System==========",
        platform.platform(),
        sys.version,
        "==========Pytorch==========",
        torch.__version__,
        f"torch.version.cuda: {torch.version.cuda}",
        f"torch.version.hip: {torch.version.hip}",
        f"torch.cuda.is_available(): {torch.cuda.is_available()}",
        *(
            torch.cuda.get_device_properties(index).name
            for index in range(torch.cuda.device_count())
        ),
        "==========tritonspconv==========",
        tritonspconv.__version__,
    ]
    print("\n".join(lines))  # noqa: T201  The function's purpose.


if __name__ == "__main__":
    print_diagnostics()

__getattr__ = module_getattr(__name__)
