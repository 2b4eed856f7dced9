"""A network runs while the annotations of every face, with shapes and dtypes, are checked.

The public functions and methods of ``ops``, ``coords``, ``kernel_map`` and ``nn`` are checked too.
"""

import ast
import importlib
import inspect
import pkgutil
import sys
import types
from typing import Any

import pytest
import torch

from tritonspconv import SparseTensor, coords, kernels, nn, ops
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import KernelMap, kernel_map, map_from_pairs
from tritonspconv.nn._conv import Conv
from tritonspconv.nn.chain import normalise
from tritonspconv.ops.batch_norm import train_norm
from tritonspconv.testing import random_sites

beartype = pytest.importorskip("beartype")
jaxtyping = pytest.importorskip("jaxtyping")

SUBM = ConvGeometry.submanifold((3, 3, 3), (1, 1, 1))
DOWN = ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))
HALVE = ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1))


def faces() -> list[types.ModuleType]:
    """Return every module that picks a back end."""
    names = [info.name for info in pkgutil.iter_modules(kernels.__path__)]
    found = [importlib.import_module(f"tritonspconv.kernels.{name}") for name in names]
    return [module for module in found if hasattr(module, "_back_end")]


def launchers(face: types.ModuleType) -> dict[str, Any]:
    """Return the public functions that a face defines."""
    return {
        name: value
        for name, value in vars(face).items()
        if inspect.isfunction(value) and value.__module__ == face.__name__ and name[0] != "_"
    }


