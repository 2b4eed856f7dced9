"""Global pooling and broadcasting by sample."""

import pytest
import torch

from tritonspconv import reference
from tritonspconv.ops.global_pool import global_broadcast, global_pool
from tritonspconv.testing import assert_close

MODES = ["max", "avg", "sum"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Shapes are (N, batch size, C); sample 1 of 4 stays empty.
SIZES = [(60, 4, 5), (3000, 4, 3), (1, 1, 1), (0, 2, 3), (7, 0, 3), (0, 0, 3), (9, 2, 0)]


def draw(n: int, batch_size: int, index_dtype=torch.int32):
    batch = torch.randint(0, max(batch_size, 1), (n,), dtype=index_dtype)
    if batch_size > 2:
        batch[batch == 1] = 3
    return batch


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_matches_reference(mode, size, is_sorted, device):
    n, batch_size, c = size
    batch = draw(n, batch_size)
    batch = batch.sort().values if is_sorted else batch
    feats = torch.randint(-9, 9, (n, c)).double().requires_grad_()
    # Without samples no row takes part.
    known = batch[: n if batch_size else 0].cpu()
    expected = reference.global_pool(feats, known, batch_size, mode).reshape(batch_size, c)
    grad = torch.randn(batch_size, c, dtype=torch.float64)
    (expected_grad,) = torch.autograd.grad(expected + 0 * feats.sum(), feats, grad)
    ours = feats.detach().to(device).requires_grad_()
    out = global_pool(ours, batch.to(device), batch_size, mode, is_sorted=is_sorted)
    (grad_ours,) = torch.autograd.grad(out, ours, grad.to(device))
    assert_close(out, expected, eager=expected * (1 + 1e-15))
    assert_close(grad_ours, expected_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_dtypes(mode, dtype, device):
    feats = torch.randint(-9, 9, (300, 5)).double()
    batch = draw(300, 2, torch.int64)
    out = global_pool(feats.to(device, dtype), batch.to(device), 2, mode)
    assert out.dtype == dtype
    assert_close(out, reference.global_pool(feats, batch, 2, mode))


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_other_samples_take_no_part(mode, device):
    batch = torch.tensor([1, -1, 0, 2, 1], device=device)
    feats = torch.tensor([[1.0], [100.0], [2.0], [100.0], [4.0]], device=device).requires_grad_()
    out = global_pool(feats, batch, 2, mode)
    assert out[:, 0].tolist() == {"max": [2, 4], "avg": [2, 2.5], "sum": [2, 5]}[mode]
    out.sum().backward()
    weights = {"max": [0, 0, 1, 0, 1], "avg": [0.5, 0, 1, 0, 0.5], "sum": [1, 0, 1, 0, 1]}[mode]
    assert feats.grad[:, 0].tolist() == weights


def test_gradient_of_a_maximum_goes_to_the_first(device):
    feats = torch.tensor([[1.0], [3.0], [3.0]], device=device).requires_grad_()
    global_pool(feats, torch.zeros(3, dtype=torch.int32, device=device), 1, "max").sum().backward()
    assert feats.grad[:, 0].tolist() == [0, 1, 0]


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    feats = torch.randperm(40).double().reshape(20, 2).requires_grad_()
    batch = draw(20, 4)
    assert torch.autograd.gradcheck(lambda x: global_pool(x, batch, 4, mode), feats)


def test_broadcast(device):
    values = torch.randn(3, 4, dtype=torch.float64, device=device).requires_grad_()
    batch = torch.tensor([2, 0, 0, 3, -1, 2], dtype=torch.int32, device=device)
    out = global_broadcast(values, batch)
    assert torch.equal(out[[0, 1, 2, 5]], values[[2, 0, 0, 2]])
    assert not out[3:5].any()
    assert torch.autograd.gradcheck(lambda x: global_broadcast(x, batch), values)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3)])
def test_broadcast_of_nothing(shape):
    values = torch.ones(*shape, requires_grad=True)
    out = global_broadcast(values, torch.zeros(0, dtype=torch.int32))
    out.sum().backward()
    assert out.shape == (0, 3)
    assert not values.grad.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "mean"}, ValueError, "mode must be one of .*got 'mean'"),
        ({"feats": torch.ones(5, 2, dtype=torch.int64)}, TypeError, "floating point; got torch.in"),
        ({"feats": torch.ones(5)}, ValueError, r"2 dimensions; got shape \[5\]"),
        ({"batch_index": torch.zeros(5)}, TypeError, "int32 or int64; got torch.float32"),
        ({"batch_index": torch.zeros(4).int()}, ValueError, r"shape \[5\]; got \[4\]"),
        (
            {"batch_index": torch.zeros(5).int().to("meta")},
            ValueError,
            "share a device; got cpu an",
        ),
    ],
)
def test_refuses(change, error, message):
    arguments = {"feats": torch.ones(5, 2), "batch_index": torch.zeros(5).int(), "batch_size": 1}
    with pytest.raises(error, match=message):
        global_pool(**(arguments | change))


def test_broadcast_refuses():
    with pytest.raises(TypeError, match="global_broadcast: values must be floating point"):
        global_broadcast(torch.ones(2, 2).int(), torch.zeros(3).int())
    with pytest.raises(ValueError, match=r"batch_index must have shape \[N\]; got \[3, 1\]"):
        global_broadcast(torch.ones(2, 2), torch.zeros(3, 1).int())
