"""Ownership of memory: one test for each cell of the table in docs/migrating.md."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compat._libraries import library

PAGE = Path(__file__).parents[2] / "docs" / "migrating.md"
COORDS = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 3, 2]], dtype=torch.int32)
REPEATS = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 3, 2]], dtype=torch.int32)
FEATS = torch.tensor([[-1.0, 2.0], [3.0, -4.0], [5.0, 6.0]])


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        name: First cell of the row.
        action: Takes the library and returns its behaviour: shares, copies or writes.
        value: The expected behaviour.
        original: The original's behaviour if it differs; an exception if the original raises.
    """

    name: str
    action: Callable[[Any], str]
    value: str
    original: str | type[Exception] | None = None


def shares(first: Tensor, second: Tensor) -> str:
    """Return whether two tensors have the same memory."""
    return "shares" if first.data_ptr() == second.data_ptr() else "copies"


# MinkowskiEngine


def _me_tensor(ME: Any) -> Any:
    return ME.SparseTensor(FEATS.clone(), COORDS.clone())


def _me_made(mode: str, coords: Tensor) -> Callable[[Any], str]:
    def action(ME: Any) -> str:
        feats = FEATS.clone()
        mode_of = getattr(ME.SparseTensorQuantizationMode, mode)
        return shares(ME.SparseTensor(feats, coords.clone(), quantization_mode=mode_of).F, feats)

    return action


def _me_coordinates(ME: Any) -> str:
    coords = COORDS.clone()
    x = ME.SparseTensor(FEATS.clone(), coords)
    coords[0, 1] = 9
    known = x.coordinate_manager.get_coordinates(x.coordinate_map_key)
    return "shares" if 9 in x.C or 9 in known else "copies"


def _me_C(ME: Any) -> str:
    x = _me_tensor(ME)
    x.C[0, 1] = 9
    return "shares" if 9 in x.coordinate_manager.get_coordinates(x.coordinate_map_key) else "copies"


def _me_by_key(ME: Any) -> str:
    x, feats = _me_tensor(ME), FEATS.clone()
    manager = x.coordinate_manager
    made = ME.SparseTensor(
        feats, coordinate_map_key=x.coordinate_map_key, coordinate_manager=manager
    )
    return shares(made.F, feats)


def _me_field(ME: Any) -> str:
    feats = FEATS.clone()
    return shares(ME.TensorField(feats, COORDS.float()).F, feats)


def _me_field_by_key(ME: Any) -> str:
    x, feats = ME.TensorField(FEATS.clone(), COORDS.float()), FEATS.clone()
    key, manager = x.coordinate_field_map_key, x.coordinate_manager
    made = ME.TensorField(feats, coordinate_field_map_key=key, coordinate_manager=manager)
    return shares(made.F, feats)


def _me_field_points(ME: Any) -> str:
    points = COORDS.float()
    return shares(ME.TensorField(FEATS.clone(), points).C, points)


def _me_field_manager(ME: Any) -> str:
    points = COORDS.float()
    x = ME.TensorField(FEATS.clone(), points)
    points[0, 1] = 9
    known = x.coordinate_manager.get_coordinate_field(x.coordinate_field_map_key)
    known[1, 1] = 9
    again = x.coordinate_manager.get_coordinate_field(x.coordinate_field_map_key)
    return "shares" if 9 in again else "copies"


def _me_field_sparse(mode: str) -> Callable[[Any], str]:
    def action(ME: Any) -> str:
        mode_of = getattr(ME.SparseTensorQuantizationMode, mode)
        x = ME.TensorField(FEATS.clone(), COORDS.float(), quantization_mode=mode_of)
        return shares(x.sparse().F, x.F)

    return action


def _me_module(make: Callable[[Any], Any]) -> Callable[[Any], str]:
    def action(ME: Any) -> str:
        x = _me_tensor(ME)
        before = x.F.clone()
        out = make(ME)(x)
        same = shares(out if isinstance(out, Tensor) else out.F, x.F)
        return same if torch.equal(x.F, before) else f"writes, {same}"

    return action


