"""Residual blocks as published networks write them, for the tests of ``tritonspconv.optimize``."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

import compat.minkowski as ME
import compat.minkowski.MinkowskiFunctional as MF
import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tritonspconv import nn as tsnn


def with_new_features(out, features):
    """Return ``out`` with other features, on spconv 1.x and 2.x, as detectors do."""
    if "replace_feature" in out.__dir__():
        return out.replace_feature(features)
    out.features = features
    return out


class DetectorBlock(spconv.SparseModule):
    """The block of CenterPoint's and OpenPCDet's residual encoders."""

    expansion = 1

    def __init__(self, inplanes, planes, stride=1, downsample=None, indice_key=None, norm=None):
        super().__init__()
        norm = norm or partial(nn.BatchNorm1d, eps=1e-3, momentum=0.01)
        self.conv1 = spconv.SubMConv3d(
            inplanes, planes, 3, stride, 1, bias=True, indice_key=indice_key
        )
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = spconv.SubMConv3d(planes, planes, 3, 1, 1, bias=True, indice_key=indice_key)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x):
        identity = x
        assert x.features.dim() == 2, f"x.features.dim()={x.features.dim()}"

        out = self.conv1(x)
        out = with_new_features(out, self.bn1(out.features))
        out = with_new_features(out, self.relu(out.features))

        out = self.conv2(out)
        out = with_new_features(out, self.bn2(out.features))

        if self.downsample is not None:
            identity = self.downsample(x)

        out = with_new_features(out, out.features + identity.features)
        return with_new_features(out, self.relu(out.features))


class SegmentorBlock(spconv.SparseModule):
    """The block of Pointcept's SpUNet: the projection is a container, added in one expression."""

    def __init__(self, in_channels, out_channels, norm=None, indice_key=None):
        super().__init__()
        norm = norm or partial(nn.BatchNorm1d, eps=1e-3, momentum=0.01)
        if in_channels == out_channels:
            self.proj = spconv.SparseSequential(nn.Identity())
        else:
            self.proj = spconv.SparseSequential(
                spconv.SubMConv3d(in_channels, out_channels, 1, bias=False), norm(out_channels)
            )
        conv = partial(spconv.SubMConv3d, padding=1, bias=False, indice_key=indice_key)
        self.conv1 = conv(in_channels, out_channels, 3)
        self.bn1 = norm(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = conv(out_channels, out_channels, 3)
        self.bn2 = norm(out_channels)

    def forward(self, x):
        residual = x
        out = self.conv1(x)
        out = out.replace_feature(self.relu(self.bn1(out.features)))
        out = self.conv2(out)
        out = out.replace_feature(self.bn2(out.features))
        out = out.replace_feature(out.features + self.proj(residual).features)
        return out.replace_feature(self.relu(out.features))


class PreActivationBlock(spconv.SparseModule):
    """The block of PointGroup and its descendants: norms and ReLUs come first, in a container."""

    def __init__(self, in_channels, out_channels, norm=nn.BatchNorm1d, indice_key=None):
        super().__init__()
        side = nn.Identity()
        if in_channels != out_channels:
            side = spconv.SubMConv3d(in_channels, out_channels, 1, bias=False)
        self.i_branch = spconv.SparseSequential(side)
        conv = partial(spconv.SubMConv3d, kernel_size=3, bias=False, indice_key=indice_key)
        self.conv_branch = spconv.SparseSequential(
            norm(in_channels), nn.ReLU(), conv(in_channels, out_channels),
            norm(out_channels), nn.ReLU(), conv(out_channels, out_channels),
        )  # fmt: skip

    def forward(self, x):
        identity = spconv.SparseConvTensor(x.features, x.indices, x.spatial_shape, x.batch_size)
        out = self.conv_branch(x)
        sum_of_both = out.features + self.i_branch(identity).features
        return out.replace_feature(sum_of_both)


class WrappedBlock(spconv.SparseModule):
    """A block whose two convolutions are in a container, but for the last ReLU."""

    def __init__(self, channels, container=spconv.SparseSequential, norm=nn.BatchNorm1d):
        super().__init__()
        conv = partial(spconv.SubMConv3d, channels, channels, 3, indice_key="w")
        self.net = container(conv(), norm(channels), nn.ReLU(), conv(), norm(channels))
        self.relu = nn.ReLU()

    def forward(self, x):
        out = self.net(x)
        return out.replace_feature(self.relu(out.features + x.features))


class MinkowskiBlock(nn.Module):
    """The basic block of MinkowskiEngine's residual networks."""

    def __init__(self, inplanes, planes, downsample=None, dimension=3, norm=None):
        super().__init__()
        norm = norm or ME.MinkowskiBatchNorm
        conv = partial(ME.MinkowskiConvolution, kernel_size=3, dimension=dimension)
        self.conv1, self.norm1 = conv(inplanes, planes), norm(planes)
        self.conv2, self.norm2 = conv(planes, planes), norm(planes)
        self.relu = ME.MinkowskiReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        residual = x
        out = self.conv1(x)
        out = self.norm1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.norm2(out)
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


class MinkowskiUNet(nn.Module):
    """A small U-Net whose top level calls its layers one by one."""

    def __init__(self, channels=4, width=8):
        super().__init__()
        conv = partial(ME.MinkowskiConvolution, dimension=3)
        self.conv0, self.bn0 = conv(channels, width, 5), ME.MinkowskiBatchNorm(width)
        self.conv1, self.bn1 = conv(width, width, 2, 2), ME.MinkowskiBatchNorm(width)
        self.block1 = nn.Sequential(MinkowskiBlock(width, width), MinkowskiBlock(width, width))
        self.up = ME.MinkowskiConvolutionTranspose(width, width, 2, 2, dimension=3)
        self.bn2 = ME.MinkowskiBatchNorm(width)
        side = nn.Sequential(conv(2 * width, width, 1), ME.MinkowskiBatchNorm(width))
        self.block2 = MinkowskiBlock(2 * width, width, side)
        self.final = conv(width, 3, 1, bias=True)
        self.relu = ME.MinkowskiReLU(inplace=True)

    def forward(self, x):
        first = self.relu(self.bn0(self.conv0(x)))
        out = MF.relu(self.bn1(self.conv1(first)))
        out = self.block1(out)
        out = self.relu(self.bn2(self.up(out)))
        return self.final(self.block2(ME.cat(out, first)))


class EngineBlock(tsnn.SparseModule):
    """A block on the engine's own layers, whose residual is a layer too."""

    def __init__(self, in_channels, out_channels, norm=None):
        super().__init__()
        norm = norm or tsnn.BatchNorm
        self.conv1, self.norm1 = tsnn.SubMConv3d(in_channels, out_channels, 3), norm(out_channels)
        self.conv2, self.norm2 = tsnn.SubMConv3d(out_channels, out_channels, 3), norm(out_channels)
        self.side, self.side_norm = (
            tsnn.SubMConv3d(in_channels, out_channels, 1),
            norm(out_channels),
        )

    def forward(self, x):
        out = self.norm1(self.conv1(x))
        out = self.norm2(self.conv2(out.replace(torch.relu(out.feats))))
        out = out + self.side_norm(self.side(x))
        return out.replace(out.feats.relu())


def inputs(n: int = 80, channels: int = 4, dtype=torch.float32, device="cpu", seed: int = 0):
    """Return features [n, channels], and distinct sites [n, 4] in a grid of (9, 8, 7) x 2."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(2 * 9 * 8 * 7, generator=generator)[:n]
    coords = torch.stack(torch.unravel_index(cells, (2, 9, 8, 7)), 1).int()
    feats = torch.randn(n, channels, generator=generator, dtype=torch.float64).to(dtype)
    return feats.to(device), coords.to(device)


def spconv_tensor(feats, coords):
    return spconv.SparseConvTensor(feats, coords, [9, 8, 7], 2)


def minkowski_tensor(feats, coords):
    return ME.SparseTensor(feats, coords)


def engine_tensor(feats, coords):
    return ts.SparseTensor(feats, coords, spatial_shape=(9, 8, 7), batch_size=2)


def features(y):
    """Return the features of a sparse tensor of any of the three libraries."""
    return y.feats if isinstance(y, ts.SparseTensor) else y.features


def detector() -> nn.Module:
    """Two blocks, the first with a projection of its input."""
    side = spconv.SparseSequential(
        spconv.SubMConv3d(4, 8, 1, bias=False), nn.BatchNorm1d(8, eps=1e-3, momentum=0.01)
    )
    return spconv.SparseSequential(
        DetectorBlock(4, 8, downsample=side, indice_key="res"),
        DetectorBlock(8, 8, indice_key="res"),
    )


def segmentor() -> nn.Module:
    """Two blocks, the first with a projection of its input."""
    return spconv.SparseSequential(
        SegmentorBlock(4, 8, indice_key="a"), SegmentorBlock(8, 8, indice_key="a")
    )


def pre_activation() -> nn.Module:
    """Two blocks, the first with a projection of its input, and one of another kind."""
    return spconv.SparseSequential(
        PreActivationBlock(4, 8, indice_key="a"), PreActivationBlock(8, 8, indice_key="a"),
        WrappedBlock(8),
    )  # fmt: skip


def engine() -> nn.Module:
    """Two blocks of the engine's layers."""
    return tsnn.Sequential(EngineBlock(4, 8), EngineBlock(8, 6))


def settle(model: nn.Module) -> nn.Module:
    """Give batch norms random statistics and factors."""
    generator = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for value in (norm.weight, norm.bias, norm.running_mean):
                if value is not None:
                    value.data.copy_(torch.randn(value.shape, generator=generator))
            if norm.running_var is not None:
                norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
    return model


# Network, a function that makes its input, and its fused chains without gradients and in training.
NETWORKS = {
    "detector": (detector, spconv_tensor, 4, 4),
    "segmentor": (segmentor, spconv_tensor, 4, 4),
    "pre-activation": (pre_activation, spconv_tensor, 6, 4),
    "minkowski": (MinkowskiUNet, minkowski_tensor, 10, 10),
    "engine": (engine, engine_tensor, 6, 6),
}
