"""What tests of containers that fuse layers share."""

import pytest
from torch import nn

from tritonspconv.nn import chain


def record_fused(monkeypatch: pytest.MonkeyPatch, conv: type) -> list[tuple[bool, bool]]:
    """Fuse on every device; return what was taken up, ``(norm, relu)`` for each convolution.

    Args:
        monkeypatch: Of the test.
        conv: The base class of the convolutions.
    """
    taken = []
    forward_fused = conv.forward_fused

    def recorded(self, input, norm, relu):
        taken.append((norm is not None, relu))
        return forward_fused(self, input, norm, relu)

    monkeypatch.setattr(chain, "fuses_on", lambda device: True)
    monkeypatch.setattr(conv, "forward_fused", recorded)
    return taken


def settle(norm: nn.BatchNorm1d) -> nn.BatchNorm1d:
    """Give a batch norm statistics and factors that are not its initial ones, and evaluate it."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm.eval()