def _me_leaf(ME: Any) -> str:
    leaf = FEATS.clone().requires_grad_()
    ME.MinkowskiReLU(inplace=True)(ME.SparseTensor(leaf, COORDS)).F.sum().backward()
    assert torch.equal(leaf.detach(), FEATS)
    assert leaf.grad is not None
    return f"copies, gradient {leaf.grad.int().flatten().tolist()}"


def _me_requires_grad(ME: Any) -> str:
    feats = FEATS.clone()
    x = ME.SparseTensor(feats, COORDS, requires_grad=True)
    assert x.F.requires_grad
    return "shares" if feats.requires_grad else "copies"


def _me_in_place(ME: Any) -> str:
    feats = FEATS.clone()
    x = ME.SparseTensor(feats, COORDS)
    own = x.F
    x += x
    assert torch.equal(x.F, 2 * FEATS)
    return f"writes, {shares(x.F, own)}" if torch.equal(feats, FEATS) else "writes the caller's"


def _me_division(ME: Any) -> str:
    before = x = _me_by_key_tensor(ME)
    x /= x
    assert torch.equal(before.F, FEATS)
    return shares(x.F, before.F)


def _me_by_key_tensor(ME: Any) -> Any:
    x = _me_tensor(ME)
    manager = x.coordinate_manager
    return ME.SparseTensor(
        FEATS.clone(), coordinate_map_key=x.coordinate_map_key, coordinate_manager=manager
    )


def _me_field_in_place(ME: Any) -> str:
    x = ME.TensorField(FEATS.clone(), COORDS.float())
    own = x.F
    x += x
    assert torch.equal(own, 2 * FEATS)
    return f"writes, {shares(x.F, own)}"


def _me_every_in_place(ME: Any) -> str:
    """Try every module that takes ``inplace``, but those that have cells of their own."""
    found = {}
    for name in dir(ME):
        kind = getattr(ME, name)
        module = getattr(kind, "MODULE", None)
        if module is None or "inplace" not in inspect.signature(module).parameters:
            continue
        options = {"threshold": 4.0, "value": 1.0} if name == "MinkowskiThreshold" else {}
        for x in (_me_tensor(ME), ME.TensorField(FEATS.clone(), COORDS.float())):
            torch.manual_seed(0)
            own, before = x.F, x.F.clone()
            out = kind(**options, inplace=True)(x)
            written = "" if torch.equal(own, before) else "writes, "
            found[name] = written + shares(out.F, own)
    assert len(found) > 12
    assert found.pop("MinkowskiAlphaDropout") == "copies"  # Torch's module copies.
    assert len(set(found.values())) == 1, found
    return found["MinkowskiReLU6"]


def _me_results(run: Callable[[Any, Any], list[Tensor]]) -> Callable[[Any], str]:
    """Return whether any of the results has memory of the features."""

    def action(ME: Any) -> str:
        field = ME.TensorField(FEATS.clone(), COORDS.float())
        x = field.sparse()
        return max(shares(out, y.F) for out in run(x, field) for y in (x, field))

    return action


def _me_functions(name: str) -> Callable[[Any], str]:
    return lambda ME: _me_results(lambda x, _: [getattr(ME, name)(x, x).F])(ME)


def _me_operator(ME: Any) -> str:
    x = _me_tensor(ME)
    return shares((x + x).F, x.F)


def _me_converted(name: str) -> Callable[[Any], str]:
    def action(ME: Any) -> str:
        x = _me_tensor(ME)
        own = x.F
        assert getattr(x, name)() is x
        return shares(x.F, own)

    return action


def _me_dense_input(name: str) -> Callable[[Any], str]:
    def action(ME: Any) -> str:
        dense = torch.ones(1, 1, 3, 3)
        getattr(ME, name)(dense).F.mul_(2)
        return "copies" if dense.max() == 1 else "shares"

    return action


