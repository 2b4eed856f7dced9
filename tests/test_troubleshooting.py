"""Entries of the troubleshooting page have errors, and errors that name an entry have one."""

import ast
import contextlib
import json
import re
import sys
import types
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import compat
import compat.minkowski as ME
import compat.spconv.pytorch as spconv
import tritonspconv as ts
import tritonspconv.compat as second_spelling
from compat.spconv.checkpoint import read_checkpoint
from compat.spconv.pytorch import _traced, tables
from tests._process import ROOT
from tritonspconv import guide, kernels, ops
from tritonspconv.cli import main
from tritonspconv.cli.convert import convert_by_shape
from tritonspconv.coords import Grid
from tritonspconv.ops import registered
from tritonspconv.points import parse_columns, read_scan

COORDS = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3], [0, 3, 3, 3]], dtype=torch.int32)
FEATS = torch.ones(3, 2)
SHAPE = [4, 4, 4]


def engine(coords=COORDS, **options):
    return ts.SparseTensor(FEATS, coords, spatial_shape=SHAPE, batch_size=1, **options)


def sparse(shape=SHAPE, coords=COORDS):
    return spconv.SparseConvTensor(FEATS, coords, shape, 1)


def minkowski(coords=COORDS, **options):
    return ME.SparseTensor(FEATS, coords, **options)


def captured():
    net = spconv.SparseSequential(spconv.SubMConv3d(2, 2, 3), nn.ReLU()).eval()
    with torch.no_grad():
        return net, ts.capture(net, sparse(), capacities=[3])


def call_captured(change):
    net, fast = captured()
    with torch.no_grad():
        fast(change(net))


def keyed(*layers):
    spconv.SparseSequential(*layers)(sparse())


def subm(**options):
    return spconv.SubMConv3d(2, 2, **{"kernel_size": 3, "indice_key": "a", **options})


def down():
    return spconv.SparseConv3d(2, 2, 3, 2, 1, indice_key="a")


def install_late(patch):
    patch.setitem(sys.modules, "spconv", types.ModuleType("spconv"))
    compat.install("spconv")


def hidden(patch, loaded):
    patch.setattr(second_spelling, "foreign_module", lambda: "compat.py")
    patch.setattr(second_spelling, "ADAPTERS", Path("nowhere"))
    if not loaded:
        patch.delitem(sys.modules, "compat")
    with contextlib.suppress(ImportError) if not loaded else contextlib.nullcontext():
        second_spelling._claim_name()


def forward_mode():
    with torch.autograd.forward_ad.dual_level():
        subm(indice_key=None)(sparse())


def converted():
    found = ts.ops.sparse_conv(
        torch.ones(3, 2, requires_grad=True),
        torch.ones(27, 2, 2, dtype=torch.float64),
        ts.kernel_map(engine().sites, ts.ConvGeometry.submanifold((3, 3, 3), (1, 1, 1))),
    )
    torch.autograd.grad(found.sum(), found.grad_fn.next_functions[0][0].variable, create_graph=True)


def edited(patch):
    patch.setattr(_traced, "is_lowered", lambda: False)  # it would import all of inductor
    indices = COORDS.clone()
    indices[0, 0] = 0
    _traced._refuse_edits(indices)


def scan(patch, values, name="scan.bin", columns=None):
    folder = patch.folder
    np.asarray(values, np.float32).tofile(folder / name)
    read_scan(folder / name, columns)


def table(patch):
    named = np.zeros(5, [(name, "f4") for name in "xyz"])
    np.save(patch.folder / "scan.npy", named)
    read_scan(patch.folder / "scan.npy", parse_columns("x,y,z,ring"))


def pickled(patch):
    torch.save({"a": nn.Linear(1, 1)}, patch.folder / "a.pth")
    read_checkpoint(patch.folder / "a.pth")


def convert(shape, layouts, layout=None):
    convert_by_shape({"a": torch.zeros(shape)}, {"a": layouts}, layout, "meaning")


def out_of_memory(patch):
    def run(args):
        raise torch.cuda.OutOfMemoryError("no room")

    patch.setattr("tritonspconv.cli.explain.run", run)
    main(["explain"])


def old_gpu(patch):
    patch.setattr(torch.version, "hip", None)
    patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    kernels.has_triton.__wrapped__(torch.device("cuda"))


