"""Three well-known LiDAR networks, written against the spconv 2.x interface alone.

Each builder takes the spconv module as its first argument: the original ``spconv.pytorch`` and
``compat.spconv.pytorch`` build the same network, with the same names in its ``state_dict``.
"""

from __future__ import annotations

from collections import OrderedDict
from types import ModuleType
from typing import Any

import torch
from torch import nn

SparseTensor = Any  # the SparseConvTensor of the module from which the network was built
Stages = dict[str, SparseTensor]


def second_encoder(
    spconv: ModuleType, in_channels: int = 4, algo: Any = None, channel_divisor: int = 1
) -> nn.Module:
    """Build the encoder of SECOND, known as VoxelBackBone8x (Yan et al., Sensors 2018).

    Args:
        spconv: The module with the sparse layers.
        in_channels: Features of a voxel.
        algo: Passed to every convolution; the original needs ``ConvAlgo.Native`` on a CPU.
        channel_divisor: Makes all levels narrower by this factor.

    Returns:
        A module from a sparse tensor to ``(encoded, stages)``. Its grid is the usual one of
        SECOND: one voxel more along z than the points fill, for example ``[41, 1600, 1408]``.
    """
    return SecondEncoder(_Layers(spconv, algo), in_channels, channel_divisor)


def residual_encoder(spconv: ModuleType, in_channels: int = 4, algo: Any = None) -> nn.Module:
    """Build the residual encoder of CenterPoint (Yin et al., CVPR 2021).

    Its blocks call their norms and ReLUs by hand, on the features.

    Args:
        spconv: The module with the sparse layers.
        in_channels: Features of a voxel.
        algo: Passed to every convolution; the original needs ``ConvAlgo.Native`` on a CPU.

    Returns:
        A module from a sparse tensor to ``(encoded, stages)``. It has the grid of
        :func:`second_encoder`.
    """
    return ResidualEncoder(_Layers(spconv, algo), in_channels)


def sparse_unet(
    spconv: ModuleType,
    in_channels: int = 4,
    num_classes: int = 20,
    algo: Any = None,
    channel_divisor: int = 1,
) -> nn.Module:
    """Build the residual U-Net known as SpUNet-34.

    Args:
        spconv: The module with the sparse layers.
        in_channels: Features of a voxel.
        num_classes: Outputs for a voxel.
        algo: Passed to every convolution; the original needs ``ConvAlgo.Native`` on a CPU.
        channel_divisor: Makes all levels narrower by this factor.

    Returns:
        A module from a sparse tensor to ``(logits, stages)``; the logits keep the input's rows.
    """
    return SparseUNet(_Layers(spconv, algo), in_channels, num_classes, channel_divisor)


class _Layers:
    """The sparse layers of one spconv module, with the settings that the networks share."""

    def __init__(self, spconv: ModuleType, algo: Any) -> None:
        self.spconv = spconv
        self.algo = algo

    def subm(self, c_in: int, c_out: int, kernel_size: int, key: str, bias: bool = False) -> Any:
        """Return a submanifold convolution."""
        return self.spconv.SubMConv3d(
            c_in,
            c_out,
            kernel_size,
            padding=kernel_size // 2,
            bias=bias,
            indice_key=key,
            algo=self.algo,
        )

    def down(self, c_in: int, c_out: int, key: str, **geometry: Any) -> Any:
        """Return a strided convolution."""
        return self.spconv.SparseConv3d(
            c_in, c_out, **geometry, bias=False, indice_key=key, algo=self.algo
        )

    def up(self, c_in: int, c_out: int, kernel_size: int, key: str) -> Any:
        """Return the inverse of the strided convolution with the same key."""
        return self.spconv.SparseInverseConv3d(
            c_in, c_out, kernel_size, indice_key=key, bias=False, algo=self.algo
        )

    def normed(self, conv: Any) -> Any:
        """Return ``conv`` with batch norm and ReLU behind it."""
        parts = OrderedDict(conv=conv, norm=_norm(conv.out_channels), act=nn.ReLU())
        return self.spconv.SparseSequential(parts)


