"""Row tensors run functions that treat each row by itself, and refuse others by name."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tritonspconv.ops  # noqa: F401 - fills the rules
from tritonspconv.coords.row_tensor import RowBounds, RowTensor, RowwiseError, as_rows, plain
from tritonspconv.coords.site_plan import SitePlan

CAPACITY, REAL = 7, 4


def rows(*shape: int, requires_grad: bool = False) -> RowTensor:
    values = torch.randn(CAPACITY, *shape, requires_grad=requires_grad)
    return as_rows(values, BOUNDS)


BOUNDS = RowBounds(torch.tensor(REAL), SitePlan([CAPACITY]))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: torch.relu(x) + 2 * x, id="arithmetic"),
        pytest.param(lambda x: F.leaky_relu(x, inplace=True), id="in-place"),
        pytest.param(lambda x: x[:, 1:3], id="columns"),
        pytest.param(lambda x: torch.cat([x, x], dim=1), id="cat-columns"),
        pytest.param(lambda x: torch.cat([x, x], -1), id="cat-columns-by-position"),
        pytest.param(lambda x: x @ torch.ones(4, 2), id="matmul"),
        pytest.param(lambda x: F.linear(x, torch.ones(3, 4)), id="linear"),
        pytest.param(lambda x: x.softmax(-1), id="softmax"),
        pytest.param(lambda x: x.max(dim=1).values, id="max-channels"),
        pytest.param(lambda x: x.sum(1, keepdim=True), id="sum-channels"),
        pytest.param(lambda x: x.view(x.shape[0], 2, 2).flatten(1), id="view"),
        pytest.param(lambda x: F.layer_norm(x, (4,)), id="layer-norm"),
        pytest.param(lambda x: x.half().float().clone().detach(), id="dtype"),
        pytest.param(lambda x: x.unsqueeze(1).squeeze(1), id="unsqueeze"),
        pytest.param(lambda x: F.normalize(x), id="normalize"),
    ],
)
def test_real_rows_are_what_torch_makes_of_them(function) -> None:
    x = rows(4)
    expected = function(plain(x).clone()[:REAL])
    got = function(x)
    assert isinstance(got, RowTensor)
    assert got.bounds is BOUNDS
    torch.testing.assert_close(plain(got)[:REAL], expected)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x.mean(0), id="mean-rows"),
        pytest.param(lambda x: x.sum(), id="sum-all"),
        pytest.param(lambda x: x.max(), id="max-all"),
        pytest.param(lambda x: x.std(dim=-2), id="std-rows-from-the-end"),
        pytest.param(lambda x: x[x[:, 0] > 0], id="mask"),
        pytest.param(lambda x: x[:3], id="slice-rows"),
        pytest.param(lambda x: torch.cat([x, x]), id="cat-rows"),
        pytest.param(lambda x: x.T, id="transpose"),
        pytest.param(lambda x: x.t() @ x, id="gram"),
        pytest.param(lambda x: torch.ones(2, CAPACITY) @ x, id="matmul-from-the-left"),
        pytest.param(lambda x: torch.unique(x), id="unique"),
        pytest.param(lambda x: x.nonzero(), id="nonzero"),
        pytest.param(lambda x: x.tolist(), id="tolist"),
        pytest.param(lambda x: x[0, 0].item(), id="item"),
        pytest.param(lambda x: bool((x > 0).any()), id="any"),
        pytest.param(lambda x: torch.sort(x, dim=0), id="sort"),
        pytest.param(lambda x: x.reshape(-1), id="reshape-rows-away"),
        pytest.param(lambda x: x.numpy(), id="numpy"),
        pytest.param(lambda x: F.layer_norm(x, (CAPACITY, 4)), id="layer-norm-rows"),
    ],
)
def test_functions_over_rows_are_refused_and_the_line_is_named(function) -> None:
    with pytest.raises(RowwiseError, match=r"padded to a capacity.*test_row_tensor.py"):
        function(rows(4))


def test_rows_of_different_sites_do_not_mix() -> None:
    other = as_rows(torch.ones(CAPACITY, 4), RowBounds(torch.tensor(REAL), SitePlan([CAPACITY])))
    with pytest.raises(RowwiseError, match="rows of different sites"):
        rows(4) + other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("real", [0, 1, 2, REAL, CAPACITY])
def test_batch_norm_sees_real_rows_only(real: int, dtype: torch.dtype) -> None:
    bounds = RowBounds(torch.tensor(real), SitePlan([CAPACITY]))
    ours, torchs = nn.BatchNorm1d(3, dtype=dtype), nn.BatchNorm1d(3, dtype=dtype)
    values = torch.randn(CAPACITY, 3, dtype=dtype)
    values[real:] = float("inf")
    x = values.clone().requires_grad_()
    y = plain(ours(as_rows(x, bounds)))
    assert torch.equal(y[real:], torch.zeros_like(y[real:]))
    weights = torch.randn(CAPACITY, 3, dtype=dtype)
    (y * weights).sum().backward()
    assert x.grad is not None
    if real < 2:
        assert torch.equal(ours.running_mean, torch.zeros(3, dtype=dtype))
        assert y.isfinite().all()
        return
    expected_x = values[:real].clone().requires_grad_()
    expected = torchs(expected_x)
    (expected * weights[:real]).sum().backward()
    torch.testing.assert_close(y[:real], expected)
    torch.testing.assert_close(x.grad[:real], expected_x.grad)
    assert torch.equal(x.grad[real:], torch.zeros_like(x.grad[real:]))
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(ours, name).grad, getattr(torchs, name).grad)
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    torch.testing.assert_close(ours.running_var, torchs.running_var)


@pytest.mark.parametrize("loss", [F.cross_entropy, F.nll_loss])
def test_losses_average_over_real_rows(loss) -> None:
    logits, target = torch.randn(CAPACITY, 5).log_softmax(1), torch.tensor([0, 4, 2, -100, 1, 1, 1])
    got = loss(as_rows(logits, BOUNDS), as_rows(target, BOUNDS))
    torch.testing.assert_close(got, loss(logits[:REAL], target[:REAL]))
    with pytest.raises(RowwiseError, match="class weights"):
        loss(as_rows(logits, BOUNDS), as_rows(target, BOUNDS), weight=torch.ones(5))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss])
def test_regression_losses(loss, reduction: str) -> None:
    x, y = torch.randn(2, CAPACITY, 3)
    got = loss(as_rows(x, BOUNDS), as_rows(y, BOUNDS), reduction=reduction)
    torch.testing.assert_close(got, loss(x[:REAL], y[:REAL], reduction=reduction))


def test_infinite_padding_stays_out_of_the_gradients_of_parameters() -> None:
    layer = nn.Linear(4, 2)
    x = rows(4)
    with torch.no_grad():
        plain(x)[REAL:] = float("inf")
    scale = torch.ones(2, requires_grad=True)
    y = layer(x) * scale
    target = as_rows(torch.zeros(CAPACITY, 2), BOUNDS)
    F.mse_loss(y, target).backward()
    grads = [*(p.grad for p in layer.parameters()), scale.grad]
    layer.zero_grad()
    F.mse_loss(layer(plain(x)[:REAL]), torch.zeros(REAL, 2)).backward()
    torch.testing.assert_close(grads[0], layer.weight.grad)
    torch.testing.assert_close(grads[1], layer.bias.grad)
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
