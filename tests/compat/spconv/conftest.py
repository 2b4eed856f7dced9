"""Inputs for the tests of the spconv namespace."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch

import compat.spconv.pytorch as spconv

MakeTensor = Callable[..., spconv.SparseConvTensor]


@pytest.fixture
def make(device: torch.device) -> MakeTensor:
    """Return a factory of SparseConvTensors with distinct random sites in random row order."""

    def make_tensor(
        n: int = 40,
        channels: int = 4,
        shape: Sequence[int] = (6, 5, 7),
        batch_size: int = 2,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> spconv.SparseConvTensor:
        generator = torch.Generator().manual_seed(seed)
        cells = torch.randperm(batch_size * math.prod(shape), generator=generator)[:n]
        indices = torch.stack(torch.unravel_index(cells, (batch_size, *shape)), 1).int()
        features = torch.randn(n, channels, generator=generator).to(dtype)
        return spconv.SparseConvTensor(
            features.to(device).requires_grad_(), indices.to(device), list(shape), batch_size
        )

    return make_tensor