def broken_numba(patch):
    def fail(name):
        raise ImportError("numpy is too new")

    patch.setattr(kernels.importlib, "import_module", fail)
    patch.delenv(kernels.NUMBA_VARIABLE, raising=False)
    kernels.has_numba.__wrapped__(torch.device("cpu"))


def export_onnx():
    pytest.importorskip("onnx", reason="onnx is not installed")
    net = spconv.SparseSequential(subm(), nn.Softmax(dim=0)).eval()
    ts.export_onnx(net, (sparse(),), "net.onnx")


def export_program():
    class Counts(nn.Module):
        def forward(self, x):
            return x.features.sum().item()

    ts.export_program(Counts().eval(), (sparse(),))


def rows_outside():
    coords = COORDS.clone()
    coords[2, 3] = 4
    engine(coords, check="full")


CASES = {
    "int32-coords": [
        lambda: engine(COORDS.long()),
        lambda: sparse(coords=COORDS.long()),
        lambda: ME.CoordinateManager(D=3).insert_and_map(COORDS.float(), [1, 1, 1]),
    ],
    "sparse-input": [
        lambda: ts.nn.SubMConv3d(2, 2, 3)(FEATS),
        lambda: subm()(FEATS),
        lambda: ME.MinkowskiConvolution(2, 2, 3, dimension=3)(FEATS),
        lambda: ME.MinkowskiMaxPooling(2, 2, dimension=3)(FEATS),
    ],
    "same-sites": [
        lambda: engine() + engine(),
        lambda: ts.cat([engine(), engine()]),
        lambda: ME.cat(minkowski(), minkowski()),
        lambda: ME.cat(x := minkowski(), ME.MinkowskiMaxPooling(2, 2, dimension=3)(x)),
        lambda: minkowski().__iadd__(minkowski()),
        lambda: (x := minkowski()).__iadd__(ME.MinkowskiMaxPooling(2, 2, dimension=3)(x)),
        lambda: tables.AddTable()([sparse(), sparse([5, 5, 5])]),
    ],
    "outside-grid": [rows_outside],
    "repeated-coords": [
        lambda: engine(torch.zeros_like(COORDS), check="full"),
        lambda: minkowski(
            torch.zeros_like(COORDS),
            quantization_mode=ME.SparseTensorQuantizationMode.NO_QUANTIZATION,
        ),
    ],
    "too-many-cells": [
        lambda: Grid((0, 0, 0), (2**21, 2**21, 2**21), 1),
        lambda: sparse([2**21, 2**21, 2**21]).spatial_size and subm()(sparse([2**21] * 3)),
    ],
    "small-grid": [
        lambda: spconv.SparseConv3d(2, 2, 5)(sparse()),
        lambda: ts.nn.SparseConv3d(2, 2, 5)(engine()),
    ],
    "points-vanish": [
        lambda: spconv.SparseConv3d(2, 2, 2, 4)(sparse([9, 9, 9], COORDS * 0 + COORDS[2:] * 2))
    ],
    "indice-key": [
        lambda: keyed(subm(), subm(kernel_size=5)),
        lambda: keyed(subm(), down()),
        lambda: keyed(subm(), spconv.SparseInverseConv3d(2, 2, 3, indice_key="b")),
        lambda: keyed(subm(), spconv.SparseInverseConv3d(2, 2, 3, indice_key="a")),
        lambda: keyed(down(), subm()),
    ],
    "late-install": [install_late],
    "hidden-compat": [lambda patch: hidden(patch, True), lambda patch: hidden(patch, False)],
    "cannot-record": [
        lambda: torch.jit.trace(lambda feats: subm()(sparse()).features, FEATS),
        lambda: torch.jit.script(subm()),
        lambda: torch.func.vmap(lambda feats: ops.sparse_conv(feats, feats, None))(FEATS),
        forward_mode,
        registered.refuse_second_order,
    ],
    "edited-indices": [edited],
    "second-order": [converted],
    "padded-rows": [
        lambda: ts.capture(lambda x: subm()(x).features.mean(0), sparse()),
        lambda: ts.capture(lambda f, c: ts.SparseTensor(f, c).feats, FEATS, COORDS, coords=1),
    ],
    "over-capacity": [
        lambda: call_captured(
            lambda net: spconv.SparseConvTensor(
                torch.ones(4, 2), torch.cat([COORDS, COORDS[:1] + 1]), SHAPE, 1
            )
        )
    ],
    "capture-again": [
        lambda: call_captured(lambda net: net.train() and sparse()),
        lambda: call_captured(lambda net: net.double().float() and sparse()),
        lambda: call_captured(lambda net: FEATS),
        lambda: call_captured(lambda net: sparse([5, 5, 5])),
    ],
    "onnx": [export_onnx],
    "export-program": [export_program],
    "scan-layout": [
        lambda patch: scan(patch, np.random.default_rng(0).uniform(size=(60, 9)) * np.arange(9)),
        lambda patch: scan(patch, np.ones(60)),
        lambda patch: scan(patch, np.ones(11)),
        lambda patch: scan(patch, np.ones(15), columns=("x", "y", "z", "i")),
        lambda: parse_columns("x,y"),
        table,
    ],
    "checkpoint-layout": [
        lambda: convert((3, 3, 3, 3, 3), ["KRSC", "RSCK"]),
        lambda: convert((3, 3, 3, 3, 3), []),
        lambda: convert((3, 3, 3, 3, 3), ["KRSC"], "RSCK"),
    ],
    "trust-pickle": [pickled],
    "out-of-memory": [out_of_memory],
    "old-gpu": [old_gpu],
    "broken-numba": [broken_numba],
}  # fmt: skip


