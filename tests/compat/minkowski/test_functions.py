"""The original's autograd functions, as attributes of its layers, and its private methods.

Every call is made on the adapter and, where it is installed, on the original.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import warnings
from typing import Any

import pytest
import torch

import compat.minkowski
from tests.compat._libraries import library

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.sparse.SparseTensor"),
]

COORDS = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 3, 2], [0, 4, 1]], dtype=torch.int32)
FEATS = torch.arange(1.0, 9, dtype=torch.float64).view(4, 2)


@pytest.fixture(params=["adapter", "original"])
def ME(request: pytest.FixtureRequest) -> Any:
    """Return the adapter's module, then the original's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library("MinkowskiEngine", request.param)


def tensor(ME: Any, coords: torch.Tensor = COORDS) -> Any:
    """Return a tensor whose features require a gradient."""
    return ME.SparseTensor(FEATS[: len(coords)].clone(), coords.clone(), requires_grad=True)


def by_site(manager: Any, key: Any, feats: torch.Tensor) -> dict[tuple[int, ...], list[float]]:
    """Return the features by coordinate, because the original's rows come in hash order."""
    coords = manager.get_coordinates(key).tolist()
    return {tuple(c): f for c, f in zip(coords, feats.tolist(), strict=True)}


LAYERS = {
    "conv": ("MinkowskiConvolutionFunction", lambda ME: ME.MinkowskiConvolution(
        2, 3, kernel_size=3, stride=2, bias=True, dimension=2)),
    "conv-transpose": ("MinkowskiConvolutionTransposeFunction",
        lambda ME: ME.MinkowskiConvolutionTranspose(2, 3, kernel_size=2, stride=2, dimension=2)),
    "generative": ("MinkowskiConvolutionTransposeFunction",
        lambda ME: ME.MinkowskiGenerativeConvolutionTranspose(
            2, 3, kernel_size=2, stride=2, dimension=2)),
    "avg-pool": ("MinkowskiLocalPoolingFunction",
        lambda ME: ME.MinkowskiAvgPooling(3, 2, dimension=2)),
    "max-pool": ("MinkowskiLocalPoolingFunction",
        lambda ME: ME.MinkowskiMaxPooling(2, 2, dimension=2)),
    "unpool": ("MinkowskiLocalPoolingTransposeFunction",
        lambda ME: ME.MinkowskiPoolingTranspose(2, 2, dimension=2)),
    "global-pool": ("MinkowskiGlobalPoolingFunction", lambda ME: ME.MinkowskiGlobalMaxPooling()),
    "pruning": ("MinkowskiPruningFunction", lambda ME: ME.MinkowskiPruning()),
    "union": ("MinkowskiUnionFunction", lambda ME: ME.MinkowskiUnion()),
    "broadcast": ("MinkowskiBroadcastFunction", lambda ME: ME.MinkowskiBroadcastAddition()),
    "interpolation": ("MinkowskiInterpolationFunction", lambda ME: ME.MinkowskiInterpolation()),
    "instance-norm": ("MinkowskiInstanceNormFunction", lambda ME: ME.MinkowskiInstanceNorm(2)),
}  # fmt: skip
ATTRIBUTES = {
    "conv": "conv", "conv-transpose": "conv", "generative": "conv",
    "avg-pool": "pooling", "max-pool": "pooling", "unpool": "pooling", "global-pool": "pooling",
    "pruning": "pruning", "union": "union", "broadcast": "broadcast", "interpolation": "interp",
    "instance-norm": "inst_norm",
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_keep_their_function(ME, name):
    function, make = LAYERS[name]
    held = getattr(make(ME), ATTRIBUTES[name])
    assert type(held).__name__ == function
    assert callable(held.apply)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_calls_the_function_that_takes_the_place_of_its_own(ME, name):
    """If a subclass or a user sets ``layer.conv``, the layer returns that function's result."""
    layer = LAYERS[name][1](ME).double()
    attribute = ATTRIBUTES[name]
    own, calls = getattr(layer, attribute), []

    class Function:
        def apply(self, *arguments):
            calls.append(arguments)
            return own.apply(*arguments)

    x = tensor(ME)
    coarse = ME.MinkowskiSumPooling(2, 2, dimension=2)(x)
    inputs = {
        "pruning": (x, torch.tensor([True, False, True, True])),
        "union": (x, coarse),
        "broadcast": (x, ME.MinkowskiGlobalSumPooling()(x)),
        "interpolation": (x, torch.tensor([[0, 0.5, 0]], dtype=torch.float64)),
        "conv-transpose": (coarse,), "generative": (coarse,), "unpool": (coarse,),
    }.get(name, (x,))  # fmt: skip
    expected = layer(*inputs)
    setattr(layer, attribute, Function())
    # The original makes a map once for each manager; the adapter finds its map again.
    result = layer(*inputs) if name != "union" else None
    if name == "union":
        result = layer(x, coarse) if ME is compat.minkowski else expected
        calls = calls or [()]
    assert len(calls) == 1
    got, wanted = (r if isinstance(r, torch.Tensor) else r.F for r in (result, expected))
    if name == "pruning":
        got, wanted = got.sort(0)[0], wanted.sort(0)[0]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("pruning", "union")])
