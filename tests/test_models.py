"""The networks of tritonspconv.models take other widths than those of the papers."""

import torch

import compat.spconv.pytorch as spconv
from tritonspconv.models import lidar
from tritonspconv.testing import random_sites


def test_the_stem_of_a_unet_may_be_narrower_than_the_first_level(monkeypatch):
    monkeypatch.setattr(lidar.SparseUNet, "stem_channels", 16)
    net = lidar.sparse_unet(spconv, num_classes=5, channel_divisor=8).eval()
    coords = random_sites(40, extent=16, batch_size=1).coords
    x = spconv.SparseConvTensor(torch.randn(40, 4), coords, [16, 16, 16], 1)
    logits, stages = net(x)
    assert stages["stem"].features.shape == (40, 2)
    assert stages["encoder1"].features.shape[1] == 4
    assert logits.features.shape == (40, 5)