MINKOWSKI = [
    Cell("SparseTensor(features, coordinates)", _me_made("RANDOM_SUBSAMPLE", COORDS), "copies"),
    Cell("... rows that repeat", _me_made("RANDOM_SUBSAMPLE", REPEATS), "copies"),
    Cell("... UNWEIGHTED_AVERAGE", _me_made("UNWEIGHTED_AVERAGE", COORDS), "copies"),
    Cell("... UNWEIGHTED_SUM", _me_made("UNWEIGHTED_SUM", COORDS), "copies"),
    Cell("... MAX_POOL", _me_made("MAX_POOL", COORDS), "copies", "shares"),
    Cell("... NO_QUANTIZATION", _me_made("NO_QUANTIZATION", COORDS), "shares"),
    Cell("... its coordinates", _me_coordinates, "copies"),
    Cell("... requires_grad=True", _me_requires_grad, "copies"),
    Cell("... a leaf, then MinkowskiReLU(inplace=True)", _me_leaf,
         "copies, gradient [0, 1, 1, 0, 1, 1]"),
    Cell("SparseTensor(features, coordinate_map_key, coordinate_manager)", _me_by_key, "shares"),
    Cell("SparseTensor.C and the manager", _me_C, "copies"),
    Cell("TensorField(features, coordinates)", _me_field, "shares"),
    Cell("... its coordinates, C", _me_field_points, "shares"),
    Cell("... its coordinates, in the manager", _me_field_manager, "copies"),
    Cell("TensorField(features, coordinate_field_map_key, coordinate_manager)", _me_field_by_key,
         "shares"),
    Cell("TensorField.sparse(), RANDOM_SUBSAMPLE", _me_field_sparse("RANDOM_SUBSAMPLE"), "copies"),
    Cell("TensorField.sparse(), UNWEIGHTED_AVERAGE", _me_field_sparse("UNWEIGHTED_AVERAGE"),
         "copies"),
    Cell("TensorField.sparse(), UNWEIGHTED_SUM", _me_field_sparse("UNWEIGHTED_SUM"), "copies"),
    Cell("TensorField.sparse(), MAX_POOL", _me_field_sparse("MAX_POOL"), "copies"),
    Cell("to_sparse", _me_dense_input("to_sparse"), "copies"),
    Cell("to_sparse_all", _me_dense_input("to_sparse_all"), "copies"),
    Cell("MinkowskiReLU()", _me_module(lambda ME: ME.MinkowskiReLU()), "copies"),
    Cell("MinkowskiReLU(inplace=True)", _me_module(lambda ME: ME.MinkowskiReLU(inplace=True)),
         "writes, shares"),
    Cell("MinkowskiLeakyReLU(inplace=True)",
         _me_module(lambda ME: ME.MinkowskiLeakyReLU(inplace=True)), "writes, shares"),
    Cell("every other module with inplace=True, but MinkowskiAlphaDropout", _me_every_in_place,
         "writes, shares"),
    Cell("MinkowskiDropout(p=1, inplace=True)",
         _me_module(lambda ME: ME.MinkowskiDropout(p=1.0, inplace=True)), "writes, shares"),
    Cell("MinkowskiDropout().eval()", _me_module(lambda ME: ME.MinkowskiDropout().eval()),
         "shares"),
    Cell("MinkowskiBatchNorm", _me_module(lambda ME: ME.MinkowskiBatchNorm(2)), "copies"),
    Cell("MinkowskiLinear", _me_module(lambda ME: ME.MinkowskiLinear(2, 2)), "copies"),
    Cell("MinkowskiConvolution(kernel_size=1)",
         _me_module(lambda ME: ME.MinkowskiConvolution(2, 2, kernel_size=1, dimension=2)),
         "copies"),
    Cell("MinkowskiPruning, every row stays",
         _me_module(lambda ME: lambda x: ME.MinkowskiPruning()(x, torch.ones(3).bool())), "copies"),
    Cell("MinkowskiUnion of one key",
         _me_module(lambda ME: lambda x: ME.MinkowskiUnion()(x, x)), "copies"),
    Cell("MinkowskiToFeature", _me_module(lambda ME: ME.MinkowskiToFeature()), "shares"),
    Cell("+ - * /", _me_operator, "copies"),
    Cell("+= -= *=", _me_in_place, "writes, shares"),
    Cell("/=", _me_division, "copies"),
    Cell("TensorField += -= *=", _me_field_in_place, "writes, shares"),
    *[Cell(f"ME.{name}", _me_functions(name), "copies") for name in ("cat", "sum", "mean", "var")],
    Cell("dense()", _me_results(lambda x, _: [x.dense()[0]]), "copies"),
    Cell("features_at, decomposed_features",
         _me_results(lambda x, _: [x.features_at(0), *x.decomposed_features]), "copies"),
    Cell("slice, cat_slice, interpolate",
         _me_results(lambda x, f: [x.slice(f).F, x.cat_slice(f).F, x.interpolate(f).F]),
         "copies"),
    Cell("float(), of float32", _me_converted("float"), "shares"),
    Cell("detach()", _me_converted("detach"), "shares"),
]  # fmt: skip


