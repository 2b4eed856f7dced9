"""SECOND's encoder with a head that looks at the scene from above, as CenterPoint has it.

The builder takes the spconv module as its first argument: the original ``spconv.pytorch`` and
``compat.spconv.pytorch`` build the same network, with the same names in its ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from tritonspconv.models.lidar import second_encoder

# Cells of the encoder's input along one side of a cell of its output.
STRIDE = 8
# The channels behind the logit of a centre: its x and y in the cell, z, the logarithms of length,
# width and height, and the sine and the cosine of twice the angle.
BOX_CHANNELS = 8


def second_detector(
    spconv: ModuleType,
    spatial_shape: Sequence[int],
    in_channels: int = 4,
    *,
    algo: Any = None,
    channel_divisor: int = 1,
) -> nn.Module:
    """Build a detector of one class (Yan et al., Sensors 2018; the head of Yin et al., CVPR 2021).

    Args:
        spconv: The module with the sparse layers.
        spatial_shape: Cells along z, y and x: 40 along z, multiples of 8 along the others.
        in_channels: Features of a voxel.
        algo: Passed to every convolution; the original needs ``ConvAlgo.Native`` on a CPU.
        channel_divisor: Divides all channels.

    Returns:
        A module from features ``[N, C]``, indices int32 ``[N, 4]`` and the batch size to maps
        ``[B, 1 + BOX_CHANNELS, y / 8, x / 8]``.

    Raises:
        ValueError: The grid does not fit.
    """
    z, y, x = spatial_shape
    if z != 40 or y % STRIDE or x % STRIDE:
        raise ValueError(
            f"second_detector: spatial_shape must have 40 cells along z and multiples of {STRIDE} "
            f"along y and x; got {list(spatial_shape)}. Change the range or the voxel size."
        )
    return Detector(spconv, (z + 1, y, x), in_channels, algo, channel_divisor)


class Detector(nn.Module):
    """A sparse encoder, a dense network on its view from above, and a head.

    Args:
        spconv: The module with the sparse layers.
        spatial_shape: Cells along z, one more than points fill, y and x.
        in_channels: Features of a voxel.
        algo: Passed to every convolution.
        channel_divisor: Divides all channels.
    """

    def __init__(
        self,
        spconv: ModuleType,
        spatial_shape: Sequence[int],
        in_channels: int,
        algo: Any,
        channel_divisor: int,
    ) -> None:
        super().__init__()
        self._tensor = spconv.SparseConvTensor
        self.spatial_shape = list(spatial_shape)
        self.encoder = second_encoder(spconv, in_channels, algo, channel_divisor)
        seen, wide = 256 // channel_divisor, 128 // channel_divisor
        self.from_above = nn.Sequential(
            *_dense(seen, wide), *_dense(wide, wide), *_dense(wide, wide), *_dense(wide, wide)
        )
        self.head = nn.Conv2d(wide, 1 + BOX_CHANNELS, 1)
        # Few cells hold a centre: start from a chance of 1 %.
        nn.init.constant_(self.head.bias[:1], -4.6)  # pyright: ignore[reportOptionalSubscript]

    def forward(self, feats: Tensor, indices: Tensor, batch_size: int) -> Tensor:
        """Return the logit of a centre and the box of every cell."""
        x = self._tensor(feats, indices, self.spatial_shape, batch_size)
        encoded, _ = self.encoder(x)
        return self.head(self.from_above(encoded.dense().flatten(1, 2)))


def _dense(c_in: int, c_out: int) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(c_out, eps=1e-3, momentum=0.01), nn.ReLU()]
