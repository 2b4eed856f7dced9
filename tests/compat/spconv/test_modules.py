"""Containers, feature-wise layers, tables and sparse addition."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import compat.spconv.pytorch as spconv
from compat.spconv.pytorch import SparseConvTensor


class Doubling(nn.Module):
    def forward(self, features):
        assert isinstance(features, torch.Tensor)
        return 2 * features


def test_sequential_hands_features_to_dense_children(make, device):
    chain = spconv.SparseSequential(
        spconv.SubMConv3d(4, 6, 3, bias=False),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 5),
        nn.Identity(),
        nn.LayerNorm(5),
        nn.GELU(),
        nn.Dropout(0.0),
        spconv.SparseBatchNorm(5),
        spconv.SparseReLU(),
        spconv.SparseIdentity(),
        Doubling(),
    ).to(device)
    y = chain(make())
    assert isinstance(y, SparseConvTensor)
    assert y.features.shape == (40, 5)
    assert (y.features >= 0).all()


def test_sequential_continues_on_plain_tensors(make, device):
    chain = spconv.SparseSequential(spconv.ToDense(), nn.Conv3d(4, 2, 1), nn.ReLU()).to(device)
    assert chain(make()).shape == (2, 2, 6, 5, 7)
    assert spconv.SparseSequential(nn.Linear(4, 7))(torch.ones(2, 4)).shape == (2, 7)


def test_sequential_names_indices_and_add():
    chain = spconv.SparseSequential(nn.ReLU(), nn.GELU())
    chain.add(nn.SiLU(), "last")
    chain.add(nn.Identity())
    assert list(chain._modules) == ["0", "1", "last", "3"]
    assert len(chain) == 4
    assert isinstance(chain[-1], nn.Identity)
    assert isinstance(chain[1], nn.GELU)
    for index in (4, -5):
        with pytest.raises(IndexError, match="out of range"):
            chain[index]
    named = spconv.SparseSequential(OrderedDict(a=nn.ReLU(), b=nn.GELU()))
    assert list(named._modules) == ["a", "b"]
    assert list(spconv.SparseSequential(nn.ReLU(), act=nn.ReLU())._modules) == ["0", "act"]
    with pytest.raises(ValueError, match="is taken"):
        spconv.SparseSequential(nn.ReLU(), **{"0": nn.ReLU()})


def test_sequential_runs_every_child_on_empty_input(make, device):
    chain = spconv.SparseSequential(
        spconv.SubMConv3d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5)
    ).to(device)
    x = make(n=0)
    chain[1].running_mean.fill_(3)
    y = chain(x)
    assert y.features.shape == (0, 5)
    assert chain[1].running_mean.eq(3).all()
    y.features.sum().backward()
    assert all(parameter.grad is not None for parameter in chain.parameters())


def test_is_spconv_module_and_is_sparse_conv():
    modules = spconv.modules
    for module in (
        spconv.SubMConv3d(1, 1, 3),
        spconv.SparseSequential(),
        spconv.SparseMaxPool3d(2),
        spconv.SparseBatchNorm(3),
        spconv.SparseReLU(),
        spconv.ToDense(),
    ):
        assert modules.is_spconv_module(module)
    for module in (
        nn.ReLU(),
        spconv.SparseIdentity(),
        spconv.Identity(),
        modules.SparseSyncBatchNorm(3),
    ):
        assert not modules.is_spconv_module(module)
    assert modules.is_sparse_conv(spconv.SparseInverseConv2d(1, 1, 3, "k"))
    assert not modules.is_sparse_conv(spconv.SparseMaxPool3d(2))


def test_feature_layers_take_tensors_too(make):
    x = make()
    for layer in (spconv.SparseBatchNorm(4), spconv.SparseReLU(), spconv.SparseIdentity()):
        layer = layer.to(x.features.device)
        sparse, plain = layer(x), layer(x.features)
        assert torch.equal(sparse.features, plain)
        assert sparse.indice_dict is x.indice_dict
        assert sparse is not x
    assert spconv.Identity()(x) is x
    assert "weight" in spconv.SparseBatchNorm(4).state_dict()


def test_convert_sync_batchnorm_keeps_sparse_layers_sparse():
    chain = spconv.SparseSequential(spconv.SparseBatchNorm(4), nn.BatchNorm1d(4))
    running_mean = chain[0].running_mean
    converted = spconv.modules.SparseSyncBatchNorm.convert_sync_batchnorm(chain)
    assert type(converted[0]) is spconv.modules.SparseSyncBatchNorm
    assert type(converted[1]) is nn.SyncBatchNorm
    assert converted[0].running_mean is running_mean


def test_assign_name_for_sparse_modules():
    chain = spconv.SparseSequential(spconv.SparseSequential(spconv.SubMConv3d(1, 1, 3)))
    spconv.assign_name_for_sparse_modules(chain)
    assert chain[0][0]._sparse_unique_name == "0.0"
    assert spconv.SubMConv3d(1, 1, 3, name="stem").name == "stem"


def test_sparse_module_as_second_base_with_both_initialisers():
    class Dense(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.width = width

    class Block(Dense, spconv.SparseModule):
        def __init__(self):
            spconv.SparseModule.__init__(self)
            Dense.__init__(self, 3)

    assert Block().width == 3


def test_tables_add_and_join_rows(make):
    x = make()
    y = x.replace_feature(2 * x.features)
    y.benchmark = True
    added = spconv.AddTable()([x, y])
    assert torch.equal(added.features, 3 * x.features)
    assert added.indices is x.indices
    assert added.indice_dict is x.indice_dict
    assert added.benchmark
    joined = spconv.JoinTable()([x, x.replace_feature(x.features[:, :2])])
    assert joined.features.shape == (40, 6)
    for table in (spconv.AddTable(), spconv.JoinTable()):
        with pytest.raises(AssertionError, match="same rows"):
            table([x, make(n=7)])
    with pytest.raises(AssertionError, match="same rows"):
        spconv.AddTable()([x, x.replace_feature(x.features[:, :2])])


def test_concat_table_forks(make, device):
    fork = spconv.ConcatTable().add(spconv.SubMConv3d(4, 2, 3)).add(spconv.Identity()).to(device)
    x = make()
    a, b = fork(x)
    assert a.features.shape == (40, 2)
    assert b is x


def test_remove_grid_and_to_dense(make):
    x = make()
    assert spconv.RemoveGrid()(x) is x
    assert x.grid is None
    assert torch.equal(spconv.ToDense()(x), x.dense())


def test_sparse_add_unites_sites_in_ascending_order(make):
    a, b = make(), make(n=30, seed=1)
    y = spconv.functional.sparse_add(a, b)
    torch.testing.assert_close(y.dense(), a.dense() + b.dense())
    sites = torch.cat([a.indices, b.indices]).unique(dim=0)
    assert torch.equal(y.indices, sites)
    assert y.indice_dict == {}
    y.features.sum().backward()
    assert torch.equal(a.features.grad, torch.ones_like(a.features))
    misaligned = spconv.AddTableMisaligned()([a, b])
    assert torch.equal(misaligned.features, y.features)
    assert spconv.functional.sparse_add_hash_based(a, b).indices.shape == y.indices.shape


def test_sparse_add_keeps_the_rows_and_dict_of_an_operand_that_holds_all_sites(make, device):
    a = spconv.SubMConv3d(4, 4, 3, indice_key="k").to(device)(make())
    part = a.select_by_index(slice(3, 20))
    y = spconv.functional.sparse_add(part, a)
    assert y.indices is a.indices
    assert y.indice_dict is a.indice_dict
    torch.testing.assert_close(y.dense(), a.dense() + part.dense())


def test_sparse_add_of_different_grids_raises(make):
    with pytest.raises(ValueError, match="one spatial shape"):
        spconv.functional.sparse_add(make(), make(shape=(6, 5, 8)))
