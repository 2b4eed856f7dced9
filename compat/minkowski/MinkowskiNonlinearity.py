"""Nonlinearities of ``MinkowskiEngine.MinkowskiNonlinearity``: torch's, on the features.

Each class has the name and the arguments of a torch module, and keeps this module in its attribute
``module``. Its input is a sparse tensor or a field. The result keeps the coordinates of the input.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from compat.minkowski._features import AnyTensor, features_of, with_features
from compat.minkowski._names import module_getattr
from compat.minkowski.MinkowskiCommon import MinkowskiModuleBase


class MinkowskiNonlinearityBase(MinkowskiModuleBase):
    """Applies the torch module of class ``MODULE`` to the features.

    Args:
        args: Arguments of the torch module.
        kwargs: Its keyword arguments.
    """

    MODULE: ClassVar[type[nn.Module]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.module = self.MODULE(*args, **kwargs)

    def forward(self, input: AnyTensor) -> AnyTensor:
        """Apply the module; with ``inplace=True`` the features of ``input`` change too."""
        return with_features(input, self.module(features_of(input)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class MinkowskiELU(MinkowskiNonlinearityBase):
    """:class:`torch.nn.ELU`."""

    MODULE = nn.ELU


class MinkowskiHardshrink(MinkowskiNonlinearityBase):
    """:class:`torch.nn.Hardshrink`."""

    MODULE = nn.Hardshrink


class MinkowskiHardsigmoid(MinkowskiNonlinearityBase):
    """:class:`torch.nn.Hardsigmoid`."""

    MODULE = nn.Hardsigmoid


class MinkowskiHardtanh(MinkowskiNonlinearityBase):
    """:class:`torch.nn.Hardtanh`."""

    MODULE = nn.Hardtanh


class MinkowskiHardswish(MinkowskiNonlinearityBase):
    """:class:`torch.nn.Hardswish`."""

    MODULE = nn.Hardswish


class MinkowskiLeakyReLU(MinkowskiNonlinearityBase):
    """:class:`torch.nn.LeakyReLU`."""

    MODULE = nn.LeakyReLU


class MinkowskiLogSigmoid(MinkowskiNonlinearityBase):
    """:class:`torch.nn.LogSigmoid`."""

    MODULE = nn.LogSigmoid


class MinkowskiPReLU(MinkowskiNonlinearityBase):
    """:class:`torch.nn.PReLU`."""

    MODULE = nn.PReLU


class MinkowskiReLU(MinkowskiNonlinearityBase):
    """:class:`torch.nn.ReLU`."""

    MODULE = nn.ReLU


class MinkowskiReLU6(MinkowskiNonlinearityBase):
    """:class:`torch.nn.ReLU6`."""

    MODULE = nn.ReLU6


class MinkowskiRReLU(MinkowskiNonlinearityBase):
    """:class:`torch.nn.RReLU`."""

    MODULE = nn.RReLU


class MinkowskiSELU(MinkowskiNonlinearityBase):
    """:class:`torch.nn.SELU`."""

    MODULE = nn.SELU


class MinkowskiCELU(MinkowskiNonlinearityBase):
    """:class:`torch.nn.CELU`."""

    MODULE = nn.CELU


class MinkowskiGELU(MinkowskiNonlinearityBase):
    """:class:`torch.nn.GELU`."""

    MODULE = nn.GELU


class MinkowskiSigmoid(MinkowskiNonlinearityBase):
    """:class:`torch.nn.Sigmoid`."""

    MODULE = nn.Sigmoid


class MinkowskiSiLU(MinkowskiNonlinearityBase):
    """:class:`torch.nn.SiLU`."""

    MODULE = nn.SiLU


class MinkowskiSoftplus(MinkowskiNonlinearityBase):
    """:class:`torch.nn.Softplus`."""

    MODULE = nn.Softplus


class MinkowskiSoftshrink(MinkowskiNonlinearityBase):
    """:class:`torch.nn.Softshrink`."""

    MODULE = nn.Softshrink


class MinkowskiSoftsign(MinkowskiNonlinearityBase):
    """:class:`torch.nn.Softsign`."""

    MODULE = nn.Softsign


class MinkowskiTanh(MinkowskiNonlinearityBase):
    """:class:`torch.nn.Tanh`."""

    MODULE = nn.Tanh


class MinkowskiTanhshrink(MinkowskiNonlinearityBase):
    """:class:`torch.nn.Tanhshrink`."""

    MODULE = nn.Tanhshrink


class MinkowskiThreshold(MinkowskiNonlinearityBase):
    """:class:`torch.nn.Threshold`."""

    MODULE = nn.Threshold


class MinkowskiSoftmin(MinkowskiNonlinearityBase):
    """:class:`torch.nn.Softmin`."""

    MODULE = nn.Softmin


class MinkowskiSoftmax(MinkowskiNonlinearityBase):
    """:class:`torch.nn.Softmax`."""

    MODULE = nn.Softmax


class MinkowskiLogSoftmax(MinkowskiNonlinearityBase):
    """:class:`torch.nn.LogSoftmax`."""

    MODULE = nn.LogSoftmax


class MinkowskiDropout(MinkowskiNonlinearityBase):
    """:class:`torch.nn.Dropout`."""

    MODULE = nn.Dropout


class MinkowskiAlphaDropout(MinkowskiNonlinearityBase):
    """:class:`torch.nn.AlphaDropout`."""

    MODULE = nn.AlphaDropout


class MinkowskiAdaptiveLogSoftmaxWithLoss(MinkowskiNonlinearityBase):
    """:class:`torch.nn.AdaptiveLogSoftmaxWithLoss`; its parameters alone.

    The torch module needs a target, which ``forward`` does not take: as in the original, the call
    raises TypeError. Call ``self.module(x.F, target)``.
    """

    MODULE = nn.AdaptiveLogSoftmaxWithLoss


class MinkowskiSinusoidal(MinkowskiModuleBase):
    """``sin(F @ kernel + bias) * coef``, all three learnt.

    Args:
        in_channel: Channels of the input.
        out_channel: Channels of the output.
    """

    def __init__(self, in_channel: int, out_channel: int) -> None:
        super().__init__()
        self.in_channel = in_channel
        self.out_channel = out_channel
        self.kernel = nn.Parameter(torch.rand(in_channel, out_channel))
        self.bias = nn.Parameter(torch.rand(1, out_channel))
        self.coef = nn.Parameter(torch.rand(1, out_channel))

    def forward(self, input: AnyTensor) -> AnyTensor:
        """Map the features of every row."""
        return with_features(
            input, torch.sin(features_of(input) @ self.kernel + self.bias) * self.coef
        )


__getattr__ = module_getattr(__name__)
