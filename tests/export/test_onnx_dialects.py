"""Files with the names of other readers, read back with the engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
from tests.export._scans import Of, engine, minkowski, spconv_tensor, sweep, trained
from tritonspconv import nn as tsnn
from tritonspconv.export import OnnxExportError, OnnxNetwork, export_onnx
from tritonspconv.models import lidar

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

PAGE = Path(__file__).parents[2] / "docs" / "onnx.md"
DIALECTS = ("libspconv", "autoware")


class BirdsEyeView(nn.Module):
    """An encoder, and its dense output with the height among the channels."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Any) -> Any:
        dense = self.encoder(x)[0].dense()
        n, c, d, h, w = dense.shape
        return dense.view(n, c * d, h, w)


ENCODERS = {"SECOND": lidar.second_encoder, "residual": lidar.residual_encoder}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_of_detectors(name: str, dialect: Any, tmp_path: Path) -> None:
    net = trained(BirdsEyeView(ENCODERS[name](spconv)))
    scans = [spconv_tensor(*sweep(seed)) for seed in range(3)]
    path = tmp_path / "net.onnx"
    report = export_onnx(net, scans[0], path, dialect=dialect, check=scans[1:])
    largest = max(check.max_value for check in report.checks)
    # libspconv has weights of float16.
    assert report.max_error < (3e-3 if dialect == "libspconv" else 3e-6) * largest
    found = OnnxNetwork(path)(scans[1])
    with torch.no_grad():
        torch.testing.assert_close(found, net(scans[1]), rtol=1e-2, atol=1e-2 * largest)


def attributes_of(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def test_what_libspconv_reads(tmp_path: Path) -> None:
    """The file has the names that the parser expects; see the table of docs/onnx.md."""
    net = trained(BirdsEyeView(lidar.residual_encoder(spconv)))
    export_onnx(net, spconv_tensor(*sweep(0)), tmp_path / "net.onnx", dialect="libspconv")
    graph = onnx.load(tmp_path / "net.onnx").graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    assert len(graph.input) == 1
    kinds = {node.op_type for node in graph.node}
    assert kinds == {"SparseConvolution", "Add", "Relu", "ScatterDense", "Reshape"}
    for node in graph.node:
        found = attributes_of(node)
        assert not node.domain
        if node.op_type == "SparseConvolution":
            _, weight, bias = (constants.get(name) for name in node.input)
            assert weight is not None
            assert bias is not None
            assert weight.data_type == bias.data_type == onnx.TensorProto.FLOAT16
            assert len(weight.raw_data) == 2 * torch.Size(weight.dims).numel()
            channels = found["out_channels"], *found["kernel_size"], found["in_channels"]
            assert tuple(weight.dims) == channels
            assert {"activation", "stride", "padding", "dilation", "subm", "inverse", "rulebook",
                    "output_bound"} <= found.keys()  # fmt: skip
            assert found["activation"] in (b"ReLU", b"None")
    (scatter,) = [attributes_of(node) for node in graph.node if node.op_type == "ScatterDense"]
    assert scatter["format"] == b"zyx"
    assert scatter["output_shape"][:2] == [1, 128]
    (reshape,) = [attributes_of(node) for node in graph.node if node.op_type == "Reshape"]
    assert reshape["dims"] == [1, 128 * 2, 20, 20]
    keys = [attributes_of(n)["rulebook"] for n in graph.node if n.op_type == "SparseConvolution"]
    assert keys[:6] == [b"subm1"] * 5 + [b"spconv2"]


def test_what_autoware_reads(tmp_path: Path) -> None:
    """Nodes have the plug-ins' inputs, outputs and attributes; see the table of docs/onnx.md."""
    net = trained(BirdsEyeView(lidar.residual_encoder(spconv)))
    export_onnx(net, spconv_tensor(*sweep(0)), tmp_path / "net.onnx", dialect="autoware")
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model)
    pairs = [n for n in model.graph.node if n.op_type == "GetIndicePairsImplicitGemm"]
    gemms = [n for n in model.graph.node if n.op_type == "ImplicitGemm"]
    assert (len(pairs), len(gemms)) == (8, 21)
    for node in pairs:
        assert node.domain == "autoware"
        assert (len(node.input), len(node.output)) == (1, 5)
        assert attributes_of(node).keys() == {
            "batch_size", "spatial_shape", "algo", "ksize", "stride", "padding", "dilation",
            "out_padding", "subm", "transpose", "is_train",
        }  # fmt: skip
    for node in gemms:
        assert node.domain == "autoware"
        assert (len(node.input), len(node.output)) == (5, 1)
        assert attributes_of(node).keys() == {
            "act_alpha", "act_beta", "is_subm", "is_train", "output_add_scale", "output_scale",
        }  # fmt: skip
    standard = {node.op_type for node in model.graph.node if not node.domain}
    assert standard == {
        "Add", "Relu", "ConstantOfShape", "Cast", "ScatterND", "Transpose", "Reshape"
    }  # fmt: skip


