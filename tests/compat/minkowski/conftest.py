"""Inputs for the tests of the MinkowskiEngine namespace."""

from collections.abc import Callable

import pytest
import torch

import compat.minkowski as ME

MakeTensor = Callable[..., ME.SparseTensor]
MakeField = Callable[..., ME.TensorField]


def random_coordinates(n: int, ndim: int, reach: int, batch_size: int, seed: int) -> torch.Tensor:
    """Return distinct int32 coordinates [n, 1 + D] around zero, every sample among them."""
    generator = torch.Generator().manual_seed(seed)
    axes = [torch.arange(batch_size), *[torch.arange(-reach, reach)] * ndim]
    cells = torch.cartesian_prod(*axes)
    return cells[torch.randperm(len(cells), generator=generator)[:n]].int()


@pytest.fixture
def make(device: torch.device) -> MakeTensor:
    """Return a factory of SparseTensors with distinct random sites in random row order."""

    def make_tensor(
        n: int = 40,
        channels: int = 4,
        ndim: int = 3,
        reach: int = 3,
        batch_size: int = 2,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **options: object,
    ) -> ME.SparseTensor:
        coords = random_coordinates(n, ndim, reach, batch_size, seed).to(device)
        feats = torch.randn(n, channels, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        return ME.SparseTensor(
            feats.to(device), coordinates=coords, **{"requires_grad": True, **options}
        )

    return make_tensor


@pytest.fixture
def make_field(device: torch.device) -> MakeField:
    """Return a factory of TensorFields with random points, some in one cell."""

    def make_tensor_field(n: int = 40, channels: int = 4, seed: int = 0) -> ME.TensorField:
        generator = torch.Generator().manual_seed(seed)
        points = 4 * torch.rand(n, 3, generator=generator) - 2
        batch = (torch.arange(n) % 2).float()
        feats = torch.randn(n, channels, generator=generator)
        return ME.TensorField(
            feats.to(device), coordinates=torch.cat([batch[:, None], points], 1).to(device)
        )

    return make_tensor_field