def test_a_patched_apply_is_refused(name):
    """These layers do not call their own function, so a patch of it would do nothing."""
    held = getattr(LAYERS[name][1](compat.minkowski), ATTRIBUTES[name])
    with pytest.raises(AttributeError):
        held.apply = print


@pytest.mark.parametrize("name", ["pruning", "union"])
def test_a_patched_apply_is_called(name):
    layer, calls = LAYERS[name][1](compat.minkowski), []
    held, x = getattr(layer, ATTRIBUTES[name]), tensor(compat.minkowski)
    own = held.apply
    held.apply = lambda *arguments: calls.append(arguments) or own(*arguments)
    layer(x, torch.ones(4).bool() if name == "pruning" else x)
    assert len(calls) == 1


def test_subclasses_call_the_function_themselves(ME):
    """Downstream layers change a convolution in this way."""

    class Doubled(ME.MinkowskiConvolution):
        def forward(self, input):
            out_key = ME.CoordinateMapKey(input.coordinate_map_key.get_coordinate_size())
            out = self.conv.apply(
                input.F, 2 * self.kernel, self.kernel_generator, self.convolution_mode,
                input.coordinate_map_key, out_key, input._manager,
            )  # fmt: skip
            return ME.SparseTensor(
                out, coordinate_map_key=out_key, coordinate_manager=input._manager
            )

    torch.manual_seed(0)
    layer = Doubled(2, 3, kernel_size=3, stride=2, dimension=2).double()
    x = tensor(ME)
    expected = ME.MinkowskiConvolution.forward(layer, x)
    result = layer(x)
    assert result.coordinate_map_key == expected.coordinate_map_key
    torch.testing.assert_close(result.F, 2 * expected.F)


def test_the_output_key_may_be_none(ME):
    x = tensor(ME)
    manager, key = x.coordinate_manager, x.coordinate_map_key
    torch.manual_seed(0)
    conv = LAYERS["conv"][1](ME).double()
    arguments = (x.F, conv.kernel, conv.kernel_generator, conv.convolution_mode, key)
    expected = conv(x).F - conv.bias
    torch.testing.assert_close(conv.conv.apply(*arguments, None, manager), expected)
    window = ME.KernelGenerator(2, 2, dimension=2)
    mode = ME.PoolingMode.LOCAL_SUM_POOLING
    pooled = ME.MinkowskiSumPooling(2, 2, dimension=2)(x)
    down = ME.MinkowskiLocalPoolingFunction().apply(x.F, mode, window, key, None, manager)
    torch.testing.assert_close(down, pooled.F)
    up = ME.MinkowskiLocalPoolingTransposeFunction().apply(
        pooled.F, mode, window, pooled.coordinate_map_key, None, manager
    )
    torch.testing.assert_close(up, ME.MinkowskiPoolingTranspose(2, 2, dimension=2)(pooled).F)
    total = ME.PoolingMode.GLOBAL_SUM_POOLING_PYTORCH_INDEX
    samples = ME.MinkowskiGlobalPoolingFunction().apply(x.F, total, key, None, manager)
    assert sorted(samples.tolist()) == [[5, 6], [11, 14]]


@pytest.mark.parametrize(
    "name",
    ["ConvolutionFunction", "ConvolutionTransposeFunction", "LocalPoolingFunction",
     "LocalPoolingTransposeFunction", "GlobalPoolingFunction", "PruningFunction",
     "InterpolationFunction", "SPMMFunction", "SPMMAverageFunction", "UnionFunction",
     "BroadcastFunction", "InstanceNormFunction", "DirectMaxPoolingFunction"],
)  # fmt: skip
def test_functions_have_the_originals_arguments(name):
    for module in ("MinkowskiConvolution", "MinkowskiPooling", "MinkowskiPruning",
                   "MinkowskiInterpolation", "sparse_matrix_functions", "MinkowskiUnion",
                   "MinkowskiBroadcast", "MinkowskiNormalization"):  # fmt: skip
        library("MinkowskiEngine", "original")
        # The original's folder is on the path. By the package's name, modules would hide classes.
        found = vars(importlib.import_module(module))
        if f"Minkowski{name}" in found:
            forward = found[f"Minkowski{name}"].forward
            expected = list(inspect.signature(forward).parameters.values())[1:]
            ours = importlib.import_module(f"compat.minkowski.{module}")
            own = inspect.signature(getattr(ours, f"Minkowski{name}").apply).parameters.values()
            assert [p.name for p in own] == [p.name for p in expected]
            assert [p.default for p in own] == [p.default for p in expected]
            return
    raise AssertionError(f"the original has no Minkowski{name}")


