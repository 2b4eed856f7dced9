"""Whole networks of spconv: states, fresh parameters, and twenty steps of training."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.parity.case import Case, Run, canonical
from tests.parity.cases.spconv_run import native
from tritonspconv.models.lidar import second_encoder, sparse_unet

TRAINED = {"cpu": ("float64", "float32"), "cuda": ("float32", "amp-float16")}


class ResidualBlock(nn.Module):
    """Two convolutions with bias beside the identity, as in VoxelResBackBone8x."""

    def __init__(self, spconv: ModuleType, conv: str, channels: int, key: str, algo: Any) -> None:
        super().__init__()
        layer = partial(
            getattr(spconv, conv), channels, channels, 3, padding=1, bias=True, indice_key=key,
            **algo,
        )  # fmt: skip
        self.conv1, self.bn1 = layer(), _norm(channels)
        self.conv2, self.bn2 = layer(), _norm(channels)

    def forward(self, x: Any) -> Any:
        """Return a tensor at the same sites."""
        y = self.conv1(x)
        y = y.replace_feature(torch.relu(self.bn1(y.features)))
        y = self.conv2(y)
        return y.replace_feature(torch.relu(self.bn2(y.features) + x.features))


def _norm(channels: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)


def residual_encoder(spconv: ModuleType, widths: tuple[int, ...], ndim: int, algo: Any) -> Any:
    """Build stages of two residual blocks; all but the first begin with a strided convolution.

    Three dimensions make VoxelResBackBone8x, two the sparse encoder of a pillar network.
    """
    subm, conv = f"SubMConv{ndim}d", f"SparseConv{ndim}d"
    first = getattr(spconv, subm)(4, widths[0], 3, padding=1, bias=False, indice_key="in", **algo)
    modules: list[nn.Module] = [first, _norm(widths[0]), nn.ReLU()]
    for level, width in enumerate(widths):
        if level:
            narrow = widths[level - 1]
            down = getattr(spconv, conv)(
                narrow, width, 3, 2, 1, bias=False, indice_key=f"down{level}", **algo
            )
            modules += [down, _norm(width), nn.ReLU()]
        blocks = [ResidualBlock(spconv, subm, width, f"res{level}", algo) for _ in range(2)]
        modules.append(nn.Sequential(*blocks))
    return Staged(modules)


class Staged(nn.Module):
    """Modules one after the other; some take the sparse tensor and some take its features."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(modules)

    def forward(self, x: Any) -> Any:
        """Return the tensor of the last stage."""
        for stage in self.stages:
            dense = isinstance(stage, (nn.BatchNorm1d, nn.ReLU))
            x = x.replace_feature(stage(x.features)) if dense else stage(x)
        return x


def second(spconv: ModuleType, algo: Any) -> nn.Module:
    """Build the SECOND encoder."""
    return second_encoder(spconv, **algo)


def voxel_res(spconv: ModuleType, algo: Any) -> nn.Module:
    """Build VoxelResBackBone8x, a quarter as wide."""
    return residual_encoder(spconv, (4, 8, 16, 32), 3, algo)


def unet(spconv: ModuleType, algo: Any) -> nn.Module:
    """Build SpUNet with its 1x1 layers, an eighth as wide."""
    return sparse_unet(spconv, channel_divisor=8, **algo)


def pillars(spconv: ModuleType, algo: Any) -> nn.Module:
    """Build a 2-D pillar encoder."""
    return residual_encoder(spconv, (16, 32, 32), 2, algo)


NETWORKS = {
    "second": (second, (41, 48, 40), 200),
    "voxel-res-backbone": (voxel_res, (21, 48, 40), 200),
    "spunet": (unet, (32, 32, 32), 200),
    "pillar-encoder": (pillars, (48, 40), 200),
}


def clustered(run: Run, shape: tuple[int, ...], n: int) -> Tensor:
    """Return sites around a few centres, so that deep layers still have neighbours."""
    ndim, tries = len(shape), 4 * n
    extent = torch.tensor(shape)
    centres = run.integers("centres", 1 << 20, 6, ndim).cpu() % extent
    spread = run.integers("spread", 4, tries, ndim, 4).cpu().sum(-1) - 6
    points = centres[run.integers("centre", 6, tries).cpu()] + spread
    batch = run.integers("batch", 2, tries, 1).cpu()
    inside = ((points >= 0) & (points < extent)).all(1)
    coords = torch.cat([batch, points], 1)[inside].int().unique(dim=0)
    order = np.argsort(run.raw("order", len(coords)), kind="stable")[:n]
    return coords[torch.from_numpy(order)].to(run.device)


def train(run: Run, name: str) -> None:
    """Descend for twenty steps towards a fixed pattern; compare losses and the last state."""
    build, shape, n = NETWORKS[name]
    spconv = run.module("pytorch")
    network = run.fill(build(spconv, native(run))).train()
    coords = clustered(run, shape, n)
    feats = run.feats(len(coords), 4)

    def loss_of() -> Tensor:
        x = spconv.SparseConvTensor(feats, coords, list(shape), 2)
        with run.autocast():
            out = network(x)
        out = out[0] if isinstance(out, tuple) else out
        rows = out.features[canonical(out.indices)].to(run.dtype)
        return nn.functional.mse_loss(rows, run.values("pattern", *rows.shape))

    run.descend(network, loss_of)


def exchanged(run: Run, name: str) -> None:
    """Record names, shapes and dtypes of a state, and its numbers for one seed."""
    torch.manual_seed(7)
    network = NETWORKS[name][0](run.module("pytorch"), native(run))
    state = network.state_dict()
    run.fact("state", [[key, list(v.shape), str(v.dtype)] for key, v in state.items()])
    metadata = {key: dict(value) for key, value in state._metadata.items()}
    run.fact("metadata", metadata)
    run.fact("modules", [type(module).__name__ for module in network.modules()])
    for key, value in list(state.items())[:12]:
        run.tensor(key, value)


CASES = [
    *(Case(f"train-{name}", partial(train, name=name), TRAINED, nudges=2) for name in NETWORKS),
    *(
        Case(f"state-{name}", partial(exchanged, name=name), {"cpu": ("float32",)}, exact=True)
        for name in NETWORKS
    ),
]