def test_libspconv_reads_inverse_layers_and_products(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = spconv.SparseConv3d(4, 6, 3, 2, 1, indice_key="down")
            self.point = spconv.SubMConv3d(6, 5, 1)
            self.up = spconv.SparseInverseConv3d(5, 4, 3, "down")

        def forward(self, x: Any) -> Any:
            return self.up(self.point(self.down(x)))

    scans = [spconv_tensor(*sweep(seed)) for seed in range(2)]
    path = tmp_path / "net.onnx"
    report = export_onnx(Net().eval(), scans[0], path, dialect="libspconv", check=scans[1:])
    assert report.operators == {"SparseConvolution": 3}
    found = OnnxNetwork(path)(scans[1])
    assert torch.equal(found.coords, scans[1].indices)


REFUSED = {
    "a concatenation": (
        lambda: Of(lambda self, x: x.replace_feature(torch.cat([x.features, x.features], 1))),
        spconv_tensor, "libspconv", "Concat",
    ),
    "a pool": (lambda: spconv.SparseMaxPool3d(2), spconv_tensor, "libspconv", "SparsePool"),
    "a pool for plug-ins": (lambda: tsnn.MaxPool3d(2), engine, "autoware", "SparsePool"),
    "a transposed layer": (
        lambda: spconv.SparseConvTranspose3d(4, 4, 3, 2), spconv_tensor, "libspconv",
        "a layer of another kind",
    ),
    "an unbounded grid": (
        lambda: ME.MinkowskiConvolution(4, 4, 3, dimension=3), minkowski, "autoware",
        "a layer of another kind",
    ),
    "cells": (
        lambda: tsnn.SparseConv3d(4, 4, 3, 2, 1, sites="cells"), engine, "libspconv",
        "output sites follow another rule",
    ),
    "another target": (
        lambda: Of(
            lambda self, x: self.up(self.down(x), x),
            down=tsnn.SparseConv3d(4, 4, 3, 1, 1), up=tsnn.SparseConv3d(4, 4, 3, 1, 1),
        ),
        engine, "autoware", "output sites follow another rule",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_reader_does_not_know_is_refused(name: str, tmp_path: Path) -> None:
    make, tensor, dialect, words = REFUSED[name]
    with pytest.raises(OnnxExportError, match=f"do(es)? not read .*{words}"):
        export_onnx(make().eval(), tensor(*sweep(0)), tmp_path / "x.onnx", dialect=dialect)  # pyright: ignore
    report = export_onnx(make().eval(), tensor(*sweep(0)), tmp_path / "x.onnx")
    assert report.max_error < 1e-6


def test_the_code_of_the_page_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block, "onnx.md", "exec"), {})


def test_the_page_has_every_attribute_and_operator(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    net = trained(BirdsEyeView(lidar.second_encoder(spconv)))
    for dialect in ("tritonspconv", *DIALECTS):
        export_onnx(net, spconv_tensor(*sweep(0)), tmp_path / "x.onnx", dialect=dialect)  # pyright: ignore
        for node in onnx.load(tmp_path / "x.onnx").graph.node:
            if not node.domain and dialect != "libspconv":
                continue
            names = [node.op_type, *attributes_of(node)]
            missing = [name for name in names if not re.search(rf"`[^`]*\b{name}\b[^`]*`", page)]
            assert not missing, f"{dialect}, {node.op_type}"
