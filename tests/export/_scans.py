"""Scans and networks for the tests of the export."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tritonspconv.points import FRONT_CROP
from tritonspconv.testing.lidar import simulate_sweep

SHAPE = [41, 160, 160]


def sweep(
    seed: int, channels: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return voxels of a simulated street in a grid of :data:`SHAPE`: features, coordinates."""
    points = simulate_sweep(seed, beams=24, azimuths=384).points
    lower = torch.tensor(FRONT_CROP.point_range[:3])
    cells = ((points[:, :3] - lower) / torch.tensor([0.25, 0.25, 0.1])).floor().long()
    inside = ((cells >= 0) & (cells < torch.tensor(SHAPE[::-1]))).all(1)
    coords = torch.unique(cells[inside].flip(1), dim=0)
    coords = nn.functional.pad(coords, (1, 0)).int()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(coords), channels, generator=generator).to(dtype), coords


def engine(feats: Tensor, coords: Tensor) -> ts.SparseTensor:
    """Return a bounded tensor of the engine."""
    return ts.SparseTensor(feats, coords, spatial_shape=SHAPE, batch_size=1)


def spconv_tensor(feats: Tensor, coords: Tensor) -> spconv.SparseConvTensor:
    """Return a tensor of ``compat.spconv``."""
    return spconv.SparseConvTensor(feats, coords, SHAPE, 1)


def minkowski(feats: Tensor, coords: Tensor) -> ME.SparseTensor:
    """Return a tensor of ``compat.minkowski``."""
    return ME.SparseTensor(feats, coords)


def trained(net: nn.Module) -> Any:
    """Return a network whose norms have statistics, in evaluation mode."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return net.eval()


class Of(nn.Module):
    """A network of one function of its sparse tensor, beside some layers."""

    def __init__(self, function: Any, **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Any) -> Any:
        """Apply the function."""
        return self.function(self, x)
