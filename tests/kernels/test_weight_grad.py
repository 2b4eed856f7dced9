"""Weight gradient: Triton against the reference and against the torch launcher."""

import mmap

import pytest
import torch
from torch import Tensor

from tests._oracle import pair_triples
from tritonspconv import reference
from tritonspconv.kernels.eager import weight_grad as eager
from tritonspconv.testing import assert_close

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl

from tritonspconv.kernels.triton import weight_grad as kernels
from tritonspconv.kernels.triton.configs import GemmConfig

# Flags of private memory without a file, and Linux's MAP_NORESERVE, which Python 3.11 lacks.
LAZY_MEMORY = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
FIXED = GemmConfig(block_m=16, block_n=16, block_k=32, num_warps=2, num_stages=2)
DTYPES = [torch.float32, torch.float16, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random_pairs(counts: list[int], n_in: int, n_out: int, device, spare: int = 0):
    """Return pairs of every tap, and spare places at the end that hold no rows."""
    total = sum(counts)
    pairs = torch.stack([torch.randint(max(n, 1), (total,)) for n in (n_in, n_out)]).int()
    pairs = torch.nn.functional.pad(pairs, (0, spare), value=2**30)
    tap_ptr = torch.tensor([0, *counts]).cumsum(0)
    return pairs.to(device), tap_ptr.to(device)


def launch(module, feats, grad, listed, volume, dtype, mirrored=False, **how) -> Tensor:
    shape = (volume, feats.shape[1], grad.shape[1])
    out = torch.full(shape, float("nan"), dtype=dtype, device=feats.device)
    result = module.weight_grad(feats, grad, *listed, out, mirrored=mirrored, **how)
    assert result is out
    return out


def oracle(feats, grad, listed, volume, mirrored, dtype) -> Tensor:
    """Return the reference's gradient."""
    triples = pair_triples(*listed[0], listed[1])
    if mirrored:
        last = volume - 1
        triples += [(o, i, last - v) for i, o, v in triples if v != last - v]
    feats, grad = feats.cpu().to(dtype), grad.cpu().to(dtype)
    weight = torch.zeros(volume, feats.shape[1], grad.shape[1], dtype=dtype, requires_grad=True)
    out = reference.conv(feats, weight, triples, len(grad))
    return torch.autograd.grad(out, weight, grad)[0]


def check(feats, grad, listed, volume, mirrored=False, **how) -> Tensor:
    truth, plain = (
        oracle(feats, grad, listed, volume, mirrored, dtype)
        for dtype in (torch.float64, feats.dtype)
    )
    ours = launch(kernels, feats, grad, listed, volume, feats.dtype, mirrored, **how)
    also = launch(eager, feats, grad, listed, volume, feats.dtype, mirrored)
    assert_close(ours, truth, eager=plain, name="triton")
    assert_close(also, truth, eager=plain, name="torch")
    return ours


def operands(n_in, n_out, c_in, c_out, dtype, device):
    return [torch.randn(s).to(device, dtype) for s in ((n_in, c_in), (n_out, c_out))]


@every_dtype
@pytest.mark.parametrize(("c_in", "c_out"), [(1, 1), (3, 5), (16, 16), (17, 33), (40, 3)])
def test_channels(triton_device, c_in, c_out, dtype):
    listed = random_pairs([30, 0, 90, 1], 50, 40, triton_device, spare=7)
    check(*operands(50, 40, c_in, c_out, dtype, triton_device), listed, 4, config=FIXED)


@pytest.mark.gpu
@pytest.mark.parametrize(("c_in", "c_out"), [(16, 16), (17, 33), (64, 64), (128, 256), (260, 96)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_channels_with_the_chosen_tiles(triton_device, c_in, c_out, dtype):
    counts = torch.randint(4000, (27,)).tolist()
    listed = random_pairs(counts, 3000, 2000, triton_device, spare=999)
    check(*operands(3000, 2000, c_in, c_out, dtype, triton_device), listed, 27)


def test_the_chosen_tiles(triton_device):
    listed = random_pairs([30, 0, 90, 1], 50, 40, triton_device, spare=7)
    check(*operands(50, 40, 20, 12, torch.float32, triton_device), listed, 4)


@pytest.mark.parametrize(
    "counts",
    [[0], [1], [0, 0, 5], [5, 0, 0], [64, 64], [63, 65, 1], [700, 3], [1] * 125],
    ids=lambda counts: f"{len(counts)}-taps-{sum(counts)}-pairs",
)
def test_counts(triton_device, counts):
    """Taps are empty, have one pair, or have steps that divide evenly or unevenly into shares."""
    listed = random_pairs(counts, 50, 40, triton_device, spare=3)
    check(*operands(50, 40, 5, 7, torch.float32, triton_device), listed, len(counts), config=FIXED)


def test_no_pairs_at_all(triton_device):
    listed = random_pairs([0, 0, 0], 5, 4, triton_device)
    out = check(*operands(5, 4, 3, 2, torch.float32, triton_device), listed, 3, config=FIXED)
    assert not out.any()


def slices_of(log2_pairs, channels, dtype=torch.float32, parts=0, precision="ieee"):
    cpu = torch.device("cpu")
    return kernels._bind(
        cpu, kernels.card_of(cpu), dtype, parts, precision, 27, channels, channels,
        (channels**2, channels, 1), True, log2_pairs, 132, 64, None,
    )[4]  # fmt: skip


def test_more_shares_where_pairs_are_many():
    """Few pairs, and sums that need no more shares, take as many shares as fill a GPU."""
    half = torch.float16
    full = 4 * 132 - 27
    assert slices_of(18, 32) == slices_of(24, 32, precision="tf32") == full
    assert slices_of(24, 32, half) == slices_of(24, 32, half, parts=1, precision="tf32") == full
    # Twice the pairs take twice the shares, up to a bound on memory.
    assert slices_of(24, 32) == 2 * slices_of(23, 32) > full
    assert slices_of(24, 128, half, parts=2) > full
    assert slices_of(30, 256) * 256 * 256 * 4 == 2**26


@pytest.mark.parametrize("channels", [16, 64, 128, 256])
def test_shares_are_whole_waves(channels):
    """A tap that ends within a share needs one program more."""
    tiles = 2 if channels == 256 else 1
    assert tiles * (slices_of(24, channels, torch.float16) + 27) % 132 == 0


@every_dtype
def test_a_tile_too_large_for_two_levels(triton_device, dtype):
    listed = random_pairs([30, 0, 90, 1], 50, 40, triton_device, spare=7)
    tile = GemmConfig(block_m=128, block_n=256, block_k=32, num_warps=8, num_stages=2)
    if triton_device.type == "cuda" and dtype != torch.float16:
        pytest.skip("only tiles of half operands are that large")
    check(*operands(50, 40, 20, 130, dtype, triton_device), listed, 4, config=tile)


def test_float32_is_summed_in_two_levels_whatever_the_tile():
    cpu, half, single = torch.device("cpu"), torch.float16, torch.float32
    for dtype, parts, precision, expected in (
        (single, 0, "ieee", True), (half, 2, "ieee", True), (half, 1, "tf32", False),
        (single, 0, "tf32", False), (half, 0, "ieee", False),
    ):  # fmt: skip
        multiply, *_ = kernels._bind(
            cpu, kernels.card_of(cpu), dtype, parts, precision, 27, 256, 256,
            (256**2, 256, 1), True, 20, 132, 64, GemmConfig(128, 256, 32, 8, 2),
        )  # fmt: skip
        assert multiply.meta["IN_TWO_LEVELS"] == expected


@pytest.mark.parametrize("count", [1, 8, 9, 300])
def test_many_shares_of_one_tap(triton_device, monkeypatch, count):
    """Shares are added eight at a time."""
    monkeypatch.setattr(kernels, "_WAVE", 20)
    listed = random_pairs([count, 0, 2], 50, 40, triton_device)
    check(*operands(50, 40, 5, 7, torch.float32, triton_device), listed, 3, config=FIXED)


@pytest.mark.parametrize("volume", [1, 3, 9, 27])
def test_mirrored(triton_device, volume):
    """Half of the taps are listed; the other taps have the same pairs with in and out swapped."""
    counts = torch.randint(20, ((volume + 1) // 2,)).tolist()
    listed = random_pairs(counts, 40, 40, triton_device, spare=5)
    operands_ = operands(40, 40, 6, 9, torch.float32, triton_device)
    check(*operands_, listed, volume, mirrored=True, config=FIXED)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16], ids=str)
def test_output_of_another_dtype(triton_device, out_dtype):
    """Half operands fill a float32 gradient, which is never rounded to half precision."""
    listed = random_pairs([30, 40], 50, 40, triton_device)
    feats, grad = operands(50, 40, 5, 7, torch.float16, triton_device)
    out = launch(kernels, feats, grad, listed, 2, out_dtype, config=FIXED)
    truth = oracle(feats, grad, listed, 2, False, torch.float64)
    plain = oracle(feats, grad, listed, 2, False, torch.float32)
    assert_close(out, truth, out_dtype, eager=plain)


def test_output_of_any_strides(triton_device):
    listed = random_pairs([30, 40], 50, 40, triton_device)
    feats, grad = operands(50, 40, 5, 7, torch.float32, triton_device)
    expected = launch(kernels, feats, grad, listed, 2, torch.float32, config=FIXED)
    for axes in ((1, 2, 0), (2, 0, 1), (0, 2, 1)):
        stored = torch.empty([(2, 5, 7)[a] for a in axes], device=triton_device)
        out = stored.permute([axes.index(i) for i in range(3)])
        kernels.weight_grad(feats, grad, *listed, out, mirrored=False, config=FIXED)
        assert torch.equal(out, expected)


@every_dtype
def test_the_same_bits_twice(triton_device, dtype):
    listed = random_pairs([300, 40, 500], 50, 40, triton_device)
    feats, grad = operands(50, 40, 17, 9, dtype, triton_device)
    one, two = (launch(kernels, feats, grad, listed, 3, dtype, config=FIXED) for _ in range(2))
    assert torch.equal(one, two)


def test_shares_lie_beyond_int32(triton_device):
    """The last share of a large matrix begins after 2**31 entries; unused pages take no memory."""
    c_out, shares, step = 2**27, 2**4 + 1, 16
    if triton_device.type == "cuda":
        partial = torch.zeros(shares * c_out, device=triton_device)
    else:
        memory = mmap.mmap(-1, shares * c_out * 4, flags=LAZY_MEMORY)
        partial = torch.frombuffer(memory, dtype=torch.float32)
    one_channel = {
        "C_IN": 1, "C_OUT": c_out, "V": 1, "BLOCK_V": 1, "MIRRORED": False, "ACC_TYPE": tl.float32,
    }  # fmt: skip
    # Each share has one step of pairs. Row r of the features is r // step + 1.
    feats = torch.arange(shares * step, device=triton_device)[:, None] // step + 1.0
    grad = torch.zeros(1, c_out, device=triton_device)
    grad[:, :16] = 1
    pairs = torch.stack([torch.arange(len(feats)), torch.zeros(len(feats))]).int()
    tap_ptr = torch.tensor([0, len(feats)], device=triton_device)
    # One tile of the matrix, for all shares.
    kernels.weight_grad_kernel[(1, shares)](
        feats, None, None, grad, None, None, pairs.to(triton_device), tap_ptr, partial, len(feats),
        shares, **one_channel, PARTS=0, PRECISION="ieee", BLOCK_M=16, BLOCK_N=16, BLOCK_K=step,
        IN_TWO_LEVELS=False,
    )  # fmt: skip
    for share in (0, 7, shares - 1):
        start = share * c_out
        assert partial[start : start + 16].tolist() == [step * (share + 1.0)] * 16
    out = torch.zeros(c_out, device=triton_device)
    kernels.sum_shares_kernel[(1, 1)](
        partial, tap_ptr, out, shares, STRIDE_V=c_out, STRIDE_K=c_out, STRIDE_N=1, **one_channel,
        LANES=32, BLOCK=16,
    )  # fmt: skip
    assert out[:16].tolist() == [step * shares * (shares + 1) / 2] * 16
