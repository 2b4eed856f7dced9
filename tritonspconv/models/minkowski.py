"""MinkUNet, written against the MinkowskiEngine 0.5 interface, and of spconv's layers.

The builders take the library's module as their first argument: the original ``MinkowskiEngine`` and
``compat.minkowski`` build the same network, with the same names in its ``state_dict``. The network
of spconv's layers has the same names too. With weights converted by
``compat.minkowski.checkpoint.to_spconv`` it computes the same results, if no coordinate is
negative.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

SparseTensor = Any  # the SparseTensor of the module from which the network was built

# Residual blocks of each level, encoder then decoder.
BLOCKS = {14: (1,) * 8, 18: (2,) * 8, 34: (2, 3, 4, 6, 2, 2, 2, 2)}
CHANNELS = (32, 64, 128, 256, 256, 128, 96, 96)
STEM_CHANNELS = 32


def mink_unet(
    ME: ModuleType,
    in_channels: int = 4,
    num_classes: int = 20,
    *,
    depth: int = 34,
    D: int = 3,
    channel_divisor: int = 1,
    stem: Any = 5,
    stride: Any = 2,
) -> nn.Module:
    """Build the residual U-Net of Choy et al., CVPR 2019.

    Args:
        ME: The module with the sparse layers.
        in_channels: Features of a voxel.
        num_classes: Outputs for a voxel.
        depth: 14, 18 or 34.
        D: Number of spatial axes.
        channel_divisor: Divides the channels inside; 8 makes a network for tests.
        stem: Window of the first layer, one number or one per axis.
        stride: Stride and window of the strided layers, one number or one per axis.

    Returns:
        A module from a sparse tensor to logits on the same rows.
    """
    channels = tuple(width // channel_divisor for width in (STEM_CHANNELS, *CHANNELS))
    return MinkUNet(ME, in_channels, num_classes, channels, BLOCKS[depth], D, stem, stride)


class MinkUNet(nn.Module):
    """A U-Net of residual blocks over five tensor strides.

    Args:
        ME: The module with the sparse layers.
        in_channels: Features of a voxel.
        num_classes: Outputs for a voxel.
        channels: Channels of the stem, of four encoder levels and of four decoder levels.
        blocks: Residual blocks of these eight levels.
        D: Number of spatial axes.
        stem: Window of the first layer.
        stride: Stride and window of the strided layers.
    """

    def __init__(
        self,
        ME: ModuleType,
        in_channels: int,
        num_classes: int,
        channels: tuple[int, ...],
        blocks: tuple[int, ...],
        D: int,
        stem: Any,
        stride: Any,
    ) -> None:
        super().__init__()
        self.ME, self.D = ME, D
        self.stem = self._normed(ME.MinkowskiConvolution, in_channels, channels[0], stem, 1)
        self.downs, self.encoders = nn.ModuleList(), nn.ModuleList()
        for narrow, wide, count in zip(channels, channels[1:5], blocks[:4], strict=False):
            self.downs.append(self._normed(ME.MinkowskiConvolution, narrow, narrow, stride, stride))
            self.encoders.append(self._blocks(narrow, wide, count))
        self.ups, self.decoders = nn.ModuleList(), nn.ModuleList()
        c_in = channels[4]
        for skip, c_out, count in zip(channels[3::-1], channels[5:], blocks[4:], strict=True):
            self.ups.append(
                self._normed(ME.MinkowskiConvolutionTranspose, c_in, c_out, stride, stride)
            )
            self.decoders.append(self._blocks(c_out + skip, c_out, count))
            c_in = c_out
        self.head = ME.MinkowskiConvolution(c_in, num_classes, 1, bias=True, dimension=D)

    def _normed(self, layer: Any, c_in: int, c_out: int, kernel_size: Any, stride: Any) -> Any:
        """Return a convolution with batch norm and ReLU behind it."""
        conv = layer(c_in, c_out, kernel_size=kernel_size, stride=stride, dimension=self.D)
        norm = self.ME.MinkowskiBatchNorm(c_out)
        return nn.Sequential(conv, norm, self.ME.MinkowskiReLU(inplace=True))

    def _blocks(self, c_in: int, c_out: int, count: int) -> nn.Sequential:
        block = import_module(f"{self.ME.__name__}.modules.resnet_block").BasicBlock
        project = None
        if c_in != c_out:
            conv = self.ME.MinkowskiConvolution(c_in, c_out, 1, dimension=self.D)
            project = nn.Sequential(conv, self.ME.MinkowskiBatchNorm(c_out))
        first = block(c_in, c_out, downsample=project, dimension=self.D)
        rest = [block(c_out, c_out, dimension=self.D) for _ in range(count - 1)]
        return nn.Sequential(first, *rest)

    def forward(self, voxels: SparseTensor) -> SparseTensor:
        """Return the logits."""
        x = self.stem(voxels)
        skips = []
        for down, encoder in zip(self.downs, self.encoders, strict=True):
            skips.append(x)
            x = encoder(down(x))
        for up, decoder, skip in zip(self.ups, self.decoders, reversed(skips), strict=True):
            x = decoder(self.ME.cat(up(x), skip))
        return self.head(x)


def mink_unet_of_spconv(
    spconv: ModuleType,
    in_channels: int = 4,
    num_classes: int = 20,
    *,
    depth: int = 34,
    channel_divisor: int = 1,
) -> nn.Module:
    """Build MinkUNet of the layers of spconv; see :func:`mink_unet`.

    Args:
        spconv: The module with the sparse layers, ``spconv.pytorch``.
        in_channels: Features of a voxel.
        num_classes: Outputs for a voxel.
        depth: 14, 18 or 34.
        channel_divisor: Divides the channels inside.
    """
    channels = tuple(width // channel_divisor for width in (STEM_CHANNELS, *CHANNELS))
    return SpconvMinkUNet(spconv, in_channels, num_classes, channels, BLOCKS[depth])


class SpconvBlock(nn.Module):
    """Two submanifold convolutions and a residual connection, 1x1 where the channels differ."""

    def __init__(self, spconv: ModuleType, c_in: int, c_out: int, key: str) -> None:
        super().__init__()
        options = {"bias": False, "indice_key": key}
        self.conv1 = spconv.SubMConv3d(c_in, c_out, 3, **options)
        self.norm1 = nn.BatchNorm1d(c_out)
        self.conv2 = spconv.SubMConv3d(c_out, c_out, 3, **options)
        self.norm2 = nn.BatchNorm1d(c_out)
        self.downsample = None
        if c_in != c_out:
            conv = spconv.SubMConv3d(c_in, c_out, 1, bias=False)
            self.downsample = spconv.SparseSequential(conv, nn.BatchNorm1d(c_out))

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Return a tensor on the same voxels."""
        y = self.conv1(x)
        y = self.conv2(y.replace_feature(torch.relu(self.norm1(y.features))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return y.replace_feature(torch.relu(self.norm2(y.features) + shortcut.features))


class SpconvMinkUNet(nn.Module):
    """MinkUNet of the layers of spconv.

    Args:
        spconv: The module with the sparse layers.
        in_channels: Features of a voxel.
        num_classes: Outputs for a voxel.
        channels: Channels of the stem, of four encoder levels and of four decoder levels.
        blocks: Residual blocks of these eight levels.
    """

    def __init__(
        self,
        spconv: ModuleType,
        in_channels: int,
        num_classes: int,
        channels: tuple[int, ...],
        blocks: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.spconv = spconv
        self.stem = self._normed(
            spconv.SubMConv3d(in_channels, channels[0], 5, bias=False, indice_key="stem")
        )
        self.downs, self.encoders = nn.ModuleList(), nn.ModuleList()
        for level in range(4):
            narrow, wide = channels[level : level + 2]
            down = spconv.SparseConv3d(narrow, narrow, 2, 2, bias=False, indice_key=f"down{level}")
            self.downs.append(self._normed(down))
            self.encoders.append(self._blocks(narrow, wide, blocks[level], level + 1))
        self.ups, self.decoders = nn.ModuleList(), nn.ModuleList()
        c_in = channels[4]
        for level, c_out, count in zip(range(3, -1, -1), channels[5:], blocks[4:], strict=True):
            up = spconv.SparseInverseConv3d(c_in, c_out, 2, f"down{level}", bias=False)
            self.ups.append(self._normed(up))
            self.decoders.append(self._blocks(c_out + channels[level], c_out, count, level))
            c_in = c_out
        self.head = spconv.SubMConv3d(c_in, num_classes, 1, bias=True)

    def _normed(self, conv: Any) -> Any:
        """Return ``conv`` with batch norm and ReLU behind it."""
        return self.spconv.SparseSequential(conv, nn.BatchNorm1d(conv.out_channels), nn.ReLU(True))

    def _blocks(self, c_in: int, c_out: int, count: int, level: int) -> nn.Sequential:
        widths = [c_in] + [c_out] * (count - 1)
        key = f"level{level}"
        return nn.Sequential(*(SpconvBlock(self.spconv, width, c_out, key) for width in widths))

    def forward(self, voxels: SparseTensor) -> SparseTensor:
        """Return the logits."""
        x = self.stem(voxels)
        skips = []
        for down, encoder in zip(self.downs, self.encoders, strict=True):
            skips.append(x)
            x = encoder(down(x))
        for up, decoder, skip in zip(self.ups, self.decoders, reversed(skips), strict=True):
            x = up(x)
            x = decoder(x.replace_feature(torch.cat([x.features, skip.features], 1)))
        return self.head(x)
