"""A captured encoder in DistributedDataParallel trains like the encoder itself."""

import copy
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

import compat.spconv.pytorch as spconv
import tritonspconv as ts

pytestmark = pytest.mark.skipif(
    not distributed.is_gloo_available(), reason="torch is built without gloo"
)

PROCESSES, STEPS, SHAPE = 2, 3, (9, 12, 10)


class Model(nn.Module):
    """An encoder of sparse layers, and a dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = spconv.SparseSequential(
            spconv.SubMConv3d(4, 8, 3, padding=1, bias=False, indice_key="a"),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            spconv.SparseConv3d(8, 8, 3, stride=2, padding=1, bias=False, indice_key="b"),
            nn.BatchNorm1d(8),
            nn.ReLU(),
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x).dense().flatten(2).mean(2))


def scene(n: int, seed: int) -> spconv.SparseConvTensor:
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(9 * 12 * 10, generator=generator)[:n]
    coords = torch.stack([cells * 0, *torch.unravel_index(cells, SHAPE)], dim=1).int()
    return spconv.SparseConvTensor(torch.randn(n, 4, generator=generator), coords, list(SHAPE), 1)


def train(rank: int, folder: str, captures: bool) -> None:
    """Train one replica; the first one saves parameters and statistics."""
    torch.set_num_threads(1)
    group = f"file://{folder}/group{captures}"
    distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    model = Model().train()
    if captures:
        model.encoder.forward = ts.capture(
            model.encoder, scene(60, 99), capacities=[50, 90], headroom=4, on_overflow="raise"
        )
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        n = 30 + 20 * step + 9 * rank
        parallel(scene(n, 10 * step + rank)).square().mean().backward()
        optimizer.step()
    if captures:
        assert model.encoder.forward.replays == STEPS
    state = {"parameters": [*model.parameters()], "buffers": [*model.buffers()]}
    torch.save(copy.deepcopy(state), f"{folder}/{captures}{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_train_as_without_a_capture(tmp_path: Path) -> None:
    for captures in (False, True):
        multiprocessing.spawn(train, (str(tmp_path), captures), nprocs=PROCESSES)
    for rank in range(PROCESSES):
        eager, captured = (
            torch.load(tmp_path / f"{captures}{rank}.pt", weights_only=False)
            for captures in (False, True)
        )
        for kind, values in eager.items():
            for got, expected in zip(captured[kind], values, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # The replicas saw different scenes, so equal parameters show that gradients were averaged.
    first, second = (
        torch.load(tmp_path / f"True{rank}.pt", weights_only=False)["parameters"]
        for rank in range(PROCESSES)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
