"""Gather-GEMM: Triton against the reference and against the torch launcher."""

import inspect

import pytest
import torch
from torch import Tensor

from tests._oracle import table_triples
from tritonspconv import reference
from tritonspconv.kernel_map import NeighborTable
from tritonspconv.kernels.channel_norm import ChannelNorm
from tritonspconv.kernels.eager import gather_gemm as eager
from tritonspconv.kernels.eager.invert_table import mask_words
from tritonspconv.testing import assert_close

pytest.importorskip("triton", reason="Triton is not installed")

from tritonspconv.kernels.triton import gather_gemm as kernels
from tritonspconv.kernels.triton.configs import GemmConfig

FIXED = GemmConfig(block_m=32, block_n=16, block_k=16, num_warps=2, num_stages=2)
BIND = kernels._bind


def random_table(volume: int, n_out: int, n_in: int, device, *, share=0.4, ordered=False):
    """Return a random table, which belongs to no geometry; some columns and some taps are empty."""
    rows = torch.randint(max(n_in, 1), (volume, n_out), dtype=torch.int32)
    rows[torch.rand(volume, n_out) >= share] = -1
    if n_in == 0:
        rows.fill_(-1)
    rows[:, n_out // 3 : n_out // 3 + 2] = -1
    if volume > 2:
        rows[volume // 3] = -1
    words = torch.zeros(-(-volume // 32), n_out, dtype=torch.int64)
    for v in range(volume):
        words[v // 32] |= (rows[v] >= 0).long() << (v % 32)
    mask = torch.where(words >= 2**31, words - 2**32, words).int()
    order = torch.randperm(n_out).int().to(device) if ordered else None
    return NeighborTable(rows.to(device), mask.to(device), order)


def launch(module, feats, weight, bias, table, mirrored=False, **how) -> Tensor:
    return module.gather_gemm(
        feats, weight, bias, table.rows, table.mask, table.order, mirrored=mirrored, **how
    )


def check(feats, weight, bias, table, mirrored=False, norm=None, **how) -> None:
    out = launch(kernels, feats, weight, bias, table, mirrored, norm=norm, **how)
    n_out = table.rows.shape[1]
    triples = table_triples(table._replace(mirrored=mirrored))

    def oracle(dtype):
        low = [x if x is None else x.detach().cpu().to(dtype) for x in (feats, weight, bias)]
        out = reference.conv(low[0], low[1], triples, n_out, low[2])
        if norm is None:
            return out
        return reference.channel_norm(out, *norm.each(lambda x: x.cpu().to(dtype)))

    truth, plain = oracle(torch.float64), oracle(feats.dtype)
    assert out.dtype == feats.dtype
    assert_close(out, truth, eager=plain, name="triton")
    assert_close(
        launch(eager, feats, weight, bias, table, mirrored, norm=norm),
        truth,
        eager=plain,
        name="torch",
    )


def operands(volume, n_in, c_in, c_out, dtype, device):
    shapes = [(n_in, c_in), (volume, c_in, c_out), (c_out,)]
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


DTYPES = [torch.float32, torch.float16, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
@pytest.mark.parametrize(
    ("c_in", "c_out"), [(1, 1), (3, 5), (16, 16), (17, 33), (33, 17), (40, 3), (5, 70)]
)
def test_channels(triton_device, c_in, c_out, dtype):
    table = random_table(8, 70, 50, triton_device)
    check(*operands(8, 50, c_in, c_out, dtype, triton_device), table)


@pytest.mark.gpu
@pytest.mark.parametrize(("c_in", "c_out"), [(16, 16), (17, 33), (64, 64), (128, 256), (260, 96)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_channels_with_the_chosen_tiles(triton_device, c_in, c_out, dtype):
    table = random_table(27, 3000, 2000, triton_device)
    check(*operands(27, 2000, c_in, c_out, dtype, triton_device), table)


@pytest.mark.parametrize("n_out", [0, 1, 31, 32, 63, 65])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_rows(triton_device, n_out, bias):
    table = random_table(9, n_out, 20, triton_device)
    feats, weight, offset = operands(9, 20, 5, 7, torch.float32, triton_device)
    check(feats, weight, offset if bias else None, table, config=FIXED)


def test_no_input_rows(triton_device):
    table = random_table(9, 20, 0, triton_device)
    check(*operands(9, 0, 5, 7, torch.float32, triton_device), table, config=FIXED)


@pytest.mark.parametrize(("c_in", "c_out"), [(0, 4), (4, 0)])
def test_no_channels(triton_device, c_in, c_out):
    table = random_table(9, 20, 10, triton_device)
    check(*operands(9, 10, c_in, c_out, torch.float32, triton_device), table)


@every_dtype
@pytest.mark.parametrize("mirrored", [False, True], ids=["forwards", "mirrored"])
@pytest.mark.parametrize("ordered", [False, True], ids=["plain", "ordered"])
@pytest.mark.parametrize("volume", [1, 2, 8, 32, 64])
@pytest.mark.parametrize("n_out", [0, 1, 70])
def test_entries_in_one_row(triton_device, volume, n_out, ordered, mirrored, dtype):
    """Each column has one entry at most, and its mask gives the tap."""
    rows, tap = torch.randint(-1, 20, (n_out,)).int(), torch.randint(volume, (n_out,))
    full = torch.where(torch.arange(volume)[:, None] == tap, rows, -1)
    order = torch.randperm(n_out).int().to(triton_device) if ordered else None
    table = NeighborTable(full.to(triton_device), mask_words(full).to(triton_device), order)
    of_one_row = table._replace(kept_rows=rows[None].to(triton_device))
    feats, weight, bias = operands(volume, 20, 10, 9, dtype, triton_device)
    check(feats, weight, bias, table, mirrored, config=FIXED)
    expected = launch(kernels, feats, weight, bias, table, mirrored, config=FIXED)
    out = launch(kernels, feats, weight, bias, of_one_row, mirrored, config=FIXED)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("mirrored", [False, True], ids=["forwards", "mirrored"])
@pytest.mark.parametrize("ordered", [False, True], ids=["plain", "ordered"])
@pytest.mark.parametrize("volume", [1, 2, 27, 31, 32, 33, 64, 125])
def test_taps(triton_device, volume, ordered, mirrored):
    """Volumes cover one word of mask bits and several, full words, and the sign bit."""
    table = random_table(volume, 30, 20, triton_device, share=0.3, ordered=ordered)
    check(*operands(volume, 20, 10, 9, torch.float32, triton_device), table, mirrored, config=FIXED)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_pairs_and_all_pairs(triton_device, share):
    table = random_table(27, 40, 30, triton_device, share=share)
    check(*operands(27, 30, 20, 9, torch.float32, triton_device), table, config=FIXED)


@every_dtype
def test_weight_of_any_strides(triton_device, dtype):
    table = random_table(9, 40, 30, triton_device)
    feats, weight, bias = operands(9, 30, 20, 9, dtype, triton_device)
    stored_out_first = weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    transposed = weight.transpose(1, 2).contiguous().transpose(1, 2)
    gaps = weight.new_full((18, 40, 18), float("nan"))[::2, ::2, ::2].copy_(weight)
    expected = launch(kernels, feats, weight, bias, table, config=FIXED)
    for view in (stored_out_first, transposed, gaps):
        assert not view.is_contiguous()
        out = launch(kernels, feats, view, bias, table, config=FIXED)
        assert torch.equal(out, expected)


def with_gaps(vector: Tensor) -> Tensor:
    return vector.new_full((2 * len(vector),), float("nan"))[1::2].copy_(vector)


@pytest.mark.parametrize("module", [kernels, eager], ids=["triton", "torch"])
def test_vectors_of_any_stride(triton_device, module):
    table = random_table(9, 40, 30, triton_device)
    feats, weight, bias = operands(9, 30, 5, 9, torch.float32, triton_device)
    norm = random_norm(9, torch.float32, triton_device)
    expected = launch(module, feats, weight, bias, table, norm=norm)
    out = launch(module, feats, weight, with_gaps(bias), table, norm=norm.each(with_gaps))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("ordered", [False, True], ids=["plain", "ordered"])
def test_residual_and_relu_come_before_rounding(triton_device, ordered, relu):
    table = random_table(9, 70, 60, triton_device, ordered=ordered)
    feats, weight, bias = operands(9, 60, 10, 17, torch.float16, triton_device)
    residual = torch.randn(70, 17).to(triton_device, torch.float16)
    exact = launch(eager, feats.double(), weight.double(), bias.double(), table) + residual
    exact = exact.relu() if relu else exact
    for module, how in ((kernels, {"config": FIXED}), (eager, {})):
        out = launch(module, feats, weight, bias, table, residual=residual, relu=relu, **how)
        torch.testing.assert_close(out.double(), exact, rtol=2**-11 + 1e-5, atol=1e-5)


def random_norm(channels: int, dtype, device, *, weight=True, bias=True) -> ChannelNorm:
    mean, shift = torch.randn(2, channels).to(device, dtype)
    variance, scale = torch.rand(2, channels).add(0.5).to(device, dtype)
    return ChannelNorm(mean, variance, scale if weight else None, shift if bias else None, 1e-3)


@pytest.mark.parametrize("weight", [True, False], ids=["weight", "no-weight"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@every_dtype
def test_norm(triton_device, dtype, bias, weight):
    table = random_table(9, 70, 60, triton_device, ordered=True)
    norm = random_norm(17, dtype, triton_device, weight=weight, bias=bias)
    feats, matrices, offset = operands(9, 60, 10, 17, dtype, triton_device)
    check(feats, matrices, offset if weight else None, table, norm=norm, config=FIXED)


@pytest.mark.gpu
@pytest.mark.parametrize(("c_in", "c_out"), [(16, 16), (17, 33), (64, 64), (128, 256)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_norm_with_the_chosen_tiles(triton_device, c_in, c_out, dtype):
    table = random_table(27, 3000, 2000, triton_device)
    norm = random_norm(c_out, dtype, triton_device)
    check(*operands(27, 2000, c_in, c_out, dtype, triton_device), table, norm=norm)


@pytest.mark.parametrize("vectors", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_norm_of_any_dtype_comes_before_residual_and_relu_and_rounding(
    triton_device, dtype, vectors
):
    table = random_table(9, 70, 60, triton_device)
    feats, weight, bias = operands(9, 60, 10, 17, dtype, triton_device)
    norm = random_norm(17, vectors, triton_device)
    residual = torch.randn(70, 17).to(triton_device, dtype)
    exact = launch(eager, feats.double(), weight.double(), bias.double(), table)
    exact = reference.channel_norm(exact, *norm.each(Tensor.double)) + residual
    error = {torch.float16: 2**-11 + 1e-5, torch.float64: 1e-13}[dtype]
    for module, how in ((kernels, {"config": FIXED}), (eager, {})):
        out = launch(
            module, feats, weight, bias, table, norm=norm, residual=residual, relu=True, **how
        )
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact.relu(), rtol=error, atol=error)


@pytest.mark.parametrize(
    "config",
    [
        GemmConfig(16, 16, 16, 1, 1),
        GemmConfig(64, 32, 16, 4, 3),
        GemmConfig(32, 64, 64, 4, 2),
    ],
    ids=str,
)
def test_tiles_change_nothing_but_rounding(triton_device, config):
    table = random_table(9, 70, 60, triton_device, ordered=True)
    check(*operands(9, 60, 40, 50, torch.float32, triton_device), table, config=config)


def test_absent_rows_are_not_read(triton_device):
    """Rows of features that the table does not use may hold anything."""
    table = random_table(9, 40, 30, triton_device)
    feats, weight, bias = operands(9, 30, 20, 9, torch.float32, triton_device)
    named = table.rows[table.rows >= 0].unique().long()
    feats = torch.cat([feats, feats.new_full((1, 20), float("nan"))])
    feats[~torch.isin(torch.arange(31, device=feats.device), named)] = float("nan")
    out = launch(kernels, feats, weight, bias, table, config=FIXED)
    assert out.isfinite().all()


@pytest.mark.gpu
def test_tf32_is_coarser_and_must_be_asked_for(triton_device):
    table = random_table(27, 2000, 2000, triton_device)
    feats, weight, _ = operands(27, 2000, 64, 64, torch.float32, triton_device)
    exact = launch(eager, feats.double(), weight.double(), None, table)
    ieee = (launch(kernels, feats, weight, None, table) - exact).abs().max()
    tf32 = (launch(kernels, feats, weight, None, table, precision="tf32") - exact).abs().max()
    assert tf32 > 10 * ieee


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_beyond_int32(triton_device):
    """Features and outputs have more than 2**31 elements."""
    n, channels = 2**24 + 3, 128
    rows = torch.arange(n, dtype=torch.int32, device=triton_device).flip(0).repeat(2, 1)
    rows[0, ::2] = -1
    mask = torch.where(rows[0] >= 0, 3, 2).int()[None]
    feats = torch.ones(n, channels, dtype=torch.float16, device=triton_device)
    feats *= (torch.arange(n, device=triton_device) % 100)[:, None]
    weight = torch.eye(channels, dtype=torch.float16, device=triton_device).repeat(2, 1, 1)
    out = launch(kernels, feats, weight, None, NeighborTable(rows, mask, None))
    twice = torch.arange(n, device=triton_device) % 2 + 1
    expected = feats[:, 0].flip(0) * twice
    assert torch.equal(out[:, 0], expected)
    assert torch.equal(out[:, -1], expected)


@pytest.mark.parametrize("large", ["feats", "weight", "rows", None])
def test_addresses_have_64_bits_where_any_operand_is_that_large(large, monkeypatch):
    """Only the sizes of the operands choose the kernel; expanded tensors need no memory."""
    chosen = []

    def choose(*problem):
        chosen.append(problem)
        raise InterruptedError

    monkeypatch.setattr(kernels, "_bind", choose)
    sizes = {"feats": (2, 16), "weight": (3, 16, 8), "rows": (3, 1)}
    if large:
        sizes |= {
            "feats": {"feats": (2**27, 16)}, "weight": {"weight": (2**24, 16, 8)},
            "rows": {"rows": (2**30 + 1, 2)},
        }[large]  # fmt: skip
    feats, weight, rows = (
        torch.zeros((), dtype=torch.int32 if name == "rows" else torch.float16).expand(size)
        for name, size in sizes.items()
    )
    with pytest.raises(InterruptedError):
        kernels.gather_gemm(feats, weight, None, rows, None, None, mirrored=False)
    wide = chosen[0][list(inspect.signature(BIND).parameters).index("wide")]
    assert wide == (large is not None)
