"""Full backward hooks fire on the engine's layers as on torch's layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonspconv as ts

COORDS = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4)).int()
LAYERS = {
    "convolution": lambda: ts.nn.SubMConv2d(3, 3, 3),
    "strided": lambda: ts.nn.SparseConv2d(3, 3, 2, 2),
    "pool": lambda: ts.nn.AvgPool2d(2),
    "global pool": lambda: ts.nn.GlobalSumPool(),
    "linear": lambda: ts.nn.Linear(3, 3),
    "dense": lambda: ts.nn.ToDense(),
    "container": lambda: ts.nn.Sequential(ts.nn.SubMConv2d(3, 3, 3), nn.ReLU()),
}


def sparse(feats: Tensor) -> ts.SparseTensor:
    return ts.SparseTensor(feats, COORDS, spatial_shape=(4, 4), batch_size=1)


def run(layer: nn.Module, feats: Tensor) -> Tensor:
    out: Any = layer(sparse(feats))
    return getattr(out, "feats", out)


@pytest.mark.parametrize("kind", LAYERS)
def test_hooks_get_the_gradients_and_may_replace_them(kind: str) -> None:
    layer = LAYERS[kind]()
    feats = torch.randn(16, 3, requires_grad=True)
    seed = torch.randn_like(run(layer, feats))
    (expected,) = torch.autograd.grad(run(layer, feats), feats, seed)

    calls: list[str] = []

    def before(module: nn.Module, grads: tuple[Tensor, ...]) -> None:
        assert module is layer
        torch.testing.assert_close(grads, (seed,))
        calls.append("before")

    def after(module: nn.Module, grads: tuple[Tensor, ...], outer: tuple[Tensor, ...]) -> Any:
        torch.testing.assert_close(grads, (expected,))
        torch.testing.assert_close(outer, (seed,))
        calls.append("after")
        return (grads[0] * 2,)

    handles = [
        layer.register_full_backward_hook(after),
        layer.register_full_backward_pre_hook(before),
    ]
    (found,) = torch.autograd.grad(run(layer, feats), feats, seed)
    torch.testing.assert_close(found, expected * 2)
    assert calls == ["before", "after"]
    for handle in handles:
        handle.remove()
    (found,) = torch.autograd.grad(run(layer, feats), feats, seed)
    torch.testing.assert_close(found, expected)
    assert len(calls) == 2


def test_order_of_hooks() -> None:
    layer, calls = ts.nn.SubMConv2d(3, 3, 3), []
    for name, prepend in (("first", False), ("second", False), ("zeroth", True)):
        layer.register_full_backward_hook(lambda *_, name=name: calls.append(name), prepend)
    run(layer, torch.randn(16, 3, requires_grad=True)).sum().backward()
    assert calls == ["zeroth", "first", "second"]


def _count(*_: Any) -> None:
    COUNTED.append(1)


COUNTED: list[int] = []


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_has_the_hooks_of_its_own_module(way: str) -> None:
    layer = ts.nn.SubMConv2d(3, 3, 3)
    layer.register_full_backward_hook(_count)
    twin = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
    with torch.no_grad():
        twin.weight.zero_()
    COUNTED.clear()
    assert not run(twin, torch.randn(16, 3, requires_grad=True)).std(0).any()
    run(twin, torch.randn(16, 3, requires_grad=True)).sum().backward()
    assert len(COUNTED) == 1


def test_a_module_without_hooks_has_no_forward_of_its_own() -> None:
    assert "forward" not in vars(ts.nn.SubMConv2d(3, 3, 3))