# spconv


def _sp_tensor(spconv: Any) -> Any:
    return spconv.SparseConvTensor(FEATS.clone(), COORDS.clone(), [4, 4], 1)


def _sp_features(spconv: Any) -> str:
    feats = FEATS.clone()
    return shares(spconv.SparseConvTensor(feats, COORDS.clone(), [4, 4], 1).features, feats)


def _sp_indices(spconv: Any) -> str:
    coords = COORDS.clone()
    return shares(spconv.SparseConvTensor(FEATS.clone(), coords, [4, 4], 1).indices, coords)


def _sp_replace(spconv: Any) -> str:
    x, feats = _sp_tensor(spconv), FEATS.clone()
    y = x.replace_feature(feats)
    assert shares(y.indices, x.indices) == "shares"
    assert y.indice_dict is x.indice_dict
    return shares(y.features, feats)


def _sp_shadow(spconv: Any) -> str:
    x = _sp_tensor(spconv)
    y = x.shadow_copy()
    assert shares(y.indices, x.indices) == "shares"
    return shares(y.features, x.features)


def _sp_from_dense(spconv: Any) -> str:
    dense = torch.ones(1, 4, 4, 2)
    spconv.SparseConvTensor.from_dense(dense).features.mul_(2)
    return "copies" if dense.max() == 1 else "shares"


def _sp_dense(spconv: Any) -> str:
    x = _sp_tensor(spconv)
    x.dense().mul_(2)
    return "copies" if torch.equal(x.features, FEATS) else "shares"


def _sp_module(make: Callable[[Any], Any], indices: str = "shares") -> Callable[[Any], str]:
    def action(spconv: Any) -> str:
        x = _sp_tensor(spconv)
        before = x.features.clone()
        out = make(spconv)(x)
        assert shares(out.indices, x.indices) == indices
        same = shares(out.features, x.features)
        return same if torch.equal(x.features, before) else f"writes, {same}"

    return action


def _sp_in_place_tensor(spconv: Any) -> str:
    x = _sp_tensor(spconv)
    first, own = x, x.features
    x += torch.ones(3, 2)
    assert torch.equal(x.features, FEATS + 1)
    assert torch.equal(first.features, FEATS)
    return shares(x.features, own)


def _sp_sparse_add(spconv: Any) -> str:
    first, second = _sp_tensor(spconv), _sp_tensor(spconv)
    total = importlib.import_module(f"{spconv.__name__}.functional").sparse_add(first, second)
    assert shares(total.features, first.features) == "copies"
    return shares(total.indices, first.indices)


def _sp_inverse(spconv: Any) -> str:
    x = _sp_tensor(spconv)
    down = spconv.SparseConv2d(2, 2, 3, indice_key="down")
    up = spconv.SparseInverseConv2d(2, 2, 3, indice_key="down")
    return shares(up(down(x)).indices, x.indices)


