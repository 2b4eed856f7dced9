"""Helpers of the tests of fused layers."""

import types
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tritonspconv as ts
from tritonspconv import nn as tsnn
from tritonspconv.kernels import has_numba
from tritonspconv.nn import chain


def record_fused(monkeypatch: pytest.MonkeyPatch, conv: type) -> list[tuple[bool, bool]]:
    """Fuse on every device; return ``(norm, relu)`` for each convolution that was fused.

    Args:
        monkeypatch: The test's fixture.
        conv: The base class of the convolutions.
    """
    taken = []
    forward_fused = conv.forward_fused

    def recorded(self, input, norm, relu, residual=None):
        taken.append((norm is not None, relu))
        return forward_fused(self, input, norm, relu, residual)

    for rule in ("fuses_on", "trains_on"):
        monkeypatch.setattr(chain, rule, lambda device: True)
    monkeypatch.setattr(conv, "forward_fused", recorded)
    return taken


def keeps_bits(device: torch.device) -> bool:
    """Return whether fused layers have the bits of their modules in float32 and float64.

    On a CPU they have, where torch's batch norm multiplies and adds with one rounding as ours does.
    """
    has_one_rounding = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return device.type == "cpu" and (has_one_rounding or not has_numba(device))


def settle(norm: nn.BatchNorm1d) -> nn.BatchNorm1d:
    """Give a batch norm random statistics and factors, and put it in evaluation mode."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm.eval()


class DoublingConv(tsnn.SubMConv3d):
    def forward(self, x):
        y = super().forward(x)
        return y.replace(2 * y.feats)


class CallingConv(tsnn.SubMConv3d):
    def __call__(self, x):
        y = super().__call__(x)
        return y.replace(2 * y.feats)


class DoublingNorm(nn.BatchNorm1d):
    def forward(self, x):
        return 2 * super().forward(x)


class LeakyReLU(nn.ReLU):
    def forward(self, x):
        return nn.functional.leaky_relu(x, 0.5)


def double_result(module: nn.Module) -> None:
    """Assign a ``forward`` to the instance, as wrappers of downstream code do."""
    original = module.forward

    def forward(self, x):
        y = original(x)
        return y.replace(2 * y.feats) if isinstance(y, ts.SparseTensor) else 2 * y

    module.forward = types.MethodType(forward, module)


def double_input(module: nn.Module) -> None:
    def double(module, args):
        (x,) = args
        return x.replace(2 * x.feats) if isinstance(x, ts.SparseTensor) else 2 * x

    module.register_forward_pre_hook(double)


def double_output(module: nn.Module) -> None:
    def double(module, args, y):
        return y.replace(2 * y.feats) if isinstance(y, ts.SparseTensor) else 2 * y

    module.register_forward_hook(double)


def three(conv=None, norm=None, relu=None) -> tsnn.Sequential:
    return tsnn.Sequential(
        conv or tsnn.SubMConv3d(4, 6, 3), norm or nn.BatchNorm1d(6), relu or nn.ReLU()
    )


def changed(change, place: int) -> tsnn.Sequential:
    net = three()
    change(net[place])
    return net


def weight_norm(module: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(module)


def old_weight_norm(module: nn.Module) -> None:
    nn.utils.weight_norm(module)


# Chains in which a module runs other code than its class's forward. Each has a function that makes
# the chain, and the number of children that ``fuse`` leaves.
UNLIKE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "conv class": (lambda: three(conv=DoublingConv(4, 6, 3)), 3),
    "conv class's call": (lambda: three(conv=CallingConv(4, 6, 3)), 3),
    "norm class": (lambda: three(norm=DoublingNorm(6)), 3),
    "relu class": (lambda: three(relu=LeakyReLU()), 2),
    "conv forward": (lambda: changed(double_result, 0), 3),
    "norm forward": (lambda: changed(double_result, 1), 3),
    "relu forward": (lambda: changed(double_result, 2), 2),
    "conv pre-hook": (lambda: changed(double_input, 0), 3),
    "norm pre-hook": (lambda: changed(double_input, 1), 3),
    "relu pre-hook": (lambda: changed(double_input, 2), 2),
    "conv hook": (lambda: changed(double_output, 0), 3),
    "norm hook": (lambda: changed(double_output, 1), 3),
    "relu hook": (lambda: changed(double_output, 2), 2),
    "weight norm": (lambda: changed(weight_norm, 0), 3),
    "old weight norm": (lambda: changed(old_weight_norm, 0), 3),
    "norm of a parametrised weight": (lambda: changed(
        lambda norm: nn.utils.parametrize.register_parametrization(norm, "weight", nn.Tanh()), 1
    ), 3),
    "norm without statistics": (
        lambda: three(norm=nn.BatchNorm1d(6, track_running_stats=False)), 3
    ),
}  # fmt: skip
