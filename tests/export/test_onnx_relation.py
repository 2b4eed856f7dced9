"""The page's formula in plain Python gives the results of the files, without the engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tests.export._scans import Of, engine, minkowski, spconv_tensor, sweep, trained
from tritonspconv import nn as tsnn
from tritonspconv.export import export_onnx

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
reference = pytest.importorskip("onnx.reference")
op_run = pytest.importorskip("onnx.reference.op_run")


def relation(a: dict[str, Any], fine: Any, coarse: Any) -> list[tuple[int, int, int]]:
    """Return every (fine row, coarse row, tap) for which the page's formula holds."""
    rows = {tuple(site): row for row, site in enumerate(fine.tolist())}
    found = []
    for row, (sample, *site) in enumerate(coarse.tolist()):
        for tap, offset in enumerate(taps(a)):
            axes = zip(a["stride"], site, a["padding"], a["dilation"], offset, strict=True)
            reached = (sample, *(s * c - p + d * t for s, c, p, d, t in axes))
            if reached in rows:
                found.append((rows[reached], row, tap))
    return found


def taps(a: dict[str, Any]) -> list[tuple[int, ...]]:
    if a.get("taps"):
        return list(zip(*[iter(a["taps"])] * a["ndim"], strict=True))
    return list(itertools.product(*map(range, a["kernel_size"])))


