"""SyncBatchNorm in training uses statistics of all processes, never those of one launch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from tests._fused import record_fused
from tritonspconv import SparseTensor
from tritonspconv import nn as tsnn
from tritonspconv.nn._conv import Conv
from tritonspconv.testing import random_sites

ROWS = (40, 7)


def network(device) -> tsnn.Sequential:
    torch.manual_seed(0)
    conv = tsnn.SubMConv3d(3, 5, 3)
    return tsnn.Sequential(conv, tsnn.SyncBatchNorm(5), tsnn.ReLU()).to(device)


@pytest.mark.parametrize("norm", [tsnn.SyncBatchNorm, nn.SyncBatchNorm])
def test_a_convolution_does_not_take_its_statistics_alone(norm, monkeypatch):
    """Other processes may hold more rows, so only the norm itself can check their number."""
    taken = record_fused(monkeypatch, Conv)
    net = tsnn.Sequential(tsnn.SubMConv3d(3, 5, 3), norm(5), tsnn.ReLU())
    x = SparseTensor(torch.randn(20, 3), random_sites(20, extent=4))
    net(x)
    assert not taken
    with torch.no_grad():
        net.eval()(x)
    assert taken == [(True, True)]


def sample(rank: int, device) -> SparseTensor:
    """Return the rows of one process: sample ``rank`` of the scene."""
    generator = torch.Generator().manual_seed(rank)
    sites = random_sites(ROWS[rank], extent=4, batch_size=1, generator=generator, device=device)
    return SparseTensor(torch.randn(ROWS[rank], 3, generator=generator).to(device), sites)


def _train(rank: int, folder: str) -> None:
    device = torch.device("cuda", 0)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    net = network(device)
    out = net(sample(rank, device)).feats
    (out * torch.linspace(-1, 1, out.numel(), device=device).view_as(out)).sum().backward()
    grads = [parameter.grad for parameter in net.parameters()]
    torch.save([out.detach(), grads, list(net.buffers())], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.gpu
def test_two_processes_are_one_batch(tmp_path: Path):
    """Check output, summed gradients and running statistics against both samples in one process."""
    mp.spawn(_train, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    net = network("cuda")
    norm = nn.BatchNorm1d(5).cuda()
    rows = torch.cat([net[0](sample(rank, "cuda")).feats for rank in range(2)])
    expected = norm(rows).relu()
    torch.testing.assert_close(
        torch.cat([out for out, *_ in parts]), expected, rtol=1e-4, atol=1e-4
    )
    steps = [torch.linspace(-1, 1, n * 5, device="cuda").view(n, 5) for n in ROWS]
    (expected * torch.cat(steps)).sum().backward()
    wanted = [p.grad for p in (*net[0].parameters(), *norm.parameters())]
    for ours, theirs, exact in zip(parts[0][1], parts[1][1], wanted, strict=True):
        torch.testing.assert_close(ours + theirs, exact, rtol=1e-3, atol=1e-3)
    for ours, theirs, exact in zip(parts[0][2], parts[1][2], norm.buffers(), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)
        assert torch.equal(ours, theirs)
