"""Whole networks of MinkowskiEngine: forward, gradients, and twenty steps of training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.parity.case import GRAD, Case, Run, canonical
from tests.parity.cases.minkowski_run import EXACT, case, record
from tritonspconv.models.minkowski import mink_unet
from tritonspconv.testing.lidar import simulate_sweep

NUDGES = 2
VOXEL = 0.8  # metres


def voxels(run: Run, ndim: int = 3, n: int = 250, reach: int = 12) -> Tensor:
    """Return coordinates around a few centres, so that deep levels still have neighbours."""
    centres = run.integers("centres", 2 * reach, 5, ndim).cpu() - reach
    spread = run.integers("spread", 4, 4 * n, ndim, 4).cpu().sum(-1) - 6
    points = centres[run.integers("centre", 5, 4 * n).cpu()] + spread
    batch = run.integers("batch", 2, 4 * n, 1).cpu()
    coords = torch.cat([batch, points], 1).int().unique(dim=0)
    order = np.argsort(run.raw("order", len(coords)), kind="stable")[:n]
    return coords[torch.from_numpy(order)].to(run.device)


class ResUNet(nn.Module):
    """A U-Net with 3-wide strided layers and unit-length descriptors, as FCGF has.

    Args:
        ME: The library.
        channels: Channels of the four encoder levels.
        up_channels: Channels of the three decoder levels, fine to coarse.
    """

    def __init__(
        self,
        ME: ModuleType,
        block: Any,
        channels: tuple[int, ...] = (8, 12, 16, 24),
        up_channels: tuple[int, ...] = (12, 12, 16),
    ) -> None:
        super().__init__()
        self.ME = ME
        levels = range(len(channels))
        narrow = (1, *channels[:-1])
        self.downs = nn.ModuleList(
            ME.MinkowskiConvolution(
                narrow[i], channels[i], 5 if i == 0 else 3, stride=min(i + 1, 2), dimension=3
            )
            for i in levels
        )
        self.down_norms = nn.ModuleList(ME.MinkowskiInstanceNorm(width) for width in channels)
        self.down_blocks = nn.ModuleList(block(width, width, dimension=3) for width in channels)
        wide = (*(up + skip for up, skip in zip(up_channels[1:], channels[1:], strict=False)),)
        wide = (*wide, channels[-1])
        self.ups = nn.ModuleList(
            ME.MinkowskiConvolutionTranspose(c_in, c_out, 3, stride=2, dimension=3)
            for c_in, c_out in zip(wide, up_channels, strict=True)
        )
        self.up_blocks = nn.ModuleList(block(width, width, dimension=3) for width in up_channels)
        self.final = ME.MinkowskiConvolution(up_channels[0] + channels[0], 8, 1, dimension=3)

    def forward(self, x: Any) -> Any:
        """Return descriptors on the rows of ``x``."""
        skips = []
        for down, norm, block in zip(self.downs, self.down_norms, self.down_blocks, strict=True):
            x = block(norm(down(x)))
            skips.append(x)
        skips.pop()
        for up, block in zip(reversed(self.ups), reversed(self.up_blocks), strict=True):
            x = self.ME.cat(block(up(x)), skips.pop())
        x = self.final(x)
        return self.ME.SparseTensor(
            x.F / x.F.norm(p=2, dim=1, keepdim=True),
            coordinate_map_key=x.coordinate_map_key,
            coordinate_manager=x.coordinate_manager,
        )


class Autoencoder(nn.Module):
    """Strided layers, then generative layers whose sites are pruned to the true sites.

    Sites are pruned by coordinates, as in training of point cloud geometry compression (PCGCv2).

    Args:
        ME: The library.
    """

    def __init__(self, ME: ModuleType, channels: tuple[int, ...] = (8, 12, 16)) -> None:
        super().__init__()
        self.ME = ME
        self.stem = ME.MinkowskiConvolution(1, channels[0], 3, bias=True, dimension=3)
        pairs = list(itertools.pairwise(channels))
        self.downs = nn.ModuleList(
            ME.MinkowskiConvolution(a, b, 2, stride=2, bias=True, dimension=3) for a, b in pairs
        )
        self.ups = nn.ModuleList(
            ME.MinkowskiGenerativeConvolutionTranspose(b, a, 2, stride=2, bias=True, dimension=3)
            for a, b in reversed(pairs)
        )
        self.convs = nn.ModuleList(
            ME.MinkowskiConvolution(a, a, 3, bias=True, dimension=3) for a, _ in reversed(pairs)
        )
        self.scores = nn.ModuleList(
            ME.MinkowskiConvolution(a, 1, 3, bias=True, dimension=3) for a, _ in reversed(pairs)
        )
        self.relu = ME.MinkowskiReLU(inplace=False)
        self.prune = ME.MinkowskiPruning()

    def forward(self, x: Any) -> tuple[Any, list[Any]]:
        """Return the last features and the occupancy scores of every level."""
        truth = [x]
        x = self.relu(self.stem(x))
        for down in self.downs:
            x = self.relu(down(x))
            truth.append(x)
        truth.pop()
        scores = []
        for up, conv, score in zip(self.ups, self.convs, self.scores, strict=True):
            x = self.relu(conv(self.relu(up(x))))
            scores.append(score(x))
            x = self.prune(x, _among(x.C, truth.pop().C))
        return x, scores


def _among(coords: Tensor, others: Tensor) -> Tensor:
    """Return which rows of ``coords`` are rows of ``others``."""
    known = set(map(tuple, others.tolist()))
    return torch.tensor([tuple(row) in known for row in coords.tolist()], device=coords.device)


class ShortcutBlock(nn.Module):
    """A Bottleneck and a BasicBlock in a row, the first with a projected shortcut."""

    def __init__(self, ME: ModuleType, blocks: ModuleType) -> None:
        super().__init__()
        project = nn.Sequential(
            ME.MinkowskiConvolution(2, 16, 1, stride=2, dimension=3), ME.MinkowskiBatchNorm(16)
        )
        self.first = blocks.Bottleneck(2, 4, stride=2, downsample=project, dimension=3)
        self.second = blocks.BasicBlock(16, 16, dilation=2, dimension=3)
        self.pool = ME.MinkowskiGlobalMaxPooling()
        self.head = ME.MinkowskiLinear(16, 5)

    def forward(self, x: Any) -> Any:
        """Return one row per sample."""
        return self.head(self.pool(self.second(self.first(x))))


def _build(run: Run, name: str) -> tuple[nn.Module, int, int]:
    """Return a network, its input channels and its number of spatial axes."""
    ME = run.module()
    blocks = run.module("modules.resnet_block")
    if name == "resunet":
        return ResUNet(ME, blocks.BasicBlock), 1, 3
    if name == "autoencoder":
        return Autoencoder(ME), 1, 3
    if name == "resnet":
        return ShortcutBlock(ME, blocks), 2, 3
    if name == "minkunet-4d":
        return _mink_unet_4d(ME, 2, 5), 2, 4
    depth = int(name.removeprefix("minkunet"))
    return mink_unet(ME, 2, 5, depth=depth, channel_divisor=16), 2, 3


def _mink_unet_4d(ME: ModuleType, in_channels: int, num_classes: int) -> nn.Module:
    """Return a network over space and time that never strides over time."""
    return mink_unet(
        ME,
        in_channels,
        num_classes,
        depth=14,
        D=4,
        channel_divisor=16,
        stem=[5, 5, 5, 1],
        stride=[2, 2, 2, 1],
    )


def run_network(run: Run, name: str) -> None:
    """Run a network forward and backward in training mode; compare outputs and gradients."""
    module, channels, ndim = _build(run, name)
    network = run.fill(module).train()
    coords = voxels(run, ndim)
    feats = run.feats(len(coords), channels) + 1.5
    x = run.module().SparseTensor(feats.requires_grad_(), coordinates=coords)
    out = network(x)
    scores: list[Any] = []
    if isinstance(out, tuple):
        out, scores = out
    record(run, "out", out, kept="minkunet" in name or name == "resunet")
    for level, score in enumerate(scores):
        record(run, f"scores {level}", score)
    if scores:
        sum(score.F.square().mean() for score in scores).backward(retain_graph=True)
    run.backward(out.C, out.F, input=feats)
    _record_gradients(run, network)


def _record_gradients(run: Run, network: nn.Module) -> None:
    """Record the norm of every parameter's gradient, and the whole gradients of some layers."""
    gradients = {name: value.grad for name, value in network.named_parameters()}
    norms = [grad.double().norm() for grad in gradients.values() if grad is not None]
    assert len(norms) == len(gradients)
    run.tensor(f"{GRAD}norms", torch.stack(norms))
    names = list(gradients)
    for name in (names[0], names[len(names) // 2], names[-1]):
        grad = gradients[name]
        assert grad is not None
        run.tensor(GRAD + name, grad)


def evaluate(run: Run, name: str) -> None:
    """Run a network in evaluation mode."""
    module, channels, ndim = _build(run, name)
    network = run.fill(module).eval()
    coords = voxels(run, ndim)
    x = run.module().SparseTensor(run.feats(len(coords), channels), coordinates=coords)
    with torch.no_grad():
        record(run, "out", network(x), kept=True)


def train(run: Run, name: str) -> None:
    """Descend for twenty steps towards a fixed pattern; compare losses and the last state."""
    module, channels, ndim = _build(run, name)
    network = run.fill(module).train()
    coords = voxels(run, ndim)
    feats = run.feats(len(coords), channels) + 1.5

    def loss_of() -> Tensor:
        out = network(run.module().SparseTensor(feats, coordinates=coords))
        rows = out.F[canonical(out.C)]
        return nn.functional.mse_loss(rows, run.values("pattern", *rows.shape))

    run.descend(network, loss_of)


def train_scene(run: Run) -> None:
    """Train MinkUNet14 to name the classes of a small LiDAR sweep."""
    ME = run.module()
    sweep = simulate_sweep(0, beams=16, azimuths=96)
    coords, feats, labels = run.module("utils").sparse_quantize(
        sweep.points[:, :3], sweep.points, sweep.labels, quantization_size=VOXEL
    )
    coords, feats = run.module("utils").sparse_collate([coords], [feats])
    feats = run.nudged(feats.to(run.device, run.dtype) / 32)
    labels = labels.to(run.device)
    classes = int(sweep.labels.max()) + 1
    network = run.fill(mink_unet(ME, 4, classes, depth=14, channel_divisor=8)).train()

    def loss_of() -> Tensor:
        out = network(ME.SparseTensor(feats, coordinates=coords.to(run.device)))
        return nn.functional.cross_entropy(out.F, labels)

    run.descend(network, loss_of)


def state(run: Run, name: str) -> None:
    """Record names, shapes and dtypes of a state, and its numbers for one seed."""
    torch.manual_seed(7)
    found = _build(run, name)[0].state_dict()
    run.fact("state", [[key, list(v.shape), str(v.dtype)] for key, v in found.items()])
    for key, value in list(found.items())[:12]:
        run.tensor(key, value)


def field_network(run: Run) -> None:
    """Run a 4-D network on a field and return to its points, as 4DMOS does."""
    ME = run.module()
    points = run.values("points", 150, 4, scale=8.0)
    points[:, 3] = run.integers("time", 3, 150).to(points)
    points = torch.cat([torch.zeros_like(points[:, :1]), points], 1)
    field = ME.TensorField(
        run.feats(150, 1),
        coordinates=points,
        quantization_mode=ME.SparseTensorQuantizationMode.UNWEIGHTED_AVERAGE,
    )
    network = run.fill(_mink_unet_4d(ME, 1, 3)).train()
    out = network(field.sparse()).slice(field)
    run.tensor("out", out.F)
    out.F.backward(run.values("grad", *out.F.shape))
    _record_gradients(run, network)


def _cases() -> Iterator[Case]:
    for name in ("minkunet14", "minkunet34", "resunet", "autoencoder", "resnet", "minkunet-4d"):
        yield case(f"net-{name}", run_network, nudges=NUDGES, name=name)
    for name in ("minkunet34", "resunet", "minkunet-4d"):
        yield case(f"eval-{name}", evaluate, name=name)
    for name in ("minkunet14", "resunet", "resnet", "minkunet-4d"):
        yield case(f"train-{name}", train, nudges=NUDGES, name=name)
    for name in ("minkunet14", "minkunet34", "resunet", "autoencoder", "resnet", "minkunet-4d"):
        yield Case(f"state-{name}", partial(state, name=name), EXACT, exact=True)
    yield case("train-scene", train_scene, nudges=NUDGES)
    yield case("net-field-4d", field_network, nudges=NUDGES)


CASES = list(_cases())
