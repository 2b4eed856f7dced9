"""The faces' annotations are true: a small network runs with every shape and dtype checked."""

import ast
import importlib
import inspect
import pkgutil
import sys
import types
from typing import Any

import pytest
import torch

from tritonspconv import kernels, ops
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import kernel_map, map_from_pairs
from tritonspconv.testing import random_sites

beartype = pytest.importorskip("beartype")
jaxtyping = pytest.importorskip("jaxtyping")

SUBM = ConvGeometry.submanifold((3, 3, 3), (1, 1, 1))
DOWN = ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))
HALVE = ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1))


def faces() -> list[types.ModuleType]:
    """Every module that picks a back end."""
    names = [info.name for info in pkgutil.iter_modules(kernels.__path__)]
    found = [importlib.import_module(f"tritonspconv.kernels.{name}") for name in names]
    return [module for module in found if hasattr(module, "_back_end")]


def launchers(face: types.ModuleType) -> dict[str, Any]:
    """The public functions that a face defines."""
    return {
        name: value
        for name, value in vars(face).items()
        if inspect.isfunction(value) and value.__module__ == face.__name__ and name[0] != "_"
    }


def names_for_types(face: types.ModuleType) -> dict[str, Any]:
    """The face's names with those that it imports for annotations alone."""
    names = dict(vars(face))
    for node in ast.parse(inspect.getsource(face)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            exec(compile(ast.Module(node.body, []), face.__name__, "exec"), names)
    for name, value in names.items():
        if getattr(value, "_is_protocol", False):  # cannot be checked at run time
            names[name] = object
    return names


def checked(face: types.ModuleType, launcher: Any) -> Any:
    """A launcher that checks its arguments and its result against its annotations."""
    names = names_for_types(face)

    hints = {name: eval(hint, names) for name, hint in launcher.__annotations__.items()}
    signature = inspect.signature(launcher)
    parameters = [
        parameter.replace(annotation=hints[name])
        for name, parameter in signature.parameters.items()
    ]

    def call(*args, **kwargs):
        return launcher(*args, **kwargs)

    call.__name__ = call.__qualname__ = launcher.__name__
    call.__annotations__ = hints
    call.__signature__ = signature.replace(parameters=parameters, return_annotation=hints["return"])
    return jaxtyping.jaxtyped(typechecker=beartype.beartype)(call)


@pytest.fixture
def called(monkeypatch) -> set[str]:
    """Have every launcher checked wherever it is called; return the names of those called."""
    seen = set()
    replaced = {}
    for face in faces():
        for name, launcher in launchers(face).items():
            replaced[launcher] = _counted(checked(face, launcher), f"{face.__name__}.{name}", seen)
    for module in [m for name, m in sys.modules.items() if name.startswith("tritonspconv.")]:
        for name, value in list(vars(module).items()):
            if inspect.isfunction(value) and value in replaced:
                monkeypatch.setattr(module, name, replaced[value])
    return seen


def _counted(function, name, seen):
    def call(*args, **kwargs):
        seen.add(name)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_shapes_and_dtypes_are_those_of_the_annotations(device, dtype, called):
    sites = random_sites(60, extent=8, repeats=2, device=device)
    feats = torch.randn(sites.num_rows, 5, device=device, dtype=dtype, requires_grad=True)
    for geometry in (SUBM, DOWN, HALVE):
        kmap = kernel_map(sites, geometry)
        weight = torch.randn(6, kmap.kernel_volume, 5, device=device, dtype=dtype).requires_grad_()
        bias = torch.randn(6, device=device, dtype=dtype, requires_grad=True)
        norm = ops.TrainingNorm(torch.zeros(6, device=device), torch.ones(6, device=device))
        out = ops.sparse_conv(feats, weight, kmap, bias, weight_layout="OVI", norm=norm, relu=True)
        pooled = [ops.sparse_pool(feats, kmap, mode) for mode in ("max", "avg", "sum")]
        shared = ops.sparse_pool(feats, kmap, "max", ties="all", floor=0.0)
        sample = sites.coords[:, 0]
        ends = [ops.global_pool(feats, sample, 2, mode) for mode in ("sum", "avg", "max")]
        sum(x.sum() for x in (out, shared, *pooled, *ends)).backward()
        with torch.no_grad():
            fixed = ops.ChannelNorm(*(torch.rand(6, device=device) for _ in range(2)))
            ops.sparse_conv(
                out.new_zeros(kmap.n_out, 6),
                weight.new_ones(kmap.kernel_volume, 6, 3),
                kmap.inverse(),
                norm=None,
            )
            ops.sparse_conv(feats, weight, kmap, weight_layout="OVI", norm=fixed, residual=out)
    # Weight alone, features alone.
    kmap = kernel_map(sites, SUBM)
    weight = torch.randn(27, 5, 6, device=device, dtype=dtype, requires_grad=True)
    ops.sparse_conv(feats.detach(), weight, kmap).sum().backward()
    ops.sparse_conv(feats, weight.detach(), kmap).sum().backward()
    in_rows, out_rows, tap_ptr = kmap.pairs()
    listed = map_from_pairs(in_rows, out_rows, tap_ptr, kmap.n_in, kmap.n_out)
    assert listed.in_table.rows.shape == (27, kmap.n_in)
    sites.rows_of(sites.coords)
    matrix = torch.randn(5, 6, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.float16):
        ops.pointwise_conv(feats, matrix).sum().backward()
    # Wide layers of a GPU order columns, and only there inputs write tables.
    never = {"order_columns.order_columns"}
    if device.type == "cpu":
        never |= {"scatter_table.scatter_table", "scatter_table.scatters"}
    every = {f"{face.__name__}.{name}" for face in faces() for name in launchers(face)}
    missed = {name.removeprefix("tritonspconv.kernels.") for name in every - called}
    assert missed <= never
