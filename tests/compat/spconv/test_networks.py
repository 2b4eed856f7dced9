"""Networks in the manner of downstream projects, trained for one step."""

from functools import partial

import pytest
import torch
from torch import nn

import compat.spconv.pytorch as spconv
from compat.spconv.pytorch import SparseConvTensor


def step(net: nn.Module, loss: torch.Tensor) -> None:
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


class DetectionBlock(spconv.SparseModule):
    """A residual block as detection backbones write it."""

    def __init__(self, channels, norm_fn, indice_key):
        super().__init__()
        self.conv1 = spconv.SubMConv3d(
            channels, channels, kernel_size=3, stride=1, padding=1, indice_key=indice_key
        )
        self.bn1 = norm_fn(channels)
        self.relu = nn.ReLU()
        self.conv2 = spconv.SubMConv3d(
            channels, channels, kernel_size=3, stride=1, padding=1, indice_key=indice_key
        )

    def forward(self, x):
        out = self.conv1(x)
        out = out.replace_feature(self.relu(self.bn1(out.features)))
        out = self.conv2(out)
        return out.replace_feature(self.relu(out.features + x.features))


class DetectionBackbone(nn.Module):
    """Strided stages, a (3, 1, 1) tail and height compression."""

    def __init__(self):
        super().__init__()
        norm_fn = partial(nn.BatchNorm1d, eps=1e-3, momentum=0.01)
        self.conv_input = spconv.SparseSequential(
            spconv.SubMConv3d(4, 8, 3, padding=1, bias=False, indice_key="subm1"),
            norm_fn(8),
            nn.ReLU(),
        )
        self.conv1 = spconv.SparseSequential(DetectionBlock(8, norm_fn, "res1"))
        self.conv2 = spconv.SparseSequential(
            spconv.SparseSequential(
                spconv.SparseConv3d(8, 16, 3, 2, padding=1, bias=False, indice_key="spconv2"),
                norm_fn(16),
                nn.ReLU(),
            ),
            DetectionBlock(16, norm_fn, "res2"),
        )
        self.conv_out = spconv.SparseSequential(
            spconv.SparseConv3d(
                16, 16, (3, 1, 1), stride=(2, 1, 1), padding=0, bias=False, indice_key="down2"
            ),
            norm_fn(16),
            nn.ReLU(),
        )

    def forward(self, x):
        out = self.conv_out(self.conv2(self.conv1(self.conv_input(x))))
        dense = out.dense()
        n, c, d, h, w = dense.shape
        return dense.view(n, c * d, h, w)


@pytest.mark.parametrize("training", [True, False])
def test_detection_backbone(make, device, training):
    net = DetectionBackbone().to(device).train(training)
    x = make(n=90, shape=(11, 8, 8))
    dense = net(x)
    assert dense.shape == (2, 32, 4, 4)
    step(net, dense.square().sum())


class UNet(nn.Module):
    """Down, 1x1 head with padding, up by inverse convolutions and skip connections."""

    def __init__(self):
        super().__init__()
        self.stem = spconv.SparseSequential(
            spconv.SubMConv3d(
                4, 8, 5, padding=1, bias=False, indice_key="stem", algo=spconv.ConvAlgo.Native
            ),
            nn.BatchNorm1d(8),
            nn.ReLU(),
        )
        self.down = spconv.SparseSequential(
            spconv.SparseConv3d(8, 16, kernel_size=2, stride=2, bias=False, indice_key="sp1"),
            nn.BatchNorm1d(16),
            nn.ReLU(),
        )
        self.up = spconv.SparseSequential(
            spconv.SparseInverseConv3d(16, 8, kernel_size=2, bias=False, indice_key="sp1"),
            nn.BatchNorm1d(8),
            nn.ReLU(),
        )
        self.skip = spconv.SparseSequential(
            spconv.SubMConv3d(16, 8, kernel_size=1, padding=1, bias=False), nn.BatchNorm1d(8)
        )
        self.head = spconv.SubMConv3d(8, 5, kernel_size=1, padding=1, bias=True)

    def forward(self, x):
        fine = self.stem(x)
        coarse = self.up(self.down(fine))
        joined = coarse.replace_feature(torch.cat((coarse.features, fine.features), dim=1))
        out = self.skip(joined)
        out += fine
        return self.head(out).features


@pytest.mark.parametrize("amp", [None, torch.float16, torch.bfloat16])
def test_segmentation_unet(make, device, amp):
    net = UNet().to(device)
    x = make(n=90)
    with torch.autocast(device.type, dtype=amp or torch.float16, enabled=amp is not None):
        logits = net(x)
    assert logits.shape == (90, 5)
    step(net, logits.float().square().mean())