def _sp_sequential(*modules: nn.Module) -> Callable[[Any], str]:
    return _sp_module(lambda spconv: spconv.SparseSequential(*modules))


SPCONV = [
    Cell("SparseConvTensor(features, ...)", _sp_features, "shares"),
    Cell("SparseConvTensor(..., indices, ...)", _sp_indices, "shares"),
    Cell("SparseConvTensor.from_dense", _sp_from_dense, "copies"),
    Cell("SparseConvTensor.dense", _sp_dense, "copies"),
    Cell("replace_feature: features, indices, indice_dict", _sp_replace, "shares"),
    Cell("shadow_copy", _sp_shadow, "shares"),
    Cell("SubMConv2d", _sp_module(lambda spconv: spconv.SubMConv2d(2, 2, 3)), "copies"),
    Cell("SubMConv2d, one tap", _sp_module(lambda spconv: spconv.SubMConv2d(2, 2, 1)), "copies"),
    Cell("SparseConv2d", _sp_module(lambda spconv: spconv.SparseConv2d(2, 2, 3), "copies"),
         "copies"),
    Cell("SparseMaxPool2d", _sp_module(lambda spconv: spconv.SparseMaxPool2d(2), "copies"),
         "copies"),
    Cell("SparseInverseConv2d: the indices of the first input", _sp_inverse, "shares"),
    Cell("Identity", _sp_module(lambda spconv: spconv.Identity()), "shares"),
    Cell("SparseSequential(BatchNorm1d)", _sp_sequential(nn.BatchNorm1d(2)), "copies"),
    Cell("SparseSequential(ReLU())", _sp_sequential(nn.ReLU()), "copies"),
    Cell("SparseSequential(ReLU(inplace=True))", _sp_sequential(nn.ReLU(inplace=True)),
         "writes, shares"),
    Cell("SparseReLU(inplace=True)",
         _sp_module(lambda spconv: spconv.SparseReLU(inplace=True)), "writes, shares"),
    Cell("AddTable", _sp_module(lambda spconv: lambda x: spconv.AddTable()([x, x])), "copies"),
    Cell("JoinTable", _sp_module(lambda spconv: lambda x: spconv.JoinTable()([x, x])), "copies"),
    Cell("functional.sparse_add of equal sites: the indices", _sp_sparse_add, "shares", "copies"),
    Cell("x + tensor", _sp_module(lambda spconv: lambda x: x + torch.ones(3, 2)), "copies"),
    Cell("x += tensor", _sp_in_place_tensor, "copies", ValueError),
]  # fmt: skip

TABLES = {"MinkowskiEngine": MINKOWSKI, "spconv": SPCONV}


def _parameters() -> list[Any]:
    return [
        pytest.param(original, which, cell, id=f"{original}-{which}-{number}")
        for original, cells in TABLES.items()
        for number, cell in enumerate(cells)
        for which in ("adapter", "original")
    ]


@pytest.mark.parametrize(("original", "which", "cell"), _parameters())
def test_cell(original: str, which: str, cell: Cell):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = library(original, which)
        expected = cell.value if which == "adapter" or cell.original is None else cell.original
        if isinstance(expected, str):
            assert cell.action(module) == expected
        else:
            with pytest.raises(expected):
                cell.action(module)


@pytest.mark.parametrize("original", TABLES)
def test_the_page_has_every_cell(original: str):
    text = PAGE.read_text()
    section = text.split("## Who owns memory")[1].split("\n## ")[0].split(f"| {original} |")[1]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", section.split("\n\n")[0], re.MULTILINE)
    shown = {first.replace("`", ""): second for first, second in rows if first != "---"}
    expected = {}
    for cell in TABLES[original]:
        value = cell.value.partition(", gradient")[0]
        if cell.original is not None:
            does = cell.original if isinstance(cell.original, str) else "raises"
            value += f" (the original {does})"
        expected[cell.name] = value
    assert shown == expected
