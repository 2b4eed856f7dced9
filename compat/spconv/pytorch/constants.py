"""``spconv.pytorch.constants``: the release of torch; settings are in ``spconv.constants``."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any

import torch

from compat.spconv import constants as _settings

__all__ = ["PYTORCH_VERSION", "TORCH_HAS_AMP", "is_amp_enabled"]

# Compared with lists such as [1, 10, 0].
PYTORCH_VERSION = [int(part) for part in re.findall(r"\d+", torch.__version__)[:3]]
TORCH_HAS_AMP = True


def is_amp_enabled() -> bool:
    """Return whether autocast is on for GPUs."""
    return torch.is_autocast_enabled()


class _Module(ModuleType):
    """Reads and writes spconv's settings in ``spconv.constants``, where layers look for them."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_settings, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self) or name.startswith("__"):
            super().__setattr__(name, value)
        else:
            setattr(_settings, name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self):
            super().__delattr__(name)
        else:
            delattr(_settings, name)


sys.modules[__name__].__class__ = _Module
