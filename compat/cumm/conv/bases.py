"""``cumm.conv.bases``: enums and layouts of convolutions. No result depends on them."""

from __future__ import annotations

from enum import Enum

__all__ = [
    "KRSC",
    "NCHW",
    "NHWC",
    "RSKC",
    "ConvIterAlgo",
    "ConvLayout",
    "ConvLayoutType",
    "ConvMode",
    "ConvOpType",
]


class ConvMode(Enum):
    """The direction in which a window is read: forwards, or mirrored."""

    kConvolution = 0
    kCrossCorrelation = 1


class ConvOpType(Enum):
    """The three products of a layer."""

    kForward = 0
    kBackwardInput = 1
    kBackwardWeight = 2


class ConvIterAlgo(Enum):
    """The ways in which cumm's kernels find their operands."""

    Analytic = 0
    Optimized = 1


class ConvLayoutType(Enum):
    """The place of the channels among the axes of a tensor."""

    ChannelFirst = 0
    ChannelLast = 1
    SpatialFirst = 2


class ConvLayout:
    """The layout of a tensor.

    Args:
        layout_type: The place of the channels.
        interleave: Number of channels that lie together.
    """

    def __init__(self, layout_type: ConvLayoutType, interleave: int = 1) -> None:
        self.layout_type = layout_type
        self.interleave = interleave

    def is_channel_first(self) -> bool:
        """Return whether channels come before the spatial axes."""
        return self.layout_type is ConvLayoutType.ChannelFirst


NCHW = ConvLayout(ConvLayoutType.ChannelFirst)
NHWC = ConvLayout(ConvLayoutType.ChannelLast)
KRSC = ConvLayout(ConvLayoutType.ChannelLast)
RSKC = ConvLayout(ConvLayoutType.SpatialFirst)
