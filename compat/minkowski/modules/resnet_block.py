"""Residual blocks of ``MinkowskiEngine.modules.resnet_block``."""

from __future__ import annotations

from typing import Any

from torch import nn

from compat.minkowski._names import module_getattr
from compat.minkowski.MinkowskiConvolution import MinkowskiConvolution
from compat.minkowski.MinkowskiNonlinearity import MinkowskiReLU
from compat.minkowski.MinkowskiNormalization import MinkowskiBatchNorm


class _Residual(nn.Module):
    def _gate(self, out: Any) -> Any:
        """Return the features that are added to the residual; ``senet_block`` scales them."""
        return out


class BasicBlock(_Residual):
    """Two 3-wide convolutions and a residual connection.

    Args:
        inplanes: Channels of the input.
        planes: Channels of the output.
        stride: Stride of the first convolution.
        dilation: Dilation of both.
        downsample: Applied to the residual where channels or coordinates change.
        bn_momentum: Momentum of the batch norms.
        dimension: Number of spatial axes.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: Any = 1,
        dilation: Any = 1,
        downsample: nn.Module | None = None,
        bn_momentum: float = 0.1,
        dimension: int = -1,
    ) -> None:
        super().__init__()
        assert dimension > 0, f"dimension must be positive; got {dimension}."
        self.conv1 = MinkowskiConvolution(
            inplanes, planes, kernel_size=3, stride=stride, dilation=dilation, dimension=dimension
        )
        self.norm1 = MinkowskiBatchNorm(planes, momentum=bn_momentum)
        self.conv2 = MinkowskiConvolution(
            planes, planes, kernel_size=3, stride=1, dilation=dilation, dimension=dimension
        )
        self.norm2 = MinkowskiBatchNorm(planes, momentum=bn_momentum)
        self.relu = MinkowskiReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Any) -> Any:
        """Run the block."""
        out = self.relu(self.norm1(self.conv1(x)))
        out = self._gate(self.norm2(self.conv2(out)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(_Residual):
    """A 3-wide convolution between two pointwise ones, and a residual connection.

    Args:
        inplanes: Channels of the input.
        planes: Channels inside; the output has ``expansion`` times as many.
        stride: Stride of the 3-wide convolution.
        dilation: Its dilation.
        downsample: Applied to the residual where channels or coordinates change.
        bn_momentum: Momentum of the batch norms.
        dimension: Number of spatial axes.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: Any = 1,
        dilation: Any = 1,
        downsample: nn.Module | None = None,
        bn_momentum: float = 0.1,
        dimension: int = -1,
    ) -> None:
        super().__init__()
        assert dimension > 0, f"dimension must be positive; got {dimension}."
        outplanes = planes * self.expansion
        self.conv1 = MinkowskiConvolution(inplanes, planes, kernel_size=1, dimension=dimension)
        self.norm1 = MinkowskiBatchNorm(planes, momentum=bn_momentum)
        self.conv2 = MinkowskiConvolution(
            planes, planes, kernel_size=3, stride=stride, dilation=dilation, dimension=dimension
        )
        self.norm2 = MinkowskiBatchNorm(planes, momentum=bn_momentum)
        self.conv3 = MinkowskiConvolution(planes, outplanes, kernel_size=1, dimension=dimension)
        self.norm3 = MinkowskiBatchNorm(outplanes, momentum=bn_momentum)
        self.relu = MinkowskiReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Any) -> Any:
        """Run the block."""
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.relu(self.norm2(self.conv2(out)))
        out = self._gate(self.norm3(self.conv3(out)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


__getattr__ = module_getattr(__name__)