class Pointwise(spconv.SparseConv3d):
    """A 1x1 layer whose author overrides the original's weight rule."""

    def forward(self, input):
        weight = self.weight.view(self.out_channels, self.in_channels).permute(1, 0)
        out = SparseConvTensor(
            torch.mm(input.features, weight),
            input.indices,
            input.spatial_shape,
            input.batch_size,
        )
        out.indice_dict = input.indice_dict
        out.grid = input.grid
        return out


def test_overridden_pointwise_layer_carries_the_dict(make, device):
    net = spconv.SparseSequential(
        spconv.SparseConv3d(4, 6, 2, 2, indice_key="down"),
        Pointwise(6, 6, 1, bias=False),
        spconv.SparseInverseConv3d(6, 3, 2, indice_key="down"),
    ).to(device)
    x = make()
    y = net(x)
    assert y.indices is x.indices
    step(net, y.features.square().sum())


def copy_with_features(x: SparseConvTensor, features: torch.Tensor) -> SparseConvTensor:
    """Rebuild a tensor field by field, as generative models wrap it."""
    out = SparseConvTensor(
        x.features.reshape(x.features.shape[0], -1), x.indices, x.spatial_shape, x.batch_size,
        x.grid, x.voxel_num, x.indice_dict,
    )  # fmt: skip
    out._features = features
    for name in (
        "benchmark", "benchmark_record", "thrust_allocator", "_timer", "force_algo", "int8_scale",
    ):  # fmt: skip
        setattr(out, name, getattr(x, name))
    return out


def test_field_by_field_copies_with_heads_and_half_weights(make, device):
    x = make(dtype=torch.float16)
    x = SparseConvTensor(
        x.features, x.indices, list((x.indices.max(0).values + 1)[1:]), x.batch_size
    )
    down = spconv.SparseConv3d(4, 8, 3, 2, 1, indice_key="d").to(device).half()
    up = spconv.SparseInverseConv3d(8, 4, 3, indice_key="d").to(device).half()
    coarse = down(x)
    order = coarse.indices[:, 0].argsort(stable=True)
    heads = coarse.features[order].reshape(-1, 2, 4)
    wrapped = copy_with_features(coarse, heads)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=device)
    y = up(copy_with_features(wrapped, wrapped.features.reshape(-1, 8)[back]))
    torch.testing.assert_close(y.features, up(coarse).features)
    assert y.indices is x.indices


class Container(nn.Sequential):
    """A container of its own that asks ``is_spconv_module``."""

    def forward(self, input):
        for module in self:
            if spconv.modules.is_spconv_module(module):
                input = module(input)
            else:
                input = input.replace_feature(module(input.features))
        return input


def test_foreign_container_and_padded_shapes(make, device):
    net = Container(
        spconv.SubMConv3d(4, 8, 5, padding=1, bias=False, indice_key="stem"),
        nn.BatchNorm1d(8, eps=1e-3),
        nn.GELU(),
        spconv.SubMConv3d(8, 8, 3, bias=True, indice_key="stage0"),
        nn.Linear(8, 8),
    ).to(device)
    x = make()
    shape = torch.add(x.indices[:, 1:].max(0).values, 96).tolist()
    x = SparseConvTensor(x.features, x.indices.contiguous(), shape, 2)
    y = net(x)
    step(net, y.features.square().sum())


def test_merging_scales_by_editing_indices(make, device):
    stem = spconv.SubMConv3d(4, 4, 3, indice_key="s").to(device)
    down = spconv.SparseConv3d(4, 4, 3, 2, 1, indice_key="d").to(device)
    fine = stem(make())
    coarse = down(fine)
    coarse.indices[:, 1:] *= 2
    merged = fine.replace_feature(torch.cat([fine.features, coarse.features]))
    merged.indices = torch.cat([fine.indices, coarse.indices])
    sites, rows = torch.unique(merged.indices[:, [0, 2, 3]], dim=0, return_inverse=True)
    features = merged.features.new_zeros(sites.shape[0], 4).index_add(0, rows, merged.features)
    flat = SparseConvTensor(features, sites, [7, 9], 2)
    y = spconv.SubMConv2d(4, 4, 3, padding=1).to(device)(flat)
    dense = y.dense()
    assert dense.shape == (2, 4, 7, 9)
    step(stem, dense.square().sum())
