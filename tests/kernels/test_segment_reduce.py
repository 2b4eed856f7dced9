"""Segment reduction, in torch and in Triton, against a loop."""

import importlib

import pytest
import torch
from torch import Tensor

from tritonspconv.testing import assert_close

DTYPES = [torch.float64, torch.float16, torch.bfloat16]
# (P, S, C)
SIZES = [(50, 7, 3), (63, 40, 17), (1, 1, 1), (20, 3, 70), (0, 3, 2), (5, 0, 2), (10, 4, 0)]
CASES = [(size, torch.float32) for size in SIZES] + [(SIZES[0], dtype) for dtype in DTYPES]
# Segments are so long that lanes share one, with one further step and with two.
LONG = [(1300, 3, 2), (70_000, 1, 1)]


@pytest.fixture(params=["eager", "triton"])
def segment_reduce(request: pytest.FixtureRequest):
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    module = importlib.import_module(f"tritonspconv.kernels.{request.param}.segment_reduce")
    return module.segment_reduce


def draw_segments(n: int, segments: int) -> tuple[Tensor, Tensor]:
    """Start and end of segments in random order: some empty, some cut short."""
    cuts = torch.randint(0, n + 1, (max(segments - 1, 0),)).sort().values
    cuts = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([n])])
    start, end = cuts[:-1][:segments].clone(), cuts[1:][:segments].clone()
    if segments > 2:
        end[1] = start[1]
        end[0] = torch.maximum(start[0], end[0] - 1)
    shuffle = torch.randperm(segments)
    return start[shuffle], end[shuffle]


def expect(values: Tensor, perm: Tensor, start: Tensor, end: Tensor, mode: str):
    """Return the result of a loop over the segments, and the lowest row of each maximum."""
    out = values.new_zeros(start.shape[0], values.shape[1])
    argmax = torch.full(out.shape, -1, dtype=torch.int32)
    for s, (low, high) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        rows = perm[low:high].sort().values
        if not rows.numel() or not values.shape[1]:
            continue
        taken = values[rows]
        if mode == "max":
            out[s] = taken.max(0).values
            argmax[s] = rows[(taken == out[s]).int().argmax(0)].int()
        else:
            out[s] = taken.sum(0) if mode == "sum" else taken.mean(0)
    return out, argmax


@pytest.mark.parametrize("shuffle", [False, True], ids=["plain", "perm"])
@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_segment_reduce(segment_reduce, triton_device, mode, size, dtype, shuffle):
    check(segment_reduce, triton_device, mode, size, dtype, shuffle)


@pytest.mark.parametrize("size", LONG, ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_long_segments(segment_reduce, triton_device, mode, size):
    check(segment_reduce, triton_device, mode, size, torch.float32, True)


def check(segment_reduce, device, mode, size, dtype, shuffle):
    n, segments, c = size
    values = torch.randint(-3, 4, (n, c)).double()
    perm = torch.randperm(n) if shuffle else torch.arange(n)
    start, end = draw_segments(n, segments)
    out, argmax = expect(values, perm, start, end, mode)
    ours, our_argmax = segment_reduce(
        values.to(device, dtype),
        perm.to(device) if shuffle else None,
        start.to(device),
        end.to(device),
        mode,
        want_argmax=mode == "max",
    )
    assert ours.dtype == dtype
    assert_close(ours, out)
    if mode == "max":
        assert our_argmax.dtype == torch.int32
        assert torch.equal(our_argmax.cpu(), argmax)
    else:
        assert our_argmax is None


@pytest.mark.parametrize("n", [6, 1000])
def test_nan_wins_a_maximum_and_the_lowest_number_counts(segment_reduce, triton_device, n):
    values = torch.full((n, 2), float("-inf"))
    values[n // 2, 1] = values[n - 2, 1] = float("nan")
    bounds = torch.tensor([0, n], device=triton_device)
    out, argmax = segment_reduce(
        values.to(triton_device), None, bounds[:1], bounds[1:], "max", want_argmax=True
    )
    torch.testing.assert_close(
        out.cpu(), torch.tensor([[float("-inf"), float("nan")]]), equal_nan=True
    )
    assert argmax.tolist() == [[0, n // 2]]


def test_columns_of_a_wider_tensor(segment_reduce, triton_device):
    values = torch.randn(10, 6).to(triton_device)
    start, end = torch.tensor([[0], [10]], device=triton_device)
    for view in (values[:, 2:4], values[:, ::2]):
        out, _ = segment_reduce(view, None, start, end, "sum")
        torch.testing.assert_close(out[0], view.sum(0))