def made_sites(a: dict[str, Any], indices: Any) -> Any:
    """Return the sites that a node makes, ascending."""
    made = set()
    for sample, *site in indices.tolist():
        if a["sites"] == "cells":
            made.add((sample, *(c // s for c, s in zip(site, a["stride"], strict=True))))
            continue
        for tap in taps(a):
            axes = list(zip(site, a["stride"], a["padding"], a["dilation"], tap, strict=True))
            if a["transposed"]:
                made.add((sample, *(c * s - p + d * t for c, s, p, d, t in axes)))
            elif all((f + p - d * t) % s == 0 for f, s, p, d, t in axes):
                made.add((sample, *((f + p - d * t) // s for f, s, p, d, t in axes)))
    shape = a.get("output_spatial_shape")
    if shape:
        made = {x for x in made if all(0 <= c < n for c, n in zip(x[1:], shape, strict=True))}
    return np.array(sorted(made), dtype=np.int32).reshape(-1, 1 + a["ndim"])


def along(a: dict[str, Any], indices: Any, out_indices: Any) -> tuple[list[Any], Any, bool]:
    """Return (input row, output row, tap) triples, the output sites, and whether they are new."""
    is_made = not a["subm"] and out_indices is None
    target = indices if a["subm"] else made_sites(a, indices) if is_made else out_indices
    # The two sides of the layer that an inverse node undoes, or of the node itself.
    source, end = (target, indices) if a["inverse"] else (indices, target)
    fine, coarse = (end, source) if a["transposed"] else (source, end)
    inputs_are_fine = bool(a["inverse"]) == bool(a["transposed"])
    triples = [
        (f, c, tap) if inputs_are_fine else (c, f, tap) for f, c, tap in relation(a, fine, coarse)
    ]
    return triples, target, is_made


class SparseConvolution(op_run.OpRun):
    """The operator of the page."""

    op_domain = "tritonspconv"

    def _run(
        self, features: Any, indices: Any, weight: Any, bias: Any = None, out_indices: Any = None,
        **a: Any,
    ) -> Any:  # fmt: skip
        triples, target, is_made = along(a, indices, out_indices)
        matrices = weight.reshape(weight.shape[0], -1, weight.shape[-1]).astype(np.float64)
        out = np.zeros((len(target), len(matrices)))
        for source, end, tap in triples:
            out[end] += matrices[:, tap] @ features[source].astype(np.float64)
        out = out if bias is None else out + bias
        out = np.maximum(out, 0) if a.get("act_type") == "ReLU" else out
        return (out.astype(features.dtype), target) if is_made else (out.astype(features.dtype),)


class SparsePool(op_run.OpRun):
    """The operator of the page."""

    op_domain = "tritonspconv"

    def _run(self, features: Any, indices: Any, out_indices: Any = None, **a: Any) -> Any:
        triples, target, is_made = along(a, indices, out_indices)
        rows: list[list[Any]] = [[] for _ in target]
        for source, end, _ in triples:
            rows[end].append(features[source])
        reduce = {"max": np.max, "avg": np.mean, "sum": np.sum}[a["mode"]]
        out = np.stack([reduce(np.stack(each), axis=0) for each in rows])
        out = out if a.get("floor") is None else np.maximum(out, a["floor"])
        return (out.astype(features.dtype), target) if is_made else (out.astype(features.dtype),)


class UpAndDown(nn.Module):
    """Every kind of layer of the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = tsnn.Sequential(tsnn.SubMConv3d(3, 4, (3, 2, 1)), nn.BatchNorm1d(4), nn.ReLU())
        self.down = tsnn.SparseConv3d(4, 5, (3, 2, 3), (2, 1, 2), (1, 0, 2), (1, 2, 1))
        self.back = tsnn.SparseInverseConv3d(5, 3, (3, 2, 3))
        self.wide = tsnn.SparseConvTranspose3d(5, 3, 3, 2, 1, output_padding=(0, 1, 0))
        self.cells = tsnn.SparseConv3d(4, 2, 3, 2, 1, sites="cells")
        self.pool = tsnn.AvgPool3d(2)

    def forward(self, x: ts.SparseTensor) -> Any:
        x = self.stem(x)
        y = self.down(x)
        return self.back(y, x), self.wide(y), self.wide(y, x), self.cells(x), self.pool(x)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "engine": (UpAndDown, engine),
    "spconv": (
        lambda: spconv.SparseSequential(
            spconv.SparseConv3d(3, 4, 3, 2, 1, indice_key="a"),
            spconv.SubMConv3d(4, 4, 3, dilation=2), nn.BatchNorm1d(4), nn.ReLU(),
            spconv.SparseMaxPool3d(2, 2), spconv.SparseConvTranspose3d(4, 3, 3, 2),
        ),
        spconv_tensor,
    ),
    "spconv inverse of transposed": (
        lambda: spconv.SparseSequential(
            spconv.SparseConvTranspose3d(3, 4, 2, 2, indice_key="up"),
            spconv.SparseInverseConv3d(4, 3, 2, indice_key="up"),
        ),
        spconv_tensor,
    ),
    "minkowski": (
        lambda: Of(
            lambda self, x: (lambda y: self.up(y) + self.cross(x))(self.down(x)),
            down=ME.MinkowskiConvolution(3, 4, (3, 2, 3), stride=2, dimension=3),
            up=ME.MinkowskiConvolutionTranspose(4, 2, 3, stride=2, bias=True, dimension=3),
            cross=ME.MinkowskiConvolution(
                3, 2, dimension=3, kernel_generator=ME.KernelGenerator(
                    3, 1, 2, region_type=ME.RegionType.HYPER_CROSS, dimension=3)),
        ),
        minkowski,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fold", [False, True], ids=["plain", "folded"])
@pytest.mark.parametrize("name", CASES)
def test_the_formula_of_the_page_computes_what_the_network_computes(
    name: str, fold: bool, tmp_path: Path
) -> None:
    make, tensor = CASES[name]
    net = trained(make())
    x, y = (tensor(*sweep(seed, channels=3)) for seed in range(2))
    export_onnx(net, x, tmp_path / "net.onnx", fold=fold)
    model = onnx.load(tmp_path / "net.onnx")
    evaluator = reference.ReferenceEvaluator(model, new_ops=[SparseConvolution, SparsePool])
    feats, coords = sweep(1, channels=3)
    given = dict(
        zip(
            (value.name for value in model.graph.input),
            (feats.numpy(), coords.numpy()),
            strict=True,
        )
    )
    outputs = dict(zip(evaluator.output_names, evaluator.run(None, given), strict=True))
    with torch.no_grad():
        expected = net(y)
    for place, value in enumerate(expected if isinstance(expected, tuple) else (expected,)):
        path = str(place) if isinstance(expected, tuple) else "output"
        right = next(getattr(value, n) for n in ("feats", "features", "F") if hasattr(value, n))
        found = torch.from_numpy(np.asarray(outputs[f"{path}.features"]))
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
        if f"{path}.indices" in outputs:
            sites = getattr(value, "indices", getattr(value, "coords", None))
            assert torch.equal(torch.from_numpy(outputs[f"{path}.indices"]), sites)
