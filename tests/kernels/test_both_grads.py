"""Both gradients in one pass on the CPU, against the reference."""

import pytest
import torch

from tests._oracle import table_triples
from tests.kernels.test_pair_panels import random_rows
from tritonspconv import reference
from tritonspconv.kernel_map import NeighborTable
from tritonspconv.kernels.eager import pairs
from tritonspconv.kernels.eager.conv_grads import both_grads
from tritonspconv.kernels.eager.pairs import PairPanels, TapPairs
from tritonspconv.testing import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(params=[False, True], ids=["one-panel", "small-panels"], autouse=True)
def _panel_size(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(pairs, "_pairs_per_tap", lambda channels: 1)


def check(rows, n_out, c_in, c_out, dtype=torch.float32, mirrored=False, panels=None):
    volume, n_in = rows.shape
    feats, grad = (torch.randn(s).to(dtype) for s in ((n_in, c_in), (n_out, c_out)))
    weight = torch.randn(c_out, volume, c_in).to(dtype).permute(1, 2, 0)
    table = NeighborTable(rows, None, None, mirrored=mirrored)
    triples = [(column, row, v) for row, column, v in table_triples(table)]

    def oracle(of_dtype):
        x, w = (t.to(of_dtype).requires_grad_() for t in (feats, weight))
        made = reference.conv(x, w, triples, n_out)
        return torch.autograd.grad(made, (x, w), grad.to(of_dtype), materialize_grads=True)

    out = torch.full_like(weight, torch.nan)
    of_feats = both_grads(feats, grad, weight, out, rows, mirrored=mirrored, panels=panels)
    assert of_feats.dtype == dtype
    results = zip((of_feats, out), oracle(torch.float64), oracle(dtype), strict=True)
    for result, truth, plain in results:
        assert_close(result, truth, dtype, eager=plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("c_in", "c_out"), [(1, 1), (3, 5), (16, 16), (17, 33), (33, 4)])
def test_channels(c_in, c_out, dtype):
    check(random_rows(8, 60, 50, 0.4), 50, c_in, c_out, dtype)


@pytest.mark.parametrize("mirrored", [False, True], ids=["plain", "mirrored"])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("volume", "n"), [(27, 0), (27, 1), (1, 63), (27, 200), (125, 30)])
def test_pairs(volume, n, share, mirrored):
    check(random_rows(volume, n, 40, share), 40, 5, 7, mirrored=mirrored)


def test_no_output_rows():
    check(random_rows(8, 30, 0, 0.0), 0, 3, 4)


def test_a_tap_through_which_all_meet_themselves():
    rows = random_rows(9, 50, 50, 0.4)
    rows[4] = torch.arange(50)
    taps = [
        (torch.nonzero(row >= 0).squeeze(1), row[row >= 0]) if v != 4 else (row[:0], row[:0])
        for v, row in enumerate(rows)
    ]
    check(rows, 50, 6, 9, panels=PairPanels(rows, TapPairs.joined(taps, identity=4)))


@pytest.mark.parametrize(("c_in", "c_out"), [(96, 4), (4, 96)])
def test_one_list_of_panels_serves_both_gradients(c_in, c_out):
    rows = random_rows(8, 60, 50, 0.4)
    panels = PairPanels(rows)
    panels.listed(96)
    listed_bytes = panels.num_bytes
    check(rows, 50, c_in, c_out, panels=panels)
    assert panels.num_bytes == listed_bytes


def test_gradient_of_another_dtype_and_layout():
    """Half operands fill a float32 gradient, which is never rounded to half precision."""
    rows = random_rows(8, 60, 50, 0.4)
    feats, grad = torch.randn(60, 3).half(), torch.randn(50, 5).half()
    weight = torch.randn(8, 3, 5).half()
    expected = torch.empty(8, 3, 5, dtype=torch.float64)
    both_grads(feats.double(), grad.double(), weight.double(), expected, rows, mirrored=False)
    stored = torch.empty(5, 8, 3)
    both_grads(feats, grad, weight, stored.permute(1, 2, 0), rows, mirrored=False)
    torch.testing.assert_close(stored.permute(1, 2, 0).double(), expected, rtol=1e-5, atol=1e-5)
