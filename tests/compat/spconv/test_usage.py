"""Idioms of downstream projects run unchanged; ``test_networks.py`` has more."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import compat.cumm.tensorview as tv
import compat.spconv.pytorch as spconv
from compat.spconv.utils import Point2VoxelCPU3d


class ImageBlock(nn.Module):
    """A residual block written for images, whose layers a subclass may replace."""

    def __init__(self, channels, conv):
        super().__init__()
        self.conv1, self.bn1 = conv(channels), nn.BatchNorm1d(channels)
        self.conv2, self.bn2 = conv(channels), nn.BatchNorm1d(channels)
        self.relu = nn.ReLU(inplace=True)


class SparseBlock(ImageBlock, spconv.SparseModule):
    """The image block and SparseModule at once, each initialised by hand."""

    def __init__(self, channels, key):
        spconv.SparseModule.__init__(self)
        ImageBlock.__init__(
            self,
            channels,
            lambda c: spconv.SubMConv3d(c, c, 3, padding=1, bias=False, indice_key=key),
        )

    def forward(self, x):
        identity = x.features
        out = self.conv1(x)
        out = out.replace_feature(self.relu(self.bn1(out.features)))
        out = self.conv2(out)
        out = out.replace_feature(self.bn2(out.features))
        return out.replace_feature(self.relu(out.features + identity))


class UBlock(nn.Module):
    """A U-Net that holds itself one level down; children by name, skips by row."""

    def __init__(self, widths, level=1):
        super().__init__()
        width = widths[0]
        self.blocks = spconv.SparseSequential(
            OrderedDict((f"block{n}", SparseBlock(width, f"subm{level}")) for n in range(2))
        )
        self.inner = None
        if len(widths) > 1:
            key = f"spconv{level}"
            self.conv = spconv.SparseSequential(
                nn.BatchNorm1d(width),
                nn.ReLU(),
                spconv.SparseConv3d(width, widths[1], 2, 2, bias=False, indice_key=key),
            )
            self.inner = UBlock(widths[1:], level + 1)
            self.deconv = spconv.SparseSequential(
                nn.BatchNorm1d(widths[1]),
                nn.ReLU(),
                spconv.SparseInverseConv3d(widths[1], width, 2, bias=False, indice_key=key),
            )
            self.tail = spconv.SparseSequential(
                OrderedDict(merge=spconv.SubMConv3d(2 * width, width, 1, bias=False))
            )

    def forward(self, x):
        out = self.blocks(x)
        if self.inner is None:
            return out
        back = self.deconv(self.inner(self.conv(out)))
        assert back.indices is out.indices
        return self.tail(out.replace_feature(torch.cat((out.features, back.features), dim=1)))


def test_recursive_unet_of_blocks_with_two_bases(make, device):
    net = UBlock([4, 8, 12]).to(device)
    x = make(n=120, shape=(8, 8, 8))
    y = net(x)
    assert y.indices is x.indices
    assert sorted(y.indice_dict) == ["subm1"]  # the skip connection's key
    assert "inner.inner.blocks.block1.bn2.running_var" in net.state_dict()
    assert isinstance(net.blocks.block0, spconv.SparseModule)
    y.features.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_under_autocast_follows_float32(make, device, dtype):
    """With the gradient scaler, unscaling and clipping of a usual training loop."""
    curves = []
    for enabled in (False, True):
        torch.manual_seed(0)
        net = UBlock([4, 8]).to(device).train()
        scaler = torch.amp.GradScaler(device.type, enabled=enabled and dtype is torch.float16)
        optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2)
        losses = []
        for _ in range(8):
            optimiser.zero_grad()
            x = make(n=120, shape=(8, 8, 8))
            with torch.autocast(device.type, dtype=dtype, enabled=enabled):
                loss = (net(x).features.float() - 1).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimiser)
            scaler.update()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    assert curves[0][-1] < 0.9 * curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=5e-2, atol=0)


def test_height_compression(make, device):
    """A dense tensor's heights become channels of an image; every voxel gets a gradient."""
    x = make(n=90, channels=8, shape=(2, 6, 7))
    dense = x.dense()
    n, c, d, h, w = dense.shape
    out = dense.view(n, c * d, h, w)
    image = torch.zeros(2, 8, 2, 6, 7, device=device)
    batch, z, y, column = x.indices.long().T
    image[batch, :, z, y, column] = x.features.detach()
    assert torch.equal(out, image.reshape(2, 16, 6, 7))
    (out * torch.randn_like(out)).sum().backward()
    assert x.features.grad.abs().sum(1).min() > 0


