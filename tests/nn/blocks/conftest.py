"""Fixtures of the tests of hand-written blocks."""

from dataclasses import dataclass

import pytest

from compat.minkowski.MinkowskiConvolution import MinkowskiConvolutionBase
from compat.spconv.pytorch.conv import SparseConvolution
from tritonspconv.nn import chain
from tritonspconv.nn._conv import Conv
from tritonspconv.nn.blocks import step


@dataclass(frozen=True)
class Taken:
    """The norm and the ReLU that were fused into one convolution."""

    norm: str | None
    add: bool
    relu: bool


@pytest.fixture
def taken(monkeypatch) -> list[Taken]:
    """Fuse on every device; return what each fused convolution took up, in order.

    Containers run their modules one by one, so that optimised code alone fuses.
    """
    found: list[Taken] = []

    def recorded(forward_fused):
        def call(self, input, norm, relu, residual=None):
            found.append(
                Taken(type(norm).__name__ if norm else None, residual is not None, bool(relu))
            )
            return forward_fused(self, input, norm, relu, residual)

        return call

    for kind in (Conv, SparseConvolution, MinkowskiConvolutionBase):
        monkeypatch.setattr(kind, "forward_fused", recorded(kind.forward_fused))
    monkeypatch.setattr(step, "trains_on", lambda device: True)
    monkeypatch.setattr(chain, "fuses_on", lambda device: False)
    return found