def names_for_types(face: types.ModuleType) -> dict[str, Any]:
    """Return the face's names, with the names that it imports only for annotations."""
    names = dict(vars(face))
    for node in ast.parse(inspect.getsource(face)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            exec(compile(ast.Module(node.body, []), face.__name__, "exec"), names)
    for name, value in names.items():
        if getattr(value, "_is_protocol", False):  # cannot be checked at run time
            names[name] = object
    return names


def checked(face: types.ModuleType, launcher: Any) -> Any:
    """Return the launcher with checks of its arguments and its result against the annotations."""
    names = names_for_types(face)

    hints = {name: eval(hint, names) for name, hint in launcher.__annotations__.items()}
    signature = inspect.signature(launcher)
    parameters = [  # `self` has no annotation
        parameter.replace(annotation=hints.get(name, parameter.annotation))
        for name, parameter in signature.parameters.items()
    ]

    def call(*args, **kwargs):
        return launcher(*args, **kwargs)

    call.__name__ = call.__qualname__ = launcher.__name__
    call.__annotations__ = hints
    call.__signature__ = signature.replace(parameters=parameters, return_annotation=hints["return"])
    return jaxtyping.jaxtyped(typechecker=beartype.beartype)(call)


def shows_shapes(function: Any) -> bool:
    """Return whether any annotation of a function gives the shape of a tensor."""
    return any("[Tensor, " in str(hint) for hint in function.__annotations__.values())


def annotated_functions() -> dict[str, Any]:
    """Return the public functions of these packages whose annotations give shapes."""
    found = {}
    for package in (ops, coords, importlib.import_module("tritonspconv.kernel_map"), nn):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            found |= {
                f"{info.name}.{name}": function
                for name, function in launchers(module).items()
                if shows_shapes(function)
            }
    return found


def annotated_methods() -> dict[str, tuple[type, Any]]:
    """Return the public methods of these packages, each with its class."""
    return {
        f"{kind.__name__}.{name}": (kind, method)
        for kind in (ActiveSites, Grid, KernelMap, Conv, nn.ToDense)
        for name, method in vars(kind).items()
        if name[0] != "_"
        and inspect.isfunction(function := getattr(method, "__func__", method))
        and shows_shapes(function)
    }


@pytest.fixture
def called(monkeypatch) -> set[str]:
    """Check every launcher at every call; return the names of the launchers that were called."""
    seen = set()
    replaced = {}
    for face in faces():
        for name, launcher in launchers(face).items():
            replaced[launcher] = _counted(checked(face, launcher), f"{face.__name__}.{name}", seen)
    for name, function in annotated_functions().items():
        module = sys.modules[function.__module__]
        replaced[function] = _counted(checked(module, function), name, seen)
    for name, (kind, method) in annotated_methods().items():
        function = getattr(method, "__func__", method)
        call = _counted(checked(sys.modules[kind.__module__], function), name, seen)
        is_class_method = isinstance(method, classmethod)
        monkeypatch.setattr(kind, function.__name__, classmethod(call) if is_class_method else call)
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
    # Gradients of the weight alone, and of the features alone.
    kmap = kernel_map(sites, SUBM)
    weight = torch.randn(27, 5, 6, device=device, dtype=dtype, requires_grad=True)
    ops.sparse_conv(feats.detach(), weight, kmap).sum().backward()
    ops.sparse_conv(feats, weight.detach(), kmap).sum().backward()
    in_rows, out_rows, tap_ptr = kmap.pairs()
    listed = map_from_pairs(in_rows, out_rows, tap_ptr, kmap.n_in, kmap.n_out)
    assert listed.in_table.rows.shape == (27, kmap.n_in)
    sites.rows_of(sites.coords)
    coords.unique_rows(sites.grid.keys(sites.coords))
    matrix = torch.randn(5, 6, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.float16):
        ops.pointwise_conv(feats, matrix).sum().backward()
    # Wide layers of a GPU order columns. Without numba, inputs write tables on a GPU only.
    never = {
        "order_columns.order_columns",
        "compile_ahead.compile_ahead",
        "compile_ahead.maps_only",
    }
    if device.type == "cpu":
        never |= {"scatter_table.scatter_table", "scatter_table.scatters"}
    every = {f"{face.__name__}.{name}" for face in faces() for name in launchers(face)}
    missed = {name.removeprefix("tritonspconv.kernels.") for name in every - called}
    assert missed <= never


def test_public_functions_keep_their_annotations(device, called):
    sites = random_sites(60, extent=8, device=device)
    grid = sites.grid
    kmap = kernel_map(sites, DOWN)
    feats = torch.randn(60, 5, device=device, requires_grad=True)
    ops.sparse_pool(feats, kmap)
    ops.sparse_channelwise_conv(feats, torch.randn(27, 5, device=device), kmap)
    ops.pointwise_conv(feats, torch.randn(5, 3, device=device), torch.randn(3, device=device))
    pooled = ops.global_pool(feats, sites.coords[:, 0], grid.batch_size)
    ops.global_broadcast(pooled, sites.coords[:, 0])
    for channels_first in (True, False):
        dense = ops.to_dense(feats, sites, channels_first=channels_first)
        ops.from_dense(dense, channels_first=channels_first)
    ops.to_dense(sites.coords, sites)
    rows = torch.randint(-1, 60, (7, 2), device=device)
    gathered = ops.gather_weighted(feats, rows, torch.rand(7, 2, device=device))
    ops.scatter_weighted(gathered, rows, torch.rand(7, 2, device=device), 60)
    points = torch.rand(50, 4, device=device)
    samples = torch.randint(2, (50,), device=device)
    ops.voxelize(points, [0.2] * 3, [0.0] * 3 + [1.0] * 3, batch_index=samples)
    norm = ops.TrainingNorm(torch.zeros(5, device=device), torch.ones(5, device=device))
    train_norm(feats, norm, residual=feats.detach(), relu=True)
    sites.validate_bounds()
    sites.as_rows(feats)
    sites.rows_of(sites.coords.long())
    assert grid.contains(sites.coords).all()
    assert torch.equal(grid.coords(grid.keys(sites.coords)), sites.coords)
    unbounded = Grid.around(sites.coords)
    coords.unique_rows(unbounded.keys(sites.coords))
    twice, *_ = coords.unique_sites(sites.coords.repeat(2, 1), unbounded)
    some = coords.select_sites(twice, torch.arange(9, device=device))
    coords.union_sites([some, twice])
    coords.union_sites([some, twice], ascending=False)
    map_from_pairs(*kmap.pairs(), kmap.n_in, kmap.n_out)
    x = SparseTensor(feats, sites)
    layer = nn.SparseConv3d(5, 6, 3, 2, device=device)
    layer.forward_fused(x, None, relu=True)
    assert layer.residual_of(x, x) is None
    layer.fold_scale_shift(torch.ones(6, device=device), torch.ones(6, device=device))
    normalise(feats, None, relu=True, residual=feats)
    nn.ToDense()(layer(x))
    assert {*annotated_functions(), *annotated_methods()} <= called
    assert len(called) > 20


def test_a_wrong_shape_is_noticed(called):
    """The check of annotations finds a wrong shape."""
    with pytest.raises(jaxtyping.TypeCheckError):
        ops.gather_weighted(torch.ones(3, 2), torch.zeros(3, 1).long(), torch.ones(2, 1))