def test_functions_say_that_a_manager_is_missing(device):
    x = tensor(compat.minkowski)
    key, conv = x.coordinate_map_key, LAYERS["conv"][1](compat.minkowski)
    with pytest.raises(RuntimeError, match=r"ConvolutionFunction\.apply: coordinate_manager"):
        conv.conv.apply(x.F, conv.kernel, conv.kernel_generator, conv.convolution_mode, key)
    with pytest.raises(RuntimeError, match=r"MinkowskiPruningFunction\.apply: coordinate_manager"):
        compat.minkowski.MinkowskiPruningFunction.apply(x.F, torch.ones(4).bool(), key)


@pytest.mark.parametrize("mask", [[True, False, True, True], [False] * 4], ids=["some", "none"])
def test_pruning_takes_the_key_that_it_set(mask, device):
    """The original's unit test checks gradients with the key of the module's output."""
    ME = compat.minkowski
    x, mask = tensor(ME), torch.tensor(mask)
    kept = ME.MinkowskiPruning()(x, mask)
    key, out_key, manager = x.coordinate_map_key, kept.coordinate_map_key, x.coordinate_manager
    apply = ME.MinkowskiPruningFunction().apply
    assert torch.equal(apply(x.F, mask, key, out_key, manager), x.F[mask])
    function = ME.MinkowskiPruningFunction()
    gradcheck = importlib.import_module("compat.minkowski.utils.gradcheck").gradcheck
    assert gradcheck(function, (x.F, mask, key, out_key, manager))
    with pytest.raises(RuntimeError, match="Pass a key that is not set"):
        apply(x.F, ~mask, key, out_key, manager)


def test_pruning_with_a_set_key_as_the_original(ME):
    x, mask = tensor(ME), torch.tensor([True, False, True, True])
    kept = ME.MinkowskiPruning()(x, mask)
    feats = ME.MinkowskiPruningFunction().apply(
        x.F, mask, x.coordinate_map_key, kept.coordinate_map_key, x.coordinate_manager
    )
    assert by_site(x.coordinate_manager, kept.coordinate_map_key, feats) == {
        (0, 0, 0): [1, 2], (1, 3, 2): [5, 6], (0, 4, 1): [7, 8],
    }  # fmt: skip


@pytest.mark.parametrize("as_type", [torch.Tensor.int, torch.Tensor.long, torch.Tensor.float])
def test_sparse_products_take_rows_of_any_type(ME, as_type):
    rows, cols = (as_type(torch.tensor(x)) for x in ([0, 0, 1, 1], [0, 1, 2, 3]))
    values = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    matrix = torch.arange(12.0, dtype=torch.float64).view(4, 3).requires_grad_()
    result = ME.MinkowskiSPMMFunction().apply(rows, cols, values, [2, 4], matrix)
    assert result.tolist() == [[6, 9, 12], [54, 61, 68]]
    result.sum().backward()
    assert matrix.grad.tolist() == [[1] * 3, [2] * 3, [3] * 3, [4] * 3]
    average = ME.MinkowskiSPMMAverageFunction().apply(rows, cols, [2, 4], matrix)
    assert average.tolist() == [[1.5, 2.5, 3.5], [7.5, 8.5, 9.5]]


def test_sparse_products_take_a_column_of_values():
    ME = compat.minkowski
    values, matrix = torch.tensor([[2.0], [3.0]]), torch.ones(2, 3)
    rows = torch.tensor([0, 1])
    assert ME.spmm(rows, rows, values, [2, 2], matrix).tolist() == [[2] * 3, [3] * 3]
    with pytest.raises(AssertionError, match=r"got shapes \[2\], \[2\] and \[2, 3\]"):
        ME.spmm(rows, rows, matrix, [2, 2], matrix)


def test_names_that_the_module_of_sparse_tensors_imports(ME):
    package = "compat.minkowski." if ME is compat.minkowski else ""
    module = importlib.import_module(f"{package}MinkowskiSparseTensor")
    for name in ("MinkowskiSPMMFunction", "MinkowskiSPMMAverageFunction"):
        assert getattr(module, name).__name__ == name


