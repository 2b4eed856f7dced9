"""Pair lists: Triton against the table from which they are read."""

import pytest
import torch

from tests._oracle import pair_triples, swapped, table_triples
from tritonspconv.kernel_map import NeighborTable
from tritonspconv.kernels.eager import pairs as eager
from tritonspconv.kernels.eager.invert_table import mask_words

pytest.importorskip("triton", reason="Triton is not installed")

from tritonspconv.kernels.triton import pairs as kernels


@pytest.fixture(params=[True, False], ids=["by-masks", "by-sums"])
def _places(request, monkeypatch):
    """Test both ways in which a program finds the place of its pairs."""
    if not request.param:
        monkeypatch.setattr(kernels, "_MAX_COUNTED", 0)
        monkeypatch.setattr(kernels, "_BLOCK_COUNTS", 16)


@pytest.mark.usefixtures("_places")
@pytest.mark.parametrize("ordered", [False, True], ids=["plain", "ordered"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("volume", "n"), [(27, 0), (27, 1), (1, 63), (27, 200), (32, 70), (40, 70), (3, 5000)]
)
def test_pair_lists(triton_device, volume, n, share, ordered):
    rows = torch.randint(1000, (volume, n), dtype=torch.int32)
    rows[torch.rand(volume, n) >= share] = -1
    order = torch.randperm(n).int() if ordered else None
    columns = range(n) if order is None else order.tolist()
    table = rows, mask_words(rows), order
    on_device = [None if part is None else part.to(triton_device) for part in table]
    for taps in {volume, (volume + 1) // 2}:
        expected = [
            (int(rows[v, c]), row, v)
            for v in range(taps)
            for c, row in enumerate(columns)
            if rows[v, c] >= 0
        ]
        for capacity in (taps * n, len(expected)):
            pairs, tap_ptr = kernels.pair_lists(*on_device, taps, capacity)
            assert pairs.dtype == torch.int32
            assert tap_ptr.dtype == torch.int64
            assert tap_ptr.shape == (taps + 1,)
            assert pair_triples(*pairs, tap_ptr) == expected
        pairs, tap_ptr = eager.pair_lists(rows, None, order, taps, 0)
        assert pair_triples(*pairs, tap_ptr) == expected


@pytest.mark.usefixtures("_places")
@pytest.mark.parametrize("ordered", [False, True], ids=["plain", "ordered"])
@pytest.mark.parametrize(
    ("n_in", "share"), [(0, 0.0), (1, 1.0), (63, 0.5), (1030, 1.0), (3000, 0.6)]
)
@pytest.mark.parametrize(
    ("volume", "n"), [(1, 0), (8, 0), (1, 3000), (8, 500), (32, 200), (70, 90)]
)
def test_list_inputs(triton_device, volume, n, n_in, share, ordered):
    """Pairs that are listed without the table equal the table of the inputs by brute force."""
    named = torch.randperm(n_in)[: min(round(share * n_in), volume * n)].int()
    rows = torch.full((volume, n), -1, dtype=torch.int32)
    rows.view(-1)[torch.randperm(volume * n)[: len(named)]] = named
    order = torch.randperm(n).int() if ordered else None
    table = rows, mask_words(rows), order
    on_device = [None if part is None else part.to(triton_device) for part in table]
    pairs, tap_ptr, of_inputs = kernels.list_inputs(*on_device, n_in)
    expected, _ = eager.pair_lists(rows, None, order, volume, 0)
    assert torch.equal(pairs[:, : len(named)].cpu(), expected)
    assert pair_triples(*pairs, tap_ptr) == sorted(
        table_triples(NeighborTable(*table)), key=lambda triple: triple[2]
    )
    own = NeighborTable(*of_inputs)
    assert own.rows.shape == (1, n_in)
    assert torch.equal(own.rows[0, : len(named)].cpu(), expected[1])
    assert own.rows[0, len(named) :].tolist() == [-1] * (n_in - len(named))
    assert sorted(swapped(table_triples(own, volume))) == sorted(pair_triples(*pairs, tap_ptr))


def test_decoding_agrees_with_the_table():
    rows = torch.tensor([[2, -1], [-1, 0]], dtype=torch.int32)
    mask = torch.tensor([[1, 2]], dtype=torch.int32)
    order = torch.tensor([1, 0], dtype=torch.int32)
    pairs, tap_ptr = eager.pair_lists(rows, mask, order, 2, 4)
    assert pair_triples(*pairs, tap_ptr) == [(2, 1, 0), (0, 0, 1)]
    assert table_triples(NeighborTable(rows, mask, order)) == [(2, 1, 0), (0, 0, 1)]
