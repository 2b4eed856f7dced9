"""HashTable: a dictionary on tensors, and the sites that RemoveDuplicate keeps."""

import random

import pytest
import torch

import compat.spconv.pytorch as spconv
from compat.spconv.pytorch.hash import HashTable

KEY = {"key_dtype": torch.int32, "value_dtype": torch.int64}


def ints(values, device, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device)


@pytest.mark.parametrize(("most", "expected"), [(-1, 3), (0, 0), (2, 2), (9, 3)])
def test_items_are_at_most_as_many_as_asked_for(most, expected, device):
    table = HashTable(device, torch.int32, torch.int32, max_size=10)
    table.insert(ints([7, 5, 6], device), ints([1, 2, 3], device))
    keys, values, count = table.items(most)
    assert keys.tolist() == [5, 6, 7][:expected]
    assert values.tolist() == [2, 3, 1][:expected]
    assert count.tolist() == [expected]


@pytest.mark.parametrize("key_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("value_dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_hash_table_is_a_dictionary(key_dtype, value_dtype, device):
    draw = random.Random(0)
    table, expected = HashTable(device, key_dtype, value_dtype, max_size=100), {}
    for step in range(8):
        keys = [draw.randrange(-20, 20) for _ in range(draw.randrange(12))]
        values = [draw.randrange(1000) for _ in keys]
        args = ints(keys, device, key_dtype), ints(values, device, value_dtype)
        if step % 3 == 2:
            failed = table.insert_exist_keys(*args)
            assert failed.dtype == torch.uint8
            assert failed.tolist() == [key not in expected for key in keys]
            expected |= {k: v for k, v in zip(keys, values, strict=True) if k in expected}
        else:
            table.insert(*args)
            for key, value in zip(keys, values, strict=True):
                expected.setdefault(key, value)
        found_keys, found_values, count = table.items()
        assert count.tolist() == [len(expected)]
        assert found_keys.tolist() == sorted(expected)
        assert found_values.tolist() == [expected[key] for key in sorted(expected)]


def test_hash_table_query_writes_where_keys_are_found(device):
    table = HashTable(device, **KEY)
    values, is_empty = table.query(ints([5], device))
    assert (values.tolist(), is_empty.tolist()) == ([0], [True])
    table.insert(ints([5, 3, 7], device), ints([1, 6, 4], device, torch.int64))
    values, is_empty = table.query(ints([7, 9, 5], device))
    assert (values.tolist(), is_empty.tolist()) == ([4, 0, 1], [False, True, False])
    mine = ints([70, 71, 72], device, torch.int64)
    values, _ = table.query(ints([7, 9, 5], device), mine)
    assert values is mine
    assert mine.tolist() == [4, 71, 1]


def test_hash_table_numbers_its_keys(device):
    table = HashTable(device, **KEY)
    table.insert(ints([5, 3, 7, 3], device))
    assert table.items()[1].tolist() == [0, 0, 0]
    assert table.assign_arange_().tolist() == [3]
    keys, values, count = table.items()
    assert (keys.tolist(), values.tolist(), count.tolist()) == ([3, 5, 7], [0, 1, 2], [3])
    keys, values, count = table.items(2)
    assert (keys.tolist(), values.tolist(), count.tolist()) == ([3, 5], [0, 1], [2])


def test_hash_table_names_what_does_not_fit():
    cpu = torch.device("cpu")
    with pytest.raises(TypeError, match=r"key_dtype must be int32 or int64.*float32 and"):
        HashTable(cpu, torch.float32, torch.int64)
    table = HashTable(cpu, torch.int32, torch.float32)
    with pytest.raises(RuntimeError, match=r"keys must be torch.int32 \[N\] on cpu"):
        table.insert(torch.tensor([1]))
    with pytest.raises(RuntimeError, match=r"values must be torch.float32 \[1\]"):
        table.insert(ints([1], cpu), ints([1], cpu))
    with pytest.raises(AssertionError, match="needs value_dtype int32 or int64"):
        table.assign_arange_()


def test_remove_duplicate_keeps_the_first_row_of_each_site(device):
    indices = ints([[1, 2, 3], [0, 1, 1], [1, 2, 3], [0, 0, 4], [0, 9, 9], [0, 1, 1]], device)
    before = indices.clone()
    features = torch.arange(12.0, device=device).view(6, 2).requires_grad_()
    grid = torch.zeros(1)
    x = spconv.SparseConvTensor(features, indices, [4, 5], 2, grid)
    out = spconv.spatial.RemoveDuplicate()(x)
    assert out.indices.tolist() == [[0, 0, 4], [0, 1, 1], [1, 2, 3]]
    assert out.features.tolist() == features[[3, 1, 0]].tolist()
    assert torch.equal(indices, before)
    assert out.grid is grid
    out.features.sum().backward()
    assert features.grad.sum(1).tolist() == [2, 2, 0, 2, 0, 0]


def test_identity_keeps_sizes():
    assert spconv.identity.Identity().input_spatial_size([3, 4]) == [3, 4]