def test_initialize_coordinates(ME):
    x = tensor(ME)
    coords = torch.tensor([[0, 6, 0], [0, 2, 2], [0, 6, 0]], dtype=torch.int32)
    wanted = ME.CoordinateMapKey([2, 2], "own")
    coordinates, feats, key = x.initialize_coordinates(coords, FEATS[:3], wanted)
    assert coordinates.tolist() == coords[:2].tolist()
    assert feats.tolist() == FEATS[:2].tolist()
    assert key == wanted
    assert x.unique_index.tolist() == [0, 1]
    assert x.inverse_mapping.tolist() == [0, 1, 0]
    assert x.coordinate_manager.size(key) == 2


def test_binary_functor(ME):
    x = tensor(ME)
    twice_off = x._binary_functor(x, lambda a, b: a - 2 * b)
    assert torch.equal(twice_off.F, -x.F)
    assert torch.equal(x._binary_functor(torch.ones(4, 2), lambda a, b: a + b).F, x.F + 1)
    coarse = ME.MinkowskiSumPooling(2, 2, dimension=2)(x)
    both = x._binary_functor(coarse, lambda a, b: a + b)
    expected = x + coarse if ME is compat.minkowski else both
    assert both.coordinate_map_key == expected.coordinate_map_key
    with pytest.raises(AssertionError):
        x._binary_functor("2", lambda a, b: a)


def test_points_of_a_field(ME):
    field = ME.TensorField(FEATS.clone(), COORDS.double())
    assert field._get_coordinate_field().tolist() == COORDS.tolist()
    assert not hasattr(field, "unique_index")


def test_first_points_of_a_fields_cells():
    coords = torch.cat([COORDS, COORDS[1:2]]).double()
    field = compat.minkowski.TensorField(torch.ones(5, 1), coords)
    field.sparse()
    assert field.unique_index.tolist() == [0, 1, 2, 3]


def test_the_compiled_managers_methods(ME):
    x = tensor(ME)
    manager, key = x.coordinate_manager._manager, x.coordinate_map_key
    assert isinstance(manager, x.coordinate_manager._CoordinateManagerClass)
    assert manager.size(key) == 4
    assert manager.get_coordinate_map_keys([1, 1]) == [key]
    assert manager.origin_map_size() == 2
    coarse = manager.stride(key, [2, 2], "")
    assert coarse.get_key() == ([2, 2], "")
    assert sorted(manager.get_coordinates(coarse).tolist()) == [[0, 0, 0], [0, 4, 0], [1, 2, 2]]
    pairs = manager.kernel_map(
        key, coarse, [2, 2], [2, 2], [1, 1], ME.RegionType.HYPER_CUBE, torch.IntTensor(), False,
        False,
    )  # fmt: skip
    assert sum(part.shape[1] for part in pairs.values()) == 4
    samples = torch.tensor([[0, 0.5, 0]], dtype=torch.float64)
    rows, points, weights = manager.interpolation_map_weight(samples, key)
    assert sorted(rows.tolist()) == [0, 1]
    assert points.tolist() == [0, 0]
    assert weights.tolist() == [0.5, 0.5]
    tensor_stride, fresh = manager.get_random_string_id([1, 1], "")
    assert tensor_stride == [1, 1]
    assert fresh
    assert not hasattr(manager, "no_such_method")
    missing = {n for n in dir(manager) if not n.startswith("_")}
    assert {"insert_field", "print_coordinate_map", "union_map"} <= missing


@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_their_functions_are_copied_and_saved(name):
    layer = LAYERS[name][1](compat.minkowski)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert type(getattr(other, ATTRIBUTES[name])) is type(getattr(layer, ATTRIBUTES[name]))


READERS = {
    **{
        name: lambda ME, x, name=name: LAYERS[name][1](ME).double()(x).F
        for name in ("conv", "avg-pool", "max-pool", "global-pool")
    },
    "1x1": lambda ME, x: ME.MinkowskiConvolution(2, 3, kernel_size=1, dimension=2).double()(x).F,
    "dense": lambda ME, x: x.dense()[0],
    "cat": lambda ME, x: ME.cat(x, x).F,
}


@pytest.mark.parametrize("reader", READERS)
def test_features_of_a_subclass(ME, reader):
    """Layers read the property ``F``, so a subclass may compute its features."""

    class Doubled(ME.SparseTensor):
        @property
        def F(self):
            return self._F * 2

    results = []
    for kind, feats in ((Doubled, FEATS), (ME.SparseTensor, FEATS * 2)):
        torch.manual_seed(0)
        results.append(READERS[reader](ME, kind(feats.clone(), COORDS.clone())))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["__add__", "__mul__"])
def test_operators_read_the_features_of_a_subclass_on_the_right(ME, name):
    class Doubled(ME.SparseTensor):
        @property
        def F(self):
            return self._F * 2

    x = Doubled(FEATS.clone(), COORDS.clone())
    out = getattr(x, name)(x)
    assert torch.equal(out._F, getattr(FEATS, name)(2 * FEATS))
