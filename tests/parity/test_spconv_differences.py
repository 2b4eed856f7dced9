"""Cases in which spconv gives a wrong result without an error, and the adapter a right one.

Each case is a line of the adapter's QUIRKS.md.
"""

import pytest
import torch

from tritonspconv.testing import random_sites

pytest.importorskip("spconv", reason="the original, spconv 2.3.8, is not installed")

import spconv.pytorch as theirs

import compat.spconv.pytorch as ours

pytestmark = [
    pytest.mark.parity,
    # The original may rely on the contents of `torch.empty`.
    pytest.mark.real_empty,
]

LIBRARIES = {"spconv": theirs, "compat.spconv": ours}


def test_nan_in_a_max_pool():
    indices = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 4]], dtype=torch.int32)
    feats = torch.tensor([[1.0], [torch.nan], [torch.nan], [2.0]])
    found = {}
    for name, sp in LIBRARIES.items():
        pool = sp.SparseMaxPool1d(2, algo=sp.ConvAlgo.Native)
        y = pool(sp.SparseConvTensor(feats, indices, [6], 1))
        found[name] = [y.features[y.indices[:, 1] == n].item() for n in range(3)]
    assert found["spconv"] == [1.0, 0.0, 2.0]
    assert [value != value for value in found["compat.spconv"]] == [True, True, False]


def test_indices_that_are_not_contiguous():
    """On a GPU, ``mask.nonzero().int()`` has its columns one after the other in memory."""
    coords = random_sites(60, 3, extent=(9, 8, 7)).coords
    columns = coords.T.contiguous().T
    rows = {}
    for name, sp in LIBRARIES.items():
        layer = sp.SparseConv3d(1, 1, 3, 2, 1, bias=False, algo=sp.ConvAlgo.Native)
        x, y = (
            sp.SparseConvTensor(torch.ones(len(coords), 1), indices, [9, 8, 7], 2)
            for indices in (coords, columns)
        )
        with torch.no_grad():
            rows[name] = [sorted(layer(t).indices.tolist()) for t in (x, y)]
    assert rows["compat.spconv"][0] == rows["compat.spconv"][1] == rows["spconv"][0]
    assert rows["spconv"][1] != rows["spconv"][0]


def test_a_window_larger_than_its_input_by_less_than_a_stride():
    x = torch.ones(1, 1), torch.zeros(1, 2, dtype=torch.int32), [3], 1
    layer = theirs.SparseConv1d(1, 1, 4, stride=3, algo=theirs.ConvAlgo.Native)
    y = layer(theirs.SparseConvTensor(*x))
    assert (y.spatial_shape, y.indices.tolist()) == ([0], [[0, 0]])
    with pytest.raises(IndexError):
        y.dense()
    with pytest.raises(ValueError, match=r"\[3\] into \[0\]"):
        ours.SparseConv1d(1, 1, 4, stride=3)(ours.SparseConvTensor(*x))


@pytest.mark.parametrize("extent", [2**11, 2**20])
def test_submanifold_sums_in_large_grids(extent):
    """There are five rows with two pairs of neighbours; all weights are one."""
    last = extent - 1
    coords = [[0, 1, 2, 3], [0, 1, 2, 4], [3, 5, 6, 7], [3, last, 5, 5], [3, last, 5, 6]]
    found = {}
    for name, sp in LIBRARIES.items():
        layer = sp.SubMConv3d(1, 1, 3, bias=False, algo=sp.ConvAlgo.Native)
        torch.nn.init.ones_(layer.weight)
        x = sp.SparseConvTensor(
            torch.arange(1.0, 6.0)[:, None], torch.tensor(coords).int(), [extent] * 3, 4
        )
        with torch.no_grad():
            found[name] = layer(x).features.flatten().tolist()
    assert found["compat.spconv"] == [3.0, 3.0, 3.0, 9.0, 9.0]
    assert (found["spconv"] == found["compat.spconv"]) == (extent < 2**20)


@pytest.mark.parametrize("distance", [2**9, 2**10])
def test_cells_whose_numbers_agree_in_32_bits(distance):
    """In a grid of 2^11 cells an axis, 2^10 cells along the first axis are 2^32 numbers."""
    indices = torch.tensor([[0, 0, 0, 0], [0, distance, 0, 1]], dtype=torch.int32)
    sums, rows = {}, {}
    for name, sp in LIBRARIES.items():
        x = sp.SparseConvTensor(torch.ones(2, 1), indices, [2**11] * 3, 1)
        options = {"bias": False, "algo": sp.ConvAlgo.Native}
        layer = sp.SubMConv3d(1, 1, 3, **options)
        torch.nn.init.ones_(layer.weight)
        with torch.no_grad():
            sums[name] = layer(x).features.flatten().tolist()
            rows[name] = len(sp.SparseConv3d(1, 1, 3, 1, 1, **options)(x).indices)
    assert (sums["compat.spconv"], rows["compat.spconv"]) == ([1.0, 1.0], 8 + 18)
    is_one_cell = distance == 2**10
    assert sums["spconv"] == ([2.0, 2.0] if is_one_cell else [1.0, 1.0])
    assert rows["spconv"] == (18 if is_one_cell else 26)
