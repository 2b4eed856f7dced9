"""Pools by numba have the bits of torch's pools, which other tests compare with the reference."""

import pytest
import torch

from tests.kernels.test_pool import CASES, draw_tables, every_mode, shuffled
from tritonspconv.kernels.eager import pool as eager

pytest.importorskip("numba", reason="numba is not installed")

from tritonspconv.kernels.numba import pool

CPU = torch.device("cpu")


@pytest.mark.parametrize("bounded", [False, True], ids=["all", "bounded"])
@pytest.mark.parametrize("shuffle", [False, True], ids=["plain", "ordered"])
@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
@every_mode
def test_pool_is_that_of_torch(mode, ties, floor, size, dtype, shuffle, bounded, monkeypatch):
    monkeypatch.setattr(pool, "_LEAST_WORK", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    volume, n_in, n_out, channels = size
    _, out_rows, in_rows = draw_tables(volume, n_in, n_out)
    feats = torch.randint(-3, 3, (n_in, channels)).to(dtype)
    feats[: n_in // 4] = torch.nan
    grad = torch.randn(n_out, channels).to(dtype)
    count = None
    if bounded:
        count = torch.tensor(n_out // 2)
        out_rows[:, count:] = -1
    rows, order = shuffled(out_rows, shuffle and not bounded, CPU)
    made, expected = (
        room.pool_fwd(feats, rows, order, mode, floor, True, count) for room in (pool, eager)
    )
    for result, true in zip(made, expected, strict=True):
        assert _same(result, true)
    unsaved = pool.pool_fwd(feats, rows, order, mode, floor, False, count)
    assert _same(unsaved[0], made[0])
    assert unsaved[1] is None

    out, saved = expected
    state = {
        "avg": {"present": saved}, "sum": {},
        "max": {"argmax": saved} if ties == "first" else {"feats": feats, "out": out},
    }[mode]  # fmt: skip
    in_rows[in_rows >= (n_out if count is None else int(count))] = -1
    rows, order = shuffled(in_rows, shuffle, CPU)
    results = [room.pool_bwd(grad, rows, order, mode, **state) for room in (pool, eager)]
    assert _same(*results)


def _same(x, y):
    """Return True if two results have one dtype and equal bits, or if both are missing."""
    if x is None or y is None:
        return x is y
    return x.dtype == y.dtype and torch.equal(x.nan_to_num(7.5), y.nan_to_num(7.5))