def _norm(channels: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)


class _Encoder(nn.Module):
    """Runs an input layer, four levels and an output layer, which derived classes make."""

    conv_input: nn.Module

    def forward(self, voxels: SparseTensor) -> tuple[SparseTensor, Stages]:
        """Return the encoded voxels and the output of each level."""
        stages: Stages = {}
        x = self.conv_input(voxels)
        for name in ("conv1", "conv2", "conv3", "conv4", "conv_out"):
            x = self.get_submodule(name)(x)
            stages[name] = x
        return x, stages


class SecondEncoder(_Encoder):
    """The encoder of SECOND: four levels of submanifold convolutions, 8x smaller at the end."""

    def __init__(self, layers: _Layers, in_channels: int, channel_divisor: int = 1) -> None:
        super().__init__()
        c16, c32, c64, c128 = (n // channel_divisor for n in (16, 32, 64, 128))
        self.conv_input = layers.normed(layers.subm(in_channels, c16, 3, "subm1"))
        self.conv1 = nn.Sequential(layers.normed(layers.subm(c16, c16, 3, "subm1")))
        self.conv2 = self._level(layers, c16, c32, 2, padding=1)
        self.conv3 = self._level(layers, c32, c64, 3, padding=1)
        self.conv4 = self._level(layers, c64, c64, 4, padding=(0, 1, 1))
        out = {"kernel_size": (3, 1, 1), "stride": (2, 1, 1), "padding": 0}
        self.conv_out = layers.normed(layers.down(c64, c128, "spconv_down2", **out))

    @staticmethod
    def _level(
        layers: _Layers, c_in: int, c_out: int, number: int, padding: int | tuple[int, int, int]
    ) -> nn.Sequential:
        """Return a strided convolution and two submanifold ones."""
        down = layers.down(c_in, c_out, f"spconv{number}", kernel_size=3, stride=2, padding=padding)
        return nn.Sequential(
            OrderedDict(
                down=layers.normed(down),
                subm1=layers.normed(layers.subm(c_out, c_out, 3, f"subm{number}")),
                subm2=layers.normed(layers.subm(c_out, c_out, 3, f"subm{number}")),
            )
        )


class ResidualEncoder(_Encoder):
    """An encoder of four levels, two residual blocks each, 8x smaller at the end."""

    def __init__(self, layers: _Layers, in_channels: int) -> None:
        super().__init__()
        self.conv_input = layers.normed(layers.subm(in_channels, 16, 3, "subm1"))
        self.conv1 = self._level(layers, None, 16, 1)
        for number, (c_in, c_out, padding) in enumerate(
            ((16, 32, 1), (32, 64, 1), (64, 128, (0, 1, 1))), start=2
        ):
            key = f"spconv{number}"
            down = layers.down(c_in, c_out, key, kernel_size=3, stride=2, padding=padding)
            setattr(self, f"conv{number}", self._level(layers, down, c_out, number))
        self.conv_out = layers.normed(
            layers.down(
                128, 128, "spconv_down2", kernel_size=(3, 1, 1), stride=(2, 1, 1), padding=0
            )
        )

    @staticmethod
    def _level(layers: _Layers, down: Any, channels: int, number: int) -> nn.Sequential:
        """Return a strided convolution, if there is one, and two residual blocks."""
        first = [] if down is None else [layers.normed(down)]
        blocks = [BlockByHand(layers, channels, f"subm{number}") for _ in range(2)]
        return nn.Sequential(*first, *blocks)


class BlockByHand(nn.Module):
    """A residual block whose ``forward`` calls every norm and ReLU on the features."""

    def __init__(self, layers: _Layers, channels: int, key: str) -> None:
        super().__init__()
        self.conv1 = layers.subm(channels, channels, 3, key, bias=True)
        self.norm1 = _norm(channels)
        self.conv2 = layers.subm(channels, channels, 3, key, bias=True)
        self.norm2 = _norm(channels)
        self.act = nn.ReLU()

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Return a tensor on the same voxels."""
        y = self.conv1(x)
        y = y.replace_feature(self.norm1(y.features))
        y = y.replace_feature(self.act(y.features))
        y = self.conv2(y)
        y = y.replace_feature(self.norm2(y.features))
        y = y.replace_feature(y.features + x.features)
        return y.replace_feature(self.act(y.features))


class ResidualBlock(nn.Module):
    """Two submanifold convolutions beside a shortcut, which is 1x1 where the channels differ."""

    def __init__(self, layers: _Layers, c_in: int, c_out: int, key: str) -> None:
        super().__init__()
        self.conv1 = layers.normed(layers.subm(c_in, c_out, 3, key))
        self.conv2 = layers.subm(c_out, c_out, 3, key)
        self.norm2 = _norm(c_out)
        self.project: nn.Module | None = None
        if c_in != c_out:
            self.project = layers.spconv.SparseSequential(
                OrderedDict(conv=layers.subm(c_in, c_out, 1, f"{key}_1x1"), norm=_norm(c_out))
            )

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Return a tensor on the same voxels."""
        shortcut = x if self.project is None else self.project(x)
        y = self.conv2(self.conv1(x))
        return y.replace_feature(torch.relu(self.norm2(y.features) + shortcut.features))


class SparseUNet(nn.Module):
    """A U-Net of residual blocks over five resolutions."""

    stem_channels = 32
    encoder_channels = (32, 64, 128, 256)
    encoder_blocks = (2, 3, 4, 6)
    decoder_channels = (256, 128, 96, 96)
    decoder_blocks = (2, 2, 2, 2)

    def __init__(
        self, layers: _Layers, in_channels: int, num_classes: int, channel_divisor: int
    ) -> None:
        super().__init__()
        widths = [n // channel_divisor for n in (self.stem_channels, *self.encoder_channels)]
        decoder_widths = [n // channel_divisor for n in self.decoder_channels]
        self.stem = layers.normed(layers.subm(in_channels, widths[0], 5, "stem"))
        self.downs, self.encoders = nn.ModuleList(), nn.ModuleList()
        for level, count in enumerate(self.encoder_blocks, start=1):
            narrow, wide = widths[level - 1], widths[level]
            down = layers.down(narrow, wide, f"down{level}", kernel_size=2, stride=2)
            self.downs.append(layers.normed(down))
            self.encoders.append(self._blocks(layers, wide, wide, count, f"subm{level}"))

        self.ups, self.decoders = nn.ModuleList(), nn.ModuleList()
        c_in = widths[-1]
        levels = range(len(self.downs), 0, -1)
        for level, c_out, count in zip(levels, decoder_widths, self.decoder_blocks, strict=True):
            self.ups.append(layers.normed(layers.up(c_in, c_out, 2, f"down{level}")))
            merged = c_out + widths[level - 1]
            self.decoders.append(self._blocks(layers, merged, c_out, count, f"subm{level - 1}"))
            c_in = c_out
        self.head = layers.subm(c_in, num_classes, 1, "head", bias=True)

    @staticmethod
    def _blocks(layers: _Layers, c_in: int, c_out: int, count: int, key: str) -> nn.Sequential:
        blocks = [ResidualBlock(layers, c_in, c_out, key)]
        blocks += [ResidualBlock(layers, c_out, c_out, key) for _ in range(count - 1)]
        return nn.Sequential(*blocks)

    def forward(self, voxels: SparseTensor) -> tuple[SparseTensor, Stages]:
        """Return the logits and the output of each level of the encoder and the decoder."""
        x = self.stem(voxels)
        stages: Stages = {"stem": x}
        skips = []
        for level, (down, encoder) in enumerate(
            zip(self.downs, self.encoders, strict=True), start=1
        ):
            skips.append(x)
            x = encoder(down(x))
            stages[f"encoder{level}"] = x
        for level, (up, decoder) in zip(
            range(len(skips) - 1, -1, -1), zip(self.ups, self.decoders, strict=True), strict=True
        ):
            x = up(x)
            x = decoder(x.replace_feature(torch.cat([x.features, skips[level].features], dim=1)))
            stages[f"decoder{level}"] = x
        return self.head(x), stages