@pytest.fixture
def patch(monkeypatch, tmp_path):
    monkeypatch.folder = tmp_path
    return monkeypatch


def told(case, patch, capsys) -> str:
    """Return what a mistake is answered with: an error, a warning, or a line of the command."""
    arguments = (patch,) if case.__code__.co_argcount else ()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            case(*arguments)
        except Exception as error:
            return str(error)
    ours = [str(warning.message) for warning in seen if "More: " in str(warning.message)]
    return ours[0] if ours else capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", CASES)
def test_errors_name_the_entry_that_quotes_them(entry, patch, capsys):
    messages = []
    for case in CASES[entry]:
        with patch.context() as inner:
            inner.folder = patch.folder
            messages.append(told(case, inner, capsys).strip())
    for message in messages:
        assert message.endswith(f"More: tritonspconv explain {entry}")
        assert message.count("More: ") == 1, message
    (first,) = re.match(r"(.+?)\n\n", guide.entries()[entry], re.DOTALL).groups()
    quotes = re.findall(r"`([^`]+)`", " ".join(first.split()))
    assert [message for message in messages if not any(quote in message for quote in quotes)] == []
    assert [quote for quote in quotes if not any(quote in message for message in messages)] == []


def test_every_entry_has_an_error_and_every_name_in_the_code_an_entry():
    files = [*ROOT.glob("tritonspconv/**/*.py"), *ROOT.glob("compat/**/*.py")]
    calls = [
        node
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "more"
    ]
    assert {ast.literal_eval(call.args[0]) for call in calls} == set(CASES)
    assert list(guide.entries()) == list(CASES)


def test_a_wheel_holds_the_page():
    # In the repository the package has a link to the page; a build follows the link.
    assert guide.PAGE.resolve() == ROOT / "docs" / "troubleshooting.md"


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        (
            ["Documentation, https://docs.example/ts/"],
            "https://docs.example/ts/troubleshooting/#onnx",
        ),
        (["Source, https://code.example"], "tritonspconv explain onnx"),
        (None, "tritonspconv explain onnx"),
    ],
)
def test_the_line_follows_the_metadata(urls, expected, monkeypatch):
    def read(name):
        if urls is None:
            raise metadata.PackageNotFoundError(name)
        return types.SimpleNamespace(get_all=lambda key: urls)

    monkeypatch.setattr(guide.metadata, "metadata", read)
    assert guide.more("onnx") == f"\nMore: {expected}"


def test_words_are_put_before_the_line():
    message = f"No.{guide.more('onnx')}"
    assert guide.longer(message, "Yes.") == f"No. Yes.{guide.more('onnx')}"
    assert guide.longer("No.", "Yes.") == "No. Yes."
    assert guide.entry_of(message) == "onnx"
    assert guide.entry_of("No.") is None
    assert guide.without_more(message) == guide.without_more("No.") == "No."


def test_explain(capsys):
    assert main(["explain"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(CASES)
    assert main(["explain", "scan-layout", "--json", "-"]) == 0
    shown = capsys.readouterr()
    assert "See your own scans (docs/files.md)." in shown.err
    assert list(json.loads(shown.out)) == ["scan-layout"]
    assert main(["explain", "scan-layuot"]) == 2
    assert "no entry 'scan-layuot'. Did you mean scan-layout?" in capsys.readouterr().err
