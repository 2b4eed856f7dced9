"""Convolutions by numba, forward and both gradients, against the reference and torch."""

import pytest
import torch

from tests._oracle import table_triples
from tests._process import run
from tests.kernels.test_pair_panels import random_rows
from tritonspconv import reference
from tritonspconv.kernel_map import NeighborTable
from tritonspconv.kernels.channel_norm import ChannelNorm
from tritonspconv.kernels.eager import conv_grads as eager_grads
from tritonspconv.kernels.eager import gather_gemm as eager
from tritonspconv.testing import assert_close

pytest.importorskip("numba", reason="numba is not installed")

from tritonspconv.kernels.numba import _panels, _products
from tritonspconv.kernels.numba._panels import TapPanels
from tritonspconv.kernels.numba.gather_gemm import gather_gemm
from tritonspconv.kernels.numba.weight_grad import sum_outer_products

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# Channels: one vector or less, more than one, two tiles, blocks of two and of three vectors.
CHANNELS = [(1, 1), (3, 5), (16, 16), (17, 33), (33, 4), (8, 64), (5, 130)]


@pytest.fixture(params=[512, 8], ids=["wide-panels", "narrow-panels"])
def _panel_size(request, monkeypatch):
    monkeypatch.setattr(_panels, "WIDTH", request.param)


class Problem:
    """A random table, which belongs to no geometry, and the operands of a convolution."""

    def __init__(self, volume, n_out, n_in, c_in, c_out, dtype=torch.float32, share=0.4):
        self.rows = random_rows(volume, n_out, n_in, share)
        self.feats = torch.randn(n_in, c_in).to(dtype)
        self.grad = torch.randn(n_out, c_out).to(dtype)
        # Return spconv's layout of the weight, viewed as matrices.
        self.weight = torch.randn(c_out, volume, c_in).to(dtype).permute(1, 2, 0)
        self.dtype = dtype

    def forward(self, launcher=gather_gemm, *, bias=None, order=None, mirrored=False, **how):
        return launcher(
            self.feats, self.weight, bias, self.rows, None, order, mirrored=mirrored, **how
        )

    def weight_grad(self, mirrored=False, dtype=None):
        out = torch.full_like(self.weight, torch.nan, dtype=dtype)
        pairs = TapPanels(self.rows).listed()
        sum_outer_products(self.feats, self.grad, pairs, out, reverse=mirrored)
        return out

    def expected(self, dtype, mirrored=False):
        """Return output and gradient of the weight, computed in ``dtype``."""
        triples = table_triples(NeighborTable(self.rows, None, None, mirrored=mirrored))
        weight = self.weight.to(dtype).requires_grad_()
        out = reference.conv(self.feats.to(dtype), weight, triples, self.rows.shape[1])
        (grad,) = torch.autograd.grad(
            out, [weight], self.grad.to(dtype), materialize_grads=True, allow_unused=True
        )
        return out.detach(), grad


def check(problem, mirrored=False):
    truth, plain = (problem.expected(d, mirrored) for d in (torch.float64, problem.dtype))
    made = problem.forward(mirrored=mirrored), problem.weight_grad(mirrored)
    for result, true, rounded in zip(made, truth, plain, strict=True):
        assert result.dtype == problem.dtype
        assert_close(result, true, problem.dtype, eager=rounded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("c_in", "c_out"), CHANNELS)
@pytest.mark.usefixtures("_panel_size")
def test_channels(c_in, c_out, dtype):
    check(Problem(8, 50, 60, c_in, c_out, dtype))


def test_bfloat16_of_any_layout():
    """Two bfloat16 are read as one word; they may lie apart, or begin in the middle of a word."""
    problem = Problem(8, 50, 60, 6, 5, torch.bfloat16)
    expected, plain = problem.expected(torch.float64)[0], problem.expected(torch.bfloat16)[0]
    feats, weight = problem.feats, problem.weight
    for problem.feats in (feats, _moved(feats)):
        for problem.weight in (weight, weight.contiguous(), _moved(weight)):
            assert_close(problem.forward(), expected, torch.bfloat16, eager=plain)


def _moved(x):
    """Return ``x`` in a storage that has one element before it."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("mirrored", [False, True], ids=["plain", "mirrored"])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(
    ("volume", "n"), [(27, 0), (27, 1), (1, 63), (27, 200), (125, 30), (2, 700)]
)
@pytest.mark.usefixtures("_panel_size")
def test_pairs(volume, n, share, mirrored):
    check(Problem(volume, n, 40, 5, 7, share=share), mirrored)


def test_no_input_rows():
    check(Problem(8, 30, 0, 3, 4, share=0.0))


def test_what_follows_the_sum():
    """Bias, norm, residual and ReLU follow in torch's order, with and without NaN."""
    problem = Problem(27, 70, 60, 9, 21)
    bias, residual, mean, scale, shift = (torch.randn(n) for n in (21, 70 * 21, 21, 21, 21))
    norm = ChannelNorm(mean, torch.rand(21), scale, shift)
    residual = residual.reshape(70, 21)
    for order in (None, torch.randperm(70).int()):
        for how in (
            {"bias": bias},
            {"norm": norm},
            {"residual": residual},
            {"relu": True},
            {"bias": bias, "norm": norm._replace(weight=None, bias=None)},
            {"bias": bias, "norm": norm, "residual": residual, "relu": True},
        ):
            made, expected = (problem.forward(f, order=order, **how) for f in (gather_gemm, _torch))
            torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    problem.feats[3] = torch.nan
    made, expected = (problem.forward(f, relu=True) for f in (gather_gemm, _torch))
    assert torch.equal(made.isnan(), expected.isnan())
    assert made.isnan().any()


