"""``MinkowskiEngine.MinkowskiNetwork``: base class of networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from compat.minkowski._names import module_getattr


class MinkowskiNetwork(nn.Module, ABC):
    """A module that knows its dimension and must define ``forward``.

    Args:
        D: Number of spatial axes.
    """

    def __init__(self, D: int) -> None:
        super().__init__()
        self.D = D

    @abstractmethod
    def forward(self, x: Any) -> Any:
        """Run the network."""


__getattr__ = module_getattr(__name__)
