"""Each function on features becomes nodes that give torch's result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
import tritonspconv as ts
from compat.spconv.core import Activation
from tests.export._scans import Of, engine, minkowski, spconv_tensor, sweep, trained
from tritonspconv import nn as tsnn
from tritonspconv.export import export_onnx
from tritonspconv.export.onnx.standard import OPERATORS

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
reference = pytest.importorskip("onnx.reference")

MATRIX, VECTOR = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.rand(5) + 0.5)

# Functions of features [N, 5] and of a module with a matrix [5, 3] and a vector [5].
FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "relu": lambda f, m: torch.relu(f),
    "relu in place": lambda f, m: F.relu(f * 1, inplace=True),
    "relu_": lambda f, m: (f * 1).relu_() + f,
    "in-place arithmetic": lambda f, m: _in_place(f * 1, f),
    "out= of itself": lambda f, m: f.clone().add_(f).mul_(2).sub_(m.vector).div_(3),
    "leaky_relu": lambda f, m: F.leaky_relu(f, 0.2) + F.leaky_relu(f),
    "elu": lambda f, m: F.elu(f) + F.celu(f, 2.0),
    "gelu": lambda f, m: F.gelu(f) + F.gelu(f, approximate="tanh"),
    "silu": lambda f, m: F.silu(f) + F.silu(f * 1, inplace=True),
    "relu6": lambda f, m: F.relu6(f * 9) + F.hardtanh(f) + F.hardtanh(f, -0.5, 0.25),
    "hardswish": lambda f, m: F.hardswish(f) + F.mish(f),
    "sigmoid": lambda f, m: f.sigmoid() + torch.tanh(f) + f.sin().cos().exp(),
    "abs": lambda f, m: (f.abs() + 0.1).sqrt() + (f.abs() + 1).log() + (f.abs() + 1).rsqrt(),
    "rounding": lambda f, m: f.floor() + f.ceil() + f.round() + f.sign() + abs(-f),
    "reciprocal": lambda f, m: (f.abs() + 1).reciprocal() + f.square() + f.erf(),
    "clamp": lambda f, m: f.clamp(-0.5, 0.5) + f.clamp(min=0.1) + f.clamp_max(0.3),
    "arithmetic": lambda f, m: (2 * f + 1 - f / 3) * (1 - f) / (f.abs() + 1) - (2 - f),
    "right operands": lambda f, m: 1 / (f.abs() + 1) + 2 ** f.clamp(-2, 2) + (f.abs() + 1) ** 1.5,
    "torch arithmetic": lambda f, m: torch.sub(torch.add(f, m.vector), torch.div(f, m.vector)),
    "parameters": lambda f, m: f * m.vector + m.vector[None] * 2 - m.vector.exp(),
    "maximum": lambda f, m: torch.maximum(f, f.sin()) + torch.minimum(f, m.vector),
    "columns": lambda f, m: torch.cat([f[:, 1:4], f[:, [0, 2]], f[:, -1:]], dim=1),
    "a column": lambda f, m: f[:, 2].unsqueeze(1) * f + f[:, None, 0],
    "steps": lambda f, m: f[:, ::2],
    "reshape": lambda f, m: f[:, :4].reshape(f.shape[0], 2, 2).flatten(1) + f[:, :4].view(-1, 4),
    "sum": lambda f, m: f.sum(1, keepdim=True) + f.mean(-1)[:, None] + f.amax(dim=1, keepdim=True),
    "softmax": lambda f, m: f.softmax(1) + F.log_softmax(f, dim=-1),
    "linear": lambda f, m: F.linear(f, m.matrix.t()) + F.linear(f, m.matrix.t(), m.vector[:3]),
    "matmul": lambda f, m: f @ m.matrix + f.mm(m.matrix) + torch.addmm(m.vector[:3], f, m.matrix),
    "batch_norm": lambda f, m: F.batch_norm(f, m.vector, m.vector, None, m.vector, eps=1e-3),
    "layer_norm": lambda f, m: F.layer_norm(f, (5,)) + F.layer_norm(f, (5,), m.vector, m.vector),
    "dtypes": lambda f, m: f.double() * 0.1 + (f.half().float() + f.int()).to(f),
    "mixed dtypes": lambda f, m: f.double() + f,
    "copies": lambda f, m: f.clone().detach().contiguous().data,
    "integers": lambda f, m: f + (f * 3).long(),
    "cat of dtypes": lambda f, m: torch.cat([f, f.double()], -1),
    "dropout": lambda f, m: F.dropout(f, 0.5, training=False),
}  # fmt: skip


def _in_place(x: Any, other: Any) -> Any:
    x += other
    x *= 2
    x -= 1
    x /= 3
    return x


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_on_features(name: str, tmp_path: Path) -> None:
    net = Of(lambda self, x: FUNCTIONS[name](x.features, self), matrix=MATRIX, vector=VECTOR).eval()
    scans = [spconv_tensor(*sweep(seed, channels=5)) for seed in range(3)]
    report = export_onnx(net, scans[0], tmp_path / "net.onnx", check=scans[1:])
    # Compare the operators of this package, and of the onnx package, with torch.
    assert report.max_error <= 1e-6 * max(1, *(check.max_value for check in report.checks))
    evaluator = reference.ReferenceEvaluator(onnx.load(tmp_path / "net.onnx"))
    feats, coords = scans[2].features, scans[2].indices
    names = [value.name for value in onnx.load(tmp_path / "net.onnx").graph.input]
    given = {"x.features": feats.numpy(), "x.indices": coords.numpy()}
    (found,) = evaluator.run(None, {key: given[key] for key in names})
    with torch.no_grad():
        expected = net(scans[2])
    assert found.dtype == expected.numpy().dtype
    torch.testing.assert_close(torch.from_numpy(np.asarray(found)), expected, rtol=1e-4, atol=1e-5)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    **{
        f"engine {name}": (make, engine)
        for name, make in {
            "1x1x1": lambda: tsnn.SubMConv3d(3, 17, 1),
            "even window": lambda: tsnn.SubMConv3d(3, 1, (2, 3, 4), bias=False),
            "dilated": lambda: tsnn.SparseConv3d(3, 5, 3, 2, 2, dilation=2),
            "cells": lambda: tsnn.SparseConv3d(3, 5, 3, 2, 1, sites="cells"),
            "transposed": lambda: tsnn.SparseConvTranspose3d(3, 5, 3, 2, 1, output_padding=1),
            "max pool": lambda: tsnn.MaxPool3d(2),
            "average pool": lambda: tsnn.AvgPool3d(3, 2, 1),
            "sum pool": lambda: tsnn.SumPool3d(2),
            "global pools": lambda: Of(
                lambda self, x: (self.a(x), self.b(x), self.c(x)),
                a=tsnn.GlobalMaxPool(), b=tsnn.GlobalAvgPool(), c=tsnn.GlobalSumPool(),
            ),
            "layer norm": lambda: tsnn.LayerNorm(3),
            "weight norm": lambda: tsnn.Sequential(*(
                weight_norm(tsnn.SubMConv3d(3, 3, 3), dim=2) for _ in range(3)
            )),
            "fused": lambda: ts.fuse(tsnn.Sequential(
                tsnn.SubMConv3d(3, 4, 3), tsnn.BatchNorm(4), tsnn.ReLU()
            ).eval()),
            "optimised": lambda: ts.optimize(trained(Of(
                lambda self, x: x.replace(torch.relu(self.norm(self.conv(x).feats) + x.feats)),
                conv=tsnn.SubMConv3d(3, 3, 3), norm=nn.BatchNorm1d(3),
            ))),
            "equal shapes": lambda: Of(lambda self, x: equal_shapes(x.feats, torch.relu(x.feats))),
            "linear": lambda: tsnn.Sequential(tsnn.Linear(3, 4), tsnn.GELU(), tsnn.Identity()),
            "dense": lambda: tsnn.ToDense(),
            "batch index": lambda: Of(lambda self, x: x.feats + x.batch_index[:, None]),
            "coordinates": lambda: Of(lambda self, x: x.feats * x.coords[:, 1:].float()),
        }.items()
    },
    **{
        f"spconv {name}": (make, spconv_tensor)
        for name, make in {
            "1x1": lambda: spconv.SubMConv3d(3, 8, 1),
            "activation": lambda: activated(spconv.SubMConv3d(3, 8, 3), "LeakyReLU"),
            "clamped": lambda: activated(spconv.SparseConv3d(3, 8, 3, 2), "ReLU"),
            "transposed": lambda: spconv.SparseConvTranspose3d(3, 5, 3, 2),
            "max pool": lambda: spconv.SparseMaxPool3d(3, 2, 1),
            "average pool": lambda: spconv.SparseAvgPool3d(2),
            "global pools": lambda: Of(
                lambda self, x: (self.a(x), self.b(x)),
                a=spconv.SparseGlobalMaxPool(), b=spconv.SparseGlobalAvgPool(),
            ),
            "added": lambda: Of(lambda self, x: self.conv(x, x),
                                conv=spconv.SubMConv3d(3, 3, 3)),
            "tables": lambda: spconv.SparseSequential(
                spconv.ConcatTable().add(spconv.Identity()).add(spconv.SubMConv3d(3, 3, 3)),
                spconv.AddTable(),
            ),
            "coordinates": lambda: Of(
                lambda self, x: (lambda y: y.features * y.indices[:, :3])(self.conv(x)),
                conv=spconv.SparseConv3d(3, 3, 3, 2, 1),
            ),
            "channels last": lambda: Of(lambda self, x: x.dense(channels_first=False)),
        }.items()
    },
    **{
        f"minkowski {name}": (make, minkowski)
        for name, make in {
            "even window": lambda: ME.MinkowskiConvolution(3, 5, 2, dimension=3),
            "strided": lambda: ME.MinkowskiConvolution(3, 5, 3, stride=2, dilation=2, dimension=3),
            "cross": lambda: ME.MinkowskiConvolution(
                3, 5, bias=True, dimension=3, kernel_generator=ME.KernelGenerator(
                    3, 1, 1, region_type=ME.RegionType.HYPER_CROSS, dimension=3)),
            "down and up": lambda: nn.Sequential(
                ME.MinkowskiConvolution(3, 5, 3, stride=2, dimension=3),
                ME.MinkowskiConvolutionTranspose(5, 4, 3, stride=2, dimension=3)),
            "up by another window": lambda: nn.Sequential(
                ME.MinkowskiConvolution(3, 5, 2, stride=2, dimension=3),
                ME.MinkowskiConvolutionTranspose(5, 4, 3, stride=2, bias=True, dimension=3)),
            "max pool": lambda: ME.MinkowskiMaxPooling(2, 2, dimension=3),
            "average pool": lambda: ME.MinkowskiAvgPooling(3, 2, dimension=3),
            "sum pool": lambda: ME.MinkowskiSumPooling(2, 2, dimension=3),
            "pointwise": lambda: nn.Sequential(
                ME.MinkowskiLinear(3, 4), ME.MinkowskiELU(),
                ME.MinkowskiToFeature()),
            "sum of tensors": lambda: Of(
                lambda self, x: ME.cat(x + x, x * 2) - 1,
            ),
            "coordinates": lambda: Of(lambda self, x: x.F * x.C[:, 1:]),
        }.items()
    },
}  # fmt: skip


def equal_shapes(x: Any, y: Any) -> Any:
    assert x.shape == y.shape
    assert x.size() == y.size()
    return x + y


def activated(layer: Any, name: str) -> Any:
    """Return a layer with an activation, as spconv's fusion makes it."""
    layer.act_type, layer.act_alpha = getattr(Activation, name), 0.2
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name: str, tmp_path: Path) -> None:
    make, tensor = LAYERS[name]
    net = make().eval()
    scans = [tensor(*sweep(seed, channels=3)) for seed in range(3)]
    for fold in (False, True):
        report = export_onnx(net, scans[0], tmp_path / "net.onnx", fold=fold, check=scans[1:])
        assert report.max_error <= 1e-6 * max(1, *(check.max_value for check in report.checks))
        onnx.checker.check_model(onnx.load(tmp_path / "net.onnx"))