def _torch(*args, **kwargs):
    return eager.gather_gemm(*args, **kwargs)


@pytest.mark.parametrize("count", [0, 1, 37, 60])
@pytest.mark.usefixtures("_panel_size")
def test_padding_is_not_read_and_its_rows_are_zero(count):
    problem = Problem(8, 60, 60, 6, 5)
    real = torch.arange(60) < count
    rows = torch.where(real & (problem.rows < count), problem.rows, -1)
    problem.rows = rows
    expected, expected_grad = problem.expected(torch.float32)
    problem.feats[count:] = problem.grad[count:] = torch.nan
    # The kernels do not read padding columns either.
    problem.rows = torch.where(real, rows, 59)
    bounded = TapPanels(problem.rows, torch.tensor(count))
    out = problem.forward(count=torch.tensor(count), panels=bounded, bias=torch.ones(5))
    torch.testing.assert_close(out[:count], expected[:count] + 1)
    assert not out[count:].any()
    grad = torch.empty_like(problem.weight)
    sum_outer_products(problem.feats, problem.grad, bounded.listed(), grad)
    torch.testing.assert_close(grad, expected_grad)


def test_equal_bits_for_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(_products, "LEAST_WORK", 1)
    problem = Problem(27, 3_000, 2_500, 24, 20)
    found = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append((problem.forward(), problem.weight_grad()))
    for out, grad in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(grad, found[0][1])


def test_half_operands_fill_a_gradient_of_another_dtype():
    """The gradient is never rounded to half precision."""
    problem = Problem(8, 50, 60, 3, 5, torch.float16)
    made = problem.weight_grad(dtype=torch.float32)
    truth = problem.expected(torch.float64)[1]
    torch.testing.assert_close(made.double(), truth, rtol=1e-5, atol=1e-5)


def test_both_gradients_are_those_of_torch():
    problem = Problem(27, 90, 80, 12, 10)
    inverse = torch.full((27, 80), -1, dtype=torch.int32)
    for tap, row in enumerate(problem.rows):
        # A tap pairs an input with one output at most.
        columns = {int(i): c for c, i in enumerate(row.tolist()) if i >= 0}
        problem.rows[tap] = -1
        for i, column in columns.items():
            problem.rows[tap, column], inverse[tap, i] = i, column
    expected_weight = torch.empty_like(problem.weight)
    expected = eager_grads.both_grads(
        problem.feats, problem.grad, problem.weight, expected_weight, inverse, mirrored=False
    )
    made = gather_gemm(
        problem.grad, problem.weight.transpose(1, 2), None, inverse, None, None, mirrored=False
    )
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(problem.weight_grad(), expected_weight, rtol=1e-5, atol=1e-4)


def test_lists_have_every_pair_once_and_are_whole():
    rows = random_rows(27, 130, 90, 0.3)
    starts, counts, columns, entries, volume, width = TapPanels(rows).listed()
    group = _products.tile_rows()
    assert _panels.GROUP % group == 0
    assert not (starts % _panels.GROUP).any()
    found = set()
    for number, count in enumerate(counts):
        panel, tap = divmod(number, volume)
        start, end = starts[number], starts[number + 1]
        assert end - start == -(-count // _panels.GROUP) * _panels.GROUP
        assert (columns[start + count : end] == width).all()
        assert ((entries[start:end] >= 0) & (entries[start:end] < 90)).all()
        places = range(start, start + count)
        found |= {(tap, panel * width + columns[p], int(entries[p])) for p in places}
    tap, column = torch.nonzero(rows >= 0, as_tuple=True)
    listed = zip(tap.tolist(), column.tolist(), rows[tap, column].tolist(), strict=True)
    assert found == set(listed)
    assert counts.sum() == len(found)


@pytest.mark.parametrize(
    ("cpu", "features", "size"),
    [("haswell", "+avx2,+fma", "32"), ("nehalem", "+sse4.2", "16")],
    ids=["avx2", "sse"],
)
def test_smaller_vectors(cpu, features, size, tmp_path):
    """A CPU without AVX-512 multiplies in smaller tiles."""
    code = (
        "import torch; from tests.kernels.test_numba_products import Problem, check, _products\n"
        "print(_products.vector_bytes())\n"
        "torch.manual_seed(0)\n"
        "for c in ((5, 7), (16, 16), (17, 50)): check(Problem(8, 50, 60, *c))\n"
        "check(Problem(8, 50, 60, 9, 21, torch.float64))\n"
        "check(Problem(8, 50, 60, 9, 21, torch.bfloat16))\n"
    )
    done = run(
        "-c", code, cwd=tmp_path, NUMBA_CACHE_DIR=str(tmp_path),
        NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features,
    )  # fmt: skip
    assert done.stdout.split() == [size]
