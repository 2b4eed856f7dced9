"""Pooling launchers, in torch and in Triton, against the reference."""

import importlib

import pytest
import torch
from torch import Tensor

from tritonspconv import reference
from tritonspconv.testing import assert_close

DTYPES = [torch.float64, torch.float16, torch.bfloat16]
MODES = {
    "max": ("max", "first", None),
    "max-floor": ("max", "first", 0.0),
    "max-all": ("max", "all", None),
    "max-all-floor": ("max", "all", 0.0),
    "avg": ("avg", "first", None),
    "sum": ("sum", "first", None),
}
every_mode = pytest.mark.parametrize(("mode", "ties", "floor"), MODES.values(), ids=MODES)
# (V, n_in, n_out, C)
SIZES = [
    (27, 40, 33, 17),
    (8, 63, 30, 3),
    (40, 20, 20, 40),
    (3, 9, 7, 130),
    (1, 1, 1, 1),
    (8, 0, 5, 3),
    (8, 5, 0, 3),
    (8, 5, 6, 0),
]
CASES = [(size, torch.float32) for size in SIZES] + [(SIZES[0], dtype) for dtype in DTYPES]


@pytest.fixture(params=["eager", "triton"])
def kernels(request: pytest.FixtureRequest):
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    return importlib.import_module(f"tritonspconv.kernels.{request.param}.pool")


def draw_tables(volume: int, n_in: int, n_out: int) -> tuple[list, Tensor, Tensor]:
    """Return a relation in which a pair has one tap, as triples and as both tables."""
    out_rows = torch.full((volume, n_out), -1, dtype=torch.int32)
    in_rows = torch.full((volume, n_in), -1, dtype=torch.int32)
    triples, seen = [], set()
    for tap in range(volume):
        count = min(n_in, n_out) // 2 + 1 if n_in and n_out else 0
        pairs = zip(
            torch.randperm(n_in)[:count].tolist(), torch.randperm(n_out)[:count].tolist(),
            strict=False,
        )  # fmt: skip
        for i, o in pairs:
            if (i, o) not in seen:
                seen.add((i, o))
                triples.append((i, o, tap))
                out_rows[tap, o], in_rows[tap, i] = i, o
    return triples, out_rows, in_rows


def shuffled(rows: Tensor, shuffle: bool, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the table with its columns in another order."""
    if not shuffle:
        return rows.to(device), None
    order = torch.randperm(rows.shape[1])
    return rows[:, order].to(device), order.int().to(device)


@pytest.mark.parametrize("shuffle", [False, True], ids=["plain", "ordered"])
@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
@every_mode
def test_pool(kernels, triton_device, mode, ties, floor, size, dtype, shuffle):
    volume, n_in, n_out, c = size
    triples, out_rows, in_rows = draw_tables(volume, n_in, n_out)
    # Values are small whole numbers: they have many ties, and sums are exact in every dtype.
    feats = torch.randint(-3, 3, (n_in, c)).double().requires_grad_()
    grad = torch.randint(-3, 4, (n_out, c)).double()
    expected = reference.pool(feats, triples, n_out, mode, ties=ties, floor=floor)
    expected = expected.reshape(n_out, c)
    (expected_grad,) = torch.autograd.grad(
        expected + 0 * feats.sum(), feats, grad, materialize_grads=True
    )

    ours, grad_ours = (x.detach().to(triton_device, dtype) for x in (feats, grad))
    rows, order = shuffled(out_rows, shuffle, triton_device)
    out, saved = kernels.pool_fwd(ours, rows, order, mode, floor, want_saved=True)
    assert out.dtype == dtype
    assert_close(out, expected)
    again, nothing = kernels.pool_fwd(ours, rows, order, mode, floor)
    assert torch.equal(again, out)
    assert nothing is None

    state = {}
    if mode == "avg":
        count = torch.tensor([sum(o == row for _, o, _ in triples) for row in range(n_out)])
        assert torch.equal(saved.cpu(), count.int())
        state = {"present": saved}
    elif mode == "max":
        state = {"argmax": saved} if ties == "first" else {"feats": ours, "out": out}
    rows, order = shuffled(in_rows, shuffle, triton_device)
    grad_feats = kernels.pool_bwd(grad_ours, rows, order, mode, **state)
    assert grad_feats.dtype == dtype
    eager = None if mode != "avg" else expected_grad.to(dtype) * (1 + torch.finfo(dtype).eps)
    assert_close(grad_feats, expected_grad, eager=eager)


def test_max_takes_what_there_is(kernels, triton_device):
    """The lowest number counts as an input; NaN shows; a row without inputs is zero."""
    inf, nan = float("inf"), float("nan")
    feats = torch.tensor([[-inf], [1.0], [nan], [2.0]], device=triton_device)
    rows = torch.tensor(
        [[0, 0, 2, 1, -1], [-1, 1, 3, 2, -1]], dtype=torch.int32, device=triton_device
    )
    out, argmax = kernels.pool_fwd(feats, rows, None, "max", want_saved=True)
    torch.testing.assert_close(
        out[:, 0].cpu(), torch.tensor([-inf, 1.0, nan, nan, 0.0]), equal_nan=True
    )
    assert argmax[:, 0].tolist() == [0, 1, 2, 2, -1]


def test_floor_of_rows_without_inputs(kernels, triton_device):
    feats = torch.tensor([[-5.0], [3.0], [2.0]], device=triton_device)
    rows = torch.tensor([[0, 1, -1, 2]], dtype=torch.int32, device=triton_device)
    out, argmax = kernels.pool_fwd(feats, rows, None, "max", 2.0, want_saved=True)
    assert out[:, 0].tolist() == [2.0, 3.0, 2.0, 2.0]
    assert argmax[:, 0].tolist() == [-1, 1, -1, 2]


def test_rows_may_be_strided(kernels, triton_device):
    _, out_rows, _ = draw_tables(4, 20, 20)
    wide = torch.randn(20, 12).to(triton_device)
    rows = out_rows.to(triton_device)
    for view in (wide[:, 3:8], wide.t()[:12].t()[:, ::2]):
        out, _ = kernels.pool_fwd(view, rows, None, "sum")
        assert torch.equal(out, kernels.pool_fwd(view.contiguous(), rows, None, "sum")[0])


def test_half_sums_are_kept_in_single_precision(kernels, triton_device):
    """In float16, 2048 + 1 is 2048, so a sum in half precision would not grow."""
    n = 64
    feats = torch.ones(n + 1, 1, dtype=torch.float16, device=triton_device)
    feats[0] = 2048
    rows = torch.arange(n + 1, dtype=torch.int32, device=triton_device)[:, None]
    out, _ = kernels.pool_fwd(feats, rows.contiguous(), None, "sum")
    assert out.item() == 2048 + n