# Operators of torch's exporter that no rule above writes are compared with the onnx package.
NODES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "Conv": ({"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2], "group": 2},
             [(2, 4, 7, 8), (6, 2, 3, 2), (6,)]),
    "Transpose": ({"perm": [2, 0, 1]}, [(2, 3, 4)]),
    "Slice": ({}, [(5, 6), [4, -2], [0, 100], [0, 1], [-2, 1]]),
    "Reshape": ({}, [(2, 0, 3), [0, 0, 3]]),
    "Gather": ({"axis": 1}, [(3, 4), [[0, -1], [2, 2]]]),
    "ScatterND": ({}, [(3, 4, 2), [[0, 1], [2, 3]], (2, 2)]),
    "ReduceMean": ({"keepdims": 0}, [(2, 3, 4), [0, -1]]),
    "Gemm": ({"transA": 1, "alpha": 0.5, "beta": 2.0}, [(3, 4), (3, 2), (2,)]),
    "Softmax": ({"axis": 0}, [(3, 4)]),
    "MaxPool": ({"kernel_shape": [2, 2]}, [(1, 2, 4, 4)]),
}  # fmt: skip


@pytest.mark.parametrize("op", NODES)
def test_a_standard_operator_equals_that_of_the_onnx_package(op: str) -> None:
    from tritonspconv.export.onnx.standard import run_in_numpy

    attributes, given = NODES[op]
    inputs = [torch.tensor(x) if isinstance(x, list) else torch.randn(x) for x in given]
    names = [f"x{place}" for place in range(len(inputs))]
    node = onnx.helper.make_node(op, names, ["y"], **attributes)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([], "g", [], []), opset_imports=[onnx.helper.make_opsetid("", 20)]
    )
    (expected,) = run_in_numpy(model, node, inputs)
    if op in OPERATORS:
        torch.testing.assert_close(OPERATORS[op](inputs, attributes), expected)
    else:
        assert expected.shape == (1, 2, 3, 3)
