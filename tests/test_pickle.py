"""Sparse tensors travel: by pickle, by copy, to other processes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

import tritonspconv as ts

COPIES: dict[str, Callable[[ts.SparseTensor], ts.SparseTensor]] = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


def used_tensor() -> ts.SparseTensor:
    """Return a tensor that layers have read: it holds an index and kernel maps."""
    coords = torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4)).int()
    x = ts.SparseTensor(torch.randn(32, 4), coords, spatial_shape=(4, 4), batch_size=2)
    down = ts.nn.SparseConv2d(4, 4, 2, 2)
    ts.nn.SparseInverseConv2d(4, 4, 2)(down(ts.nn.SubMConv2d(4, 4, 3)(x)), x)
    return x


@pytest.mark.parametrize("way", COPIES)
def test_a_tensor_that_layers_have_read_can_be_copied(way: str) -> None:
    x = used_tensor()
    y = COPIES[way](x)
    assert torch.equal(y.feats, x.feats)
    assert torch.equal(y.coords, x.coords)
    assert y.sites.grid == x.sites.grid
    layer = ts.nn.SparseConv2d(4, 8, 3, 2, 1)
    assert torch.equal(layer(y).feats, layer(x).feats)


def test_caches_stay_behind() -> None:
    x = used_tensor()
    assert x.sites.map_cache
    assert not pickle.loads(pickle.dumps(x)).sites.map_cache


def test_tensors_pickled_together_keep_their_common_sites() -> None:
    x = used_tensor()
    y, z = pickle.loads(pickle.dumps((x, x.replace(x.feats * 2))))
    assert y.sites is z.sites
    assert torch.equal((y + z).feats, x.feats * 3)


class Scans(torch.utils.data.Dataset):
    """Scans of 20 sites; the collate function below runs a layer in the worker."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> torch.Tensor:
        return torch.full((20, 4), float(place))


def collate(feats: list[torch.Tensor]) -> ts.SparseTensor:
    cells = torch.arange(20)
    rows = [torch.stack([torch.full_like(cells, b), cells // 5, cells % 5], 1) for b in range(2)]
    x = ts.SparseTensor(torch.cat(feats), torch.cat(rows).int(), spatial_shape=(4, 5), batch_size=2)
    with torch.no_grad():
        return ts.nn.AvgPool2d(2)(x)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_worker_process_runs_layers(start: str) -> None:
    loader = torch.utils.data.DataLoader(
        Scans(), batch_size=2, collate_fn=collate, num_workers=1, timeout=60,
        multiprocessing_context=start,
    )  # fmt: skip
    used_tensor()  # The parent has used torch and the engine before it forks.
    found = [batch.feats.mean().item() for batch in loader]
    assert found == pytest.approx([0.5, 2.5])