def test_levels_merged_in_the_plane_by_editing_their_indices(make, device):
    """Coarse levels, scaled up in place and joined to a finer one, get the gradients of copies."""
    torch.manual_seed(0)
    down = nn.ModuleList(
        spconv.SparseConv3d(4, 4, 3, 2, 1, bias=False, indice_key=f"down{n}") for n in range(3)
    ).to(device)
    plane = spconv.SparseSequential(
        spconv.SparseConv2d(4, 4, 3, padding=1, bias=False, indice_key="plane"),
        spconv.SubMConv2d(4, 4, 3, padding=1),
    ).to(device)

    def gradients(edit):
        x = make(n=200, shape=(8, 16, 16))
        fine = down[0](x)
        middle = down[1](fine)
        coarse = down[2](middle)
        moved = [edit(level, scale) for level, scale in ((middle, 2), (coarse, 4))]
        joined = fine.replace_feature(torch.cat([t.features for t in (fine, middle, coarse)]))
        joined.indices = torch.cat([fine.indices, *moved])
        cells, rows = torch.unique(joined.indices[:, [0, 2, 3]], dim=0, return_inverse=True)
        sums = joined.features.new_zeros(len(cells), 4).index_add_(0, rows, joined.features)
        flat = spconv.SparseConvTensor(sums, cells, joined.spatial_shape[1:], joined.batch_size)
        out = plane(flat).features
        leaves = [x.features, *down.parameters()]
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    def in_place(level, scale):
        level.indices[:, 1:] *= scale
        return level.indices

    def on_a_copy(level, scale):
        return torch.cat([level.indices[:, :1], level.indices[:, 1:] * scale], 1)

    for ours, expected in zip(gradients(in_place), gradients(on_a_copy), strict=True):
        torch.testing.assert_close(ours, expected)


class Clouds(Dataset):
    """Worker processes voxelise point clouds; each makes its own generator."""

    generator = None

    def __len__(self):
        return 4

    def __getitem__(self, number):
        if self.generator is None:
            self.generator = Point2VoxelCPU3d(
                vsize_xyz=[0.5, 0.5, 0.5],
                coors_range_xyz=[0, 0, 0, 4, 4, 2],
                num_point_features=4,
                max_num_points_per_voxel=5,
                max_num_voxels=100,
            )
        points = np.random.default_rng(number).random((200, 4), dtype=np.float32) * 4
        return [t.numpy() for t in self.generator.point_to_voxel(tv.from_numpy(points))]


def collate(samples):
    """Average the points of each voxel, and put the sample's number before its coordinates."""
    feats = [voxels.sum(1) / counts[:, None] for voxels, _, counts in samples]
    coords = [
        np.pad(indices, ((0, 0), (1, 0)), constant_values=((0, 0), (number, 0)))
        for number, (_, indices, _) in enumerate(samples)
    ]
    return torch.from_numpy(np.concatenate(feats)), torch.from_numpy(np.concatenate(coords))


# Python 3.12 warns of a fork in a process that has threads, and torch has threads.
@pytest.mark.filterwarnings("ignore:This process.* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_voxelise(context, device):
    options = {"batch_size": 2, "collate_fn": collate}
    loaded = list(DataLoader(Clouds(), num_workers=1, multiprocessing_context=context, **options))
    for found, expected in zip(loaded, DataLoader(Clouds(), **options), strict=True):
        assert all(map(torch.equal, found, expected))
    feats, coords = (part.to(device) for part in loaded[1])
    assert coords[:, 0].unique().tolist() == [0, 1]
    x = spconv.SparseConvTensor(feats, coords, [4, 8, 8], 2)
    out = spconv.SubMConv3d(4, 6, 3, padding=1, indice_key="subm1").to(device)(x)
    assert out.features.shape == (len(feats), 6)
