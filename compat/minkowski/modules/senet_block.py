"""Squeeze-and-excitation blocks of ``MinkowskiEngine.modules.senet_block``."""

from __future__ import annotations

from typing import Any

from torch import nn

from compat.minkowski._names import module_getattr
from compat.minkowski.MinkowskiBroadcast import MinkowskiBroadcastMultiplication
from compat.minkowski.MinkowskiNonlinearity import MinkowskiReLU, MinkowskiSigmoid
from compat.minkowski.MinkowskiOps import MinkowskiLinear
from compat.minkowski.MinkowskiPooling import MinkowskiGlobalPooling
from compat.minkowski.modules.resnet_block import BasicBlock, Bottleneck


class SELayer(nn.Module):
    """Scales each channel of each sample by a gate learnt from the sample's mean.

    Args:
        channel: Channels.
        reduction: The hidden layer has ``channel // reduction`` channels.
        D: Not read.
    """

    def __init__(self, channel: int, reduction: int = 16, D: int = -1) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            MinkowskiLinear(channel, channel // reduction),
            MinkowskiReLU(inplace=True),
            MinkowskiLinear(channel // reduction, channel),
            MinkowskiSigmoid(),
        )
        self.pooling = MinkowskiGlobalPooling()
        self.broadcast_mul = MinkowskiBroadcastMultiplication()

    def forward(self, x: Any) -> Any:
        """Scale the features."""
        return self.broadcast_mul(x, self.fc(self.pooling(x)))


class SEBasicBlock(BasicBlock):
    """:class:`BasicBlock` with an :class:`SELayer` before the residual is added.

    Args:
        inplanes: Channels of the input.
        planes: Channels of the output.
        stride: Stride of the first convolution.
        dilation: Dilation of both.
        downsample: Applied to the residual where channels or coordinates change.
        reduction: See :class:`SELayer`.
        D: Number of spatial axes.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: Any = 1,
        dilation: Any = 1,
        downsample: nn.Module | None = None,
        reduction: int = 16,
        D: int = -1,
    ) -> None:
        super().__init__(inplanes, planes, stride, dilation, downsample, dimension=D)
        self.se = SELayer(planes, reduction=reduction, D=D)

    def _gate(self, out: Any) -> Any:
        return self.se(out)


class SEBottleneck(Bottleneck):
    """:class:`Bottleneck` with an :class:`SELayer` before the residual is added.

    Args:
        inplanes: Channels of the input.
        planes: Channels inside; the output has ``expansion`` times as many.
        stride: Stride of the 3-wide convolution.
        dilation: Its dilation.
        downsample: Applied to the residual where channels or coordinates change.
        D: Number of spatial axes.
        reduction: See :class:`SELayer`.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: Any = 1,
        dilation: Any = 1,
        downsample: nn.Module | None = None,
        D: int = 3,
        reduction: int = 16,
    ) -> None:
        super().__init__(inplanes, planes, stride, dilation, downsample, dimension=D)
        self.se = SELayer(planes * self.expansion, reduction=reduction, D=D)

    def _gate(self, out: Any) -> Any:
        return self.se(out)


__getattr__ = module_getattr(__name__)
