"""Compiled submanifold stages are one graph, with the results and gradients of eager stages."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import compat.spconv.pytorch as spconv
import tritonspconv as ts
from compat.spconv.pytorch._errors import SpconvError
from tests._back_end import interpreted_only
from tests._capture_cases import EXTENT, check_operator, scan
from tritonspconv import graph_capture, opaque_types
from tritonspconv.kernels.channel_norm import TrainingNorm
from tritonspconv.nn import chain
from tritonspconv.ops import registered_norm
from tritonspconv.ops.batch_norm import train_norm

pytestmark = [
    pytest.mark.skipif(not opaque_types.AVAILABLE, reason="torch moved the private interface"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


class Block(nn.Module):
    """A residual block of the engine, written by hand."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = ts.nn.SubMConv3d(channels, channels, 3, bias=False)
        self.norm1 = nn.BatchNorm1d(channels)
        self.conv2 = ts.nn.SubMConv3d(channels, channels, (1, 3, 3), dilation=2)
        self.norm2 = ts.nn.BatchNorm(channels)

    def forward(self, x: ts.SparseTensor) -> ts.SparseTensor:
        y = self.conv1(x)
        y = y.replace(F.relu(self.norm1(y.feats)))
        y = self.norm2(self.conv2(y)) + x
        return ts.cat([y.replace(F.relu(y.feats)), x])


class SpconvBlock(spconv.SparseModule):
    """A residual block of ``compat.spconv``, as detectors write it."""

    def __init__(self, channels: int = 4, key: str | None = "key") -> None:
        super().__init__()
        self.conv1 = spconv.SubMConv3d(channels, channels, 3, bias=False, indice_key=key)
        self.norm1 = nn.BatchNorm1d(channels)
        self.conv2 = spconv.SubMConv3d(channels, channels, 3, bias=True, indice_key=key)
        self.conv3 = spconv.SubMConv3d(channels, channels, 1)
        self.norm2 = nn.BatchNorm1d(channels)

    def forward(self, x: spconv.SparseConvTensor) -> spconv.SparseConvTensor:
        y = self.conv1(x)
        y = y.replace_feature(F.relu(self.norm1(y.features)))
        y = self.conv3(self.conv2(y))
        y = y.replace_feature(self.norm2(y.features) + x.features)
        return y.replace_feature(F.relu(y.features))


def _engine_input(rows: int, seed: int = 0) -> ts.SparseTensor:
    feats, coords = scan(rows, seed)
    return ts.SparseTensor(feats, coords, spatial_shape=[EXTENT] * 3, batch_size=1)


_FIRST = spconv.SubMConv3d(4, 4, 3)


def _spconv_input(rows: int, seed: int = 0) -> spconv.SparseConvTensor:
    """Return a tensor that a layer has seen: the first layer of a new tensor is a graph break."""
    feats, coords = scan(rows, seed)
    with torch.no_grad():
        seen = _FIRST(spconv.SparseConvTensor(feats, coords, [EXTENT] * 3, 1))
    return seen.replace_feature(feats)


def _feats(x: Any) -> Tensor:
    return x.features if isinstance(x, spconv.SparseConvTensor) else x.feats


def _with_feats(x: Any, feats: Tensor) -> Any:
    return x.replace_feature(feats) if isinstance(x, spconv.SparseConvTensor) else x.replace(feats)


class Stage(nn.Module):
    """Containers of the engine, one inside the other."""

    def __init__(self) -> None:
        super().__init__()
        convs = [ts.nn.SubMConv3d(4, 4, 3, bias=False) for _ in range(3)]
        inner = ts.nn.Sequential(convs[1], ts.nn.BatchNorm(4), ts.nn.ReLU())
        self.stage = ts.nn.Sequential(
            convs[0], nn.BatchNorm1d(4), nn.ReLU(), inner, convs[2], nn.BatchNorm1d(4, affine=False)
        )

    def forward(self, x: ts.SparseTensor) -> ts.SparseTensor:
        return self.stage(x)


class SpconvStage(spconv.SparseModule):
    """Containers of ``compat.spconv``, one inside the other."""

    def __init__(self) -> None:
        super().__init__()
        inner = spconv.SparseSequential(spconv.SubMConv3d(4, 4, 3, indice_key="key"), nn.ReLU())
        self.stage = spconv.SparseSequential(
            spconv.SubMConv3d(4, 4, 3, indice_key="key"), nn.BatchNorm1d(4), nn.ReLU(), inner,
            spconv.SubMConv3d(4, 4, 1), spconv.SparseBatchNorm(4), spconv.SparseReLU(),
        )  # fmt: skip

    def forward(self, x: spconv.SparseConvTensor) -> spconv.SparseConvTensor:
        return self.stage(x)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "engine": (Block, _engine_input),
    "spconv": (SpconvBlock, _spconv_input),
    "spconv, no key": (lambda: SpconvBlock(key=None), _spconv_input),
}
STAGES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "engine": (Stage, _engine_input),
    "spconv": (SpconvStage, _spconv_input),
}


def _run(net: Any, x: Any) -> list[Tensor]:
    """Return the output, the gradients of features and parameters, and the buffers."""
    feats = _feats(x).detach().clone().requires_grad_()
    net.zero_grad()
    out = _feats(net(_with_feats(x, feats)))
    grads = torch.autograd.grad(out.float().square().sum(), [feats, *net.parameters()])
    return [out, *grads, *net.buffers()]


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_residual_block_is_one_graph(name: str, autocast: bool, training: bool) -> None:
    make, inputs = BLOCKS[name]
    net = make().train(training)
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    bound = 3e-2 if autocast else 1e-4
    for rows in (60, 2, 90):
        x = inputs(rows, rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, expected = _run(compiled, x), _run(twin, x)
        # Gradients that a norm cancels are rounding errors of other gradients.
        scale = max(float(other.detach().abs().max()) for other in expected)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=bound, atol=bound * scale)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", BLOCKS)
def test_200_numbers_of_voxels_compile_twice_at_most(name: str, training: bool) -> None:
    make, inputs = BLOCKS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(make().train(training), backend=counter, fullgraph=True)
    sizes = random.Random(0).sample(range(3, EXTENT**3), 200)
    with torch.set_grad_enabled(training):
        for rows in sizes:
            compiled(inputs(rows, rows))
    assert counter.frame_count <= 2


def _draw_norms(net: nn.Module) -> None:
    """Give every batch norm other numbers than those of a new one."""
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm1d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)


def _operators(counter: CompileCounterWithBackend) -> list[str]:
    """Return the names of the calls of all graphs, without the module's name."""
    nodes = [node for graph in counter.graphs for node in graph.graph.nodes]
    return [getattr(node.target, "__name__", node.target) for node in nodes
            if node.op in ("call_function", "call_method")]  # fmt: skip


@pytest.mark.skipif(not chain.fuses_on(torch.device("cpu")), reason="eager mode fuses with numba")
@pytest.mark.parametrize("name", STAGES)
def test_a_container_in_a_graph_makes_the_launches_of_eager(name: str) -> None:
    make, inputs = STAGES[name]
    net = make().eval()
    _draw_norms(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    with torch.no_grad():
        for rows in (60, 90, 40, 200):
            x = inputs(rows, rows)
            assert torch.equal(_feats(compiled(x)), _feats(net(x)))
        assert counter.frame_count <= 2
        called = _operators(counter)
        assert sum(name.endswith("_fused") for name in called) >= 2 * 2
        if name.startswith("engine"):
            assert all(name.endswith("_fused") for name in called)


@pytest.mark.parametrize("name", STAGES)
def test_a_norm_in_training_is_one_operator_with_the_bits_of_eager(name: str) -> None:
    make, inputs = STAGES[name]
    net = make()
    _draw_norms(net)
    twin = copy.deepcopy(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for rows in (60, 90):
        x = inputs(rows, rows)
        for found, expected in zip(_run(compiled, x), _run(twin, x), strict=True):
            assert torch.equal(found, expected)
    assert counter.frame_count <= 2
    called = _operators(counter)
    norms = sum(isinstance(module, nn.BatchNorm1d) for module in net.modules())
    assert called.count("batch_norm") == norms * counter.frame_count
    assert sum("relu" in name for name in called) <= counter.frame_count
    # One row has no variance.
    with pytest.raises(ValueError, match="more than one"):
        compiled(inputs(1))


@pytest.mark.parametrize("name", ["engine", "spconv"])
def test_a_container_with_a_layer_that_breaks_the_graph_runs_whole(name: str) -> None:
    if name == "engine":
        layers = ts.nn.SubMConv3d(4, 4, 3), nn.ReLU(), ts.nn.MaxPool3d(2), ts.nn.SubMConv3d(4, 4, 3)
        net, inputs = ts.nn.Sequential(*layers), _engine_input
    else:
        layers = spconv.SubMConv3d(4, 4, 3), nn.ReLU(), spconv.SparseMaxPool3d(2)
        net, inputs = spconv.SparseSequential(*layers), _spconv_input
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter)
    for rows in (60, 90, 40):
        x = inputs(rows, rows)
        assert torch.equal(_feats(compiled(x)), _feats(net(x)))
    assert not _operators(counter)


def test_a_container_whose_layers_are_watched_fuses_nothing() -> None:
    net, seen = Stage().eval(), []
    net.stage[1].register_forward_hook(lambda *_: seen.append(1))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter)
    with torch.no_grad():
        x = _engine_input(60)
        torch.testing.assert_close(compiled(x).feats, net(x).feats)
    assert len(seen) == 2
    assert "conv_between" in _operators(counter)


def test_switching_a_container_to_evaluation_makes_another_graph() -> None:
    net = Stage()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = _engine_input(60)
    for training in (True, False, True):
        net.train(training)
        twin = copy.deepcopy(net)
        with torch.set_grad_enabled(training):
            assert torch.equal(compiled(x).feats, twin(x).feats)
        assert all(map(torch.equal, net.buffers(), twin.buffers()))


def _level(
    x: ts.SparseTensor, maps: tuple[ts.KernelMap, ...], weights: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """A level of a U-Net: down, across and up again, along given maps."""
    down, across, up = maps
    y = F.relu(ts.ops.sparse_conv(x.feats, weights[0], down))
    y = ts.ops.sparse_conv(y, weights[1], across, residual=y, relu=True)
    return y, ts.ops.sparse_conv(y, weights[0].mT, up) + x.feats


def test_a_level_with_given_maps_is_one_graph() -> None:
    weights = torch.randn(8, 4, 6, requires_grad=True), torch.randn(27, 6, 6, requires_grad=True)
    compiled = torch.compile(_level, backend="aot_eager", fullgraph=True)
    window = ts.ConvGeometry.submanifold((3, 3, 3), (1, 1, 1))
    halves = ts.ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1))
    for rows in (60, 90, 40):
        x = _engine_input(rows, rows)
        down = ts.kernel_map(x.sites, halves)
        maps = down, ts.kernel_map(down.out_sites, window), down.inverse()
        results = [run(x, maps, weights) for run in (compiled, _level)]
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(up.square().sum(), weights) for _, up in results]
        for found, expected in zip(*grads, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


def _normed_level(
    feats: Tensor, weight: Tensor, kernel_map: ts.KernelMap, mean: Tensor, variance: Tensor
) -> Tensor:
    norm = ts.ops.TrainingNorm(mean, variance, momentum=0.3)
    return ts.ops.sparse_conv(feats, weight, kernel_map, norm=norm, relu=True)


def test_a_norm_in_training_along_a_given_map_is_left_to_eager() -> None:
    """So are operands that do not fit, and eager refuses these."""
    x, weight = _engine_input(60), torch.randn(27, 4, 6)
    across = ts.kernel_map(x.sites, ts.ConvGeometry.submanifold((3, 3, 3), (1, 1, 1)))
    compiled = torch.compile(_normed_level, backend="aot_eager")
    results = []
    for run in (compiled, _normed_level):
        statistics = torch.zeros(6), torch.ones(6)
        results.append([run(x.feats, weight, across, *statistics), *statistics])
        with pytest.raises(ValueError, match=r"^sparse_conv: "):
            run(x.feats[:, :3], weight, across, *statistics)
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


class _Upsample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = ts.nn.SparseInverseConv3d(4, 6, 3)
        self.up.fold_relu()
        self.dense = ts.nn.ToDense(channels_first=False)

    def forward(self, x: ts.SparseTensor, like: ts.SparseTensor) -> tuple[Tensor, Tensor]:
        y = self.up(x, like)
        return self.dense(y) * 2, y.dense()


def test_an_inverse_layer_and_dense_are_one_graph() -> None:
    down, net = ts.nn.SparseConv3d(4, 4, 3, 2, 1), _Upsample()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for rows in (60, 90, 40):
        like = _engine_input(rows, rows)
        feats = down(like).feats.detach().requires_grad_()
        x = down(like).replace(feats)
        results = []
        for run in (compiled, net):
            last, first = run(x, like)
            loss = last.square().sum() + (first * first.cos()).sum()
            results.append([last, first, *torch.autograd.grad(loss, [feats, net.up.weight])])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    # No layer leads from one of these sets of sites to the other.
    with pytest.raises(ValueError, match="one earlier layer"):
        compiled(x, _engine_input(40, 40))


# The steps of a submanifold layer and of a strided one; see compat/spconv/pytorch/_paths.py.
SAME = "S 3 3 3 1 1 1;"
HALF = "C 3 3 3 2 2 2 1 1 1 1 1 1 0 0 0;"


def _operands() -> dict[str, tuple[Any, ...]]:
    """Return sample arguments of every registered operator that has no gradient of its own."""
    x = _engine_input(20)
    down = ts.nn.SparseConv3d(4, 6, 3, 2, 1)
    y = down(x)
    found = ts.kernel_map(x.sites, down.geometry)
    setting = "VIO", torch.float32, "ieee"
    weight, grad = torch.randn(27, 4, 6), torch.randn(y.num_rows, 6)
    ways: dict[str, tuple[Any, ...]] = {
        "conv_along_map": (found,),
        "conv_between": (x.sites, y.sites, down.geometry),
        "spconv_submanifold": (x.coords, x.sites, 0, SAME),
        "spconv_strided": (x.sites, HALF),
    }
    cases: dict[str, tuple[Any, ...]] = {}
    for name, way in ways.items():
        rows = x.num_rows if name == "spconv_submanifold" else y.num_rows
        cases[f"{name}_forward"] = (x.feats, weight, torch.randn(6), *way, rows, *setting)
        grads = torch.randn(rows, 6), x.feats, weight, *way, rows, *setting
        for needs in ((True, True), (True, False), (False, True)):
            cases[f"{name}_grads, {needs}"] = (*grads, *needs)
        norm = torch.randn(6), torch.rand(6), torch.randn(6), None, 1e-5
        cases[f"{name}_fused, norm"] = (
            *cases[f"{name}_forward"], *norm, torch.randn(rows, 6), True,
        )  # fmt: skip
        cases[f"{name}_fused, relu"] = (
            *cases[f"{name}_forward"], None, None, None, None, 0.0, None, True,
        )  # fmt: skip
    back_along = (x.sites, HALF, x.num_rows, *setting)
    cases["spconv_inverse_forward"] = (grad, torch.randn(27, 6, 4), None, *back_along)
    cases["spconv_inverse_grads"] = (x.feats, grad, torch.randn(27, 6, 4), *back_along, True, True)
    cases["spconv_sites"] = (x.coords, x.sites, 0, HALF, 1)
    back = (y.sites, x.sites, [3, 3, 3], x.num_rows, *setting)
    cases["conv_inverse_forward"] = (grad, torch.randn(27, 6, 4), None, *back)
    cases["conv_inverse_grads"] = (x.feats, grad, torch.randn(27, 6, 4), *back, True, True)
    for dtype in (torch.float32, torch.float64):
        feats, ones = x.feats.to(dtype), torch.ones(4, dtype=dtype)
        running = torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)
        cases[f"batch_norm_forward, {dtype}"] = (
            feats, ones, ones, *running, torch.tensor(3), 0.1, 1e-5, True,
        )  # fmt: skip
        stats = torch.stack([feats.mean(0), feats.var(0, correction=0).add(1e-5).rsqrt()])
        cases[f"batch_norm_grads, {dtype}"] = (
            feats, feats, ones, ones, stats, feats.relu(), 1e-5,
        )  # fmt: skip
    plain = x.feats.bfloat16(), None, None, None, None, None, 0.1, 1e-5, False
    cases["batch_norm_forward, plain"] = plain
    shape = [1, 4, EXTENT, EXTENT, EXTENT]
    cases["to_dense_forward"] = (x.feats, x.sites, shape, True)
    cases["to_dense_grad"] = (torch.randn(shape), x.sites, x.num_rows, True)
    return cases


@pytest.mark.parametrize("case", _operands())
def test_operators_pass_the_checks_of_torch(case: str) -> None:
    check_operator(case, _operands()[case], makes_rows=case == "spconv_sites")


@pytest.mark.parametrize("relu", [False, True], ids=["norm", "norm and ReLU"])
def test_the_gradients_of_a_norm_in_training_are_those_of_differences(relu: bool) -> None:
    feats = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def norm(*operands: Tensor) -> Tensor:
        running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        return torch.ops.tritonspconv.batch_norm(*operands, *running, None, 0.1, 1e-5, relu)

    assert torch.autograd.gradcheck(norm, (feats, weight, bias))


@interpreted_only
@pytest.mark.parametrize("relu", [False, True], ids=["norm", "norm and ReLU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_norm_in_training_runs_the_kernels_of_a_gpu(dtype, relu, device, monkeypatch) -> None:
    calls = []
    for name in ("batch_norm", "batch_norm_grad"):
        kernel = getattr(registered_norm, name)

        def run(*args: Any, name: str = name, kernel: Any = kernel) -> Any:
            calls.append(name)
            return kernel(*args)

        monkeypatch.setattr(registered_norm, name, run)

    def step(norm: Callable[..., Tensor]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        feats = torch.randn(9, 3, generator=generator).to(dtype).requires_grad_()
        weight, bias = (torch.randn(3, generator=generator, requires_grad=True) for _ in range(2))
        held = [torch.zeros(3), torch.ones(3), torch.tensor(4)]
        out = norm(feats, weight, bias, *held)
        out.backward(torch.linspace(-1, 1, 27).view(9, 3).to(dtype))
        grads = [x.grad for x in (feats, weight, bias)]
        assert all(grad is not None for grad in grads)
        return [out.detach(), *held, *(grad for grad in grads if grad is not None)]

    def eager(feats: Tensor, weight: Tensor, bias: Tensor, *held: Tensor) -> Tensor:
        mean, variance, count = held
        norm = TrainingNorm(mean, variance, weight, bias, count, 0.3, 1e-5)
        return train_norm(feats, norm, relu=relu)

    def traced(*operands: Tensor) -> Tensor:
        return torch.ops.tritonspconv.batch_norm(*operands, 0.3, 1e-5, relu)

    for found, expected in zip(step(traced), step(eager), strict=True):
        assert torch.equal(found, expected)
    assert calls == ["batch_norm", "batch_norm_grad"]


def test_inductor_knows_a_likely_size_of_every_level() -> None:
    """Without it, inductor on a GPU sums the rows of a level in one program."""
    found = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, Tensor) and isinstance(size := value.shape[0], torch.SymInt):
                found.extend(
                    (str(symbol), size.node.shape_env.var_to_hint_override.get(symbol))
                    for symbol in size.node.expr.free_symbols
                )
        return graph

    net = torch.nn.Sequential(
        spconv.SparseConv3d(4, 4, 3, 2, padding=1), spconv.SubMConv3d(4, 4, 3, padding=1)
    ).eval()
    x = spconv.SubMConv3d(4, 4, 3, padding=1)(_spconv_input(60))
    torch.compile(net, backend=backend, dynamic=True, fullgraph=True)(x)
    hints = {hint for symbol, hint in found if symbol.startswith("u")}
    assert hints == {opaque_types._LIKELY_ROWS}


def test_sums_of_other_sites_are_refused_as_in_eager() -> None:
    def add(x: ts.SparseTensor, y: ts.SparseTensor) -> ts.SparseTensor:
        return x.replace(x.feats * 2) + y

    compiled = torch.compile(add, backend="aot_eager")
    x, other = _engine_input(30), _engine_input(30)
    for _ in range(2):
        with pytest.raises(ValueError, match="needs both operands at the same sites"):
            compiled(x, other)
        torch.testing.assert_close(compiled(x, x).feats, x.feats * 3)


def test_recorded_maps_are_those_of_eager() -> None:
    net = SpconvBlock()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for rows in (30, 50):
        x = _spconv_input(rows)
        found, expected = compiled(x), net(x)
        assert list(found.indice_dict) == list(expected.indice_dict) == ["key"]
        assert not x.indice_dict
        records = found.indice_dict["key"], expected.indice_dict["key"]
        assert torch.equal(records[0].pair_fwd, records[1].pair_fwd)
        assert type(records[0]) is type(records[1])
        # The entry serves later layers, compiled and not.
        torch.testing.assert_close(net(found).features, net(expected).features)
        torch.testing.assert_close(compiled(found).features, net(expected).features)
        with pytest.raises(SpconvError, match="is in use"):
            spconv.SparseConv3d(4, 4, 3, 2, indice_key="key")(found)


@pytest.mark.parametrize("key", [None, "key"])
def test_indices_that_were_edited_in_place_give_the_results_of_eager(key: str | None) -> None:
    net = SpconvBlock(key=key)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for edit in (False, True):
        results = []
        for run in (compiled, net):
            x = _spconv_input(40)
            if edit:
                x.indices[:, 1] = EXTENT - 1 - x.indices[:, 1]
            results.append(run(x).features)
        torch.testing.assert_close(*results)


def test_rows_that_repeat_a_site_run_in_python() -> None:
    net = SpconvBlock(key=None)
    feats, coords = scan(20)
    given = torch.cat([feats, feats]), torch.cat([coords, coords])
    x = _FIRST(spconv.SparseConvTensor(*given, [EXTENT] * 3, 1))
    compiled = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(compiled(x).features, net(x).features)


def test_a_gradient_of_a_compiled_gradient_is_refused() -> None:
    layer = ts.nn.SubMConv3d(4, 4, 3)
    x = _engine_input(20)
    feats = x.feats.clone().requires_grad_()
    out = torch.compile(layer, backend="eager")(x.replace(feats)).feats
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(out.sum(), feats, create_graph=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_torch_without_the_private_interface_breaks_the_graph(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, inputs = BLOCKS[name]
    net = make()
    twin = copy.deepcopy(net)
    monkeypatch.setattr(graph_capture, "AVAILABLE", False)
    compiled = torch.compile(net, backend="aot_eager")
    for rows in (30, 50):
        for pair in zip(_run(compiled, inputs(rows)), _run(twin, inputs(rows)), strict=True):
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def test_torch_has_no_public_interface_for_opaque_types() -> None:
    """When this fails, ``opaque_types`` can use the public names instead of the private ones."""
    assert not hasattr(torch.library, "register_opaque_type")


class SpconvEncoder(nn.Module):
    """Two levels, a transposed layer and an inverse one, all behind a layer that Python runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _normed(spconv.SubMConv3d(4, 4, 3, indice_key="stem"))
        self.down = _normed(spconv.SparseConv3d(4, 6, 3, 2, 1, indice_key="down"))
        self.block = SpconvBlock(6, "coarse")
        self.last = _normed(spconv.SparseConv3d(6, 8, (3, 1, 1), (2, 1, 1)))
        self.wide = spconv.SparseConvTranspose3d(8, 6, 2, 2)
        self.up = _normed(spconv.SparseInverseConv3d(6, 4, 3, indice_key="down"))

    def forward(self, x: spconv.SparseConvTensor) -> tuple[spconv.SparseConvTensor, ...]:
        x = self.stem(x)
        y = self.block(self.down(x))
        z = self.wide(self.last(y))
        up = self.up(y)
        return up.replace_feature(torch.cat([up.features, x.features], 1)), y, z


def _normed(conv: nn.Module) -> nn.Module:
    return spconv.SparseSequential(conv, nn.BatchNorm1d(conv.out_channels), nn.ReLU())


def _new_input(rows: int) -> spconv.SparseConvTensor:
    feats, coords = scan(rows, rows)
    return spconv.SparseConvTensor(feats, coords, [EXTENT] * 3, 1)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_network_of_strided_layers_is_one_graph(training: bool, autocast: bool) -> None:
    net = SpconvEncoder().train(training)
    twin = copy.deepcopy(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter)
    bound = 3e-2 if autocast else 1e-4
    for rows in (90, 60, 200, 41):
        results = []
        for run, base in ((compiled, net), (twin, twin)):
            base.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outs = run(_new_input(rows))
            feats = [out.features for out in outs]
            sum(f.float().square().sum() for f in feats).backward()
            results.append((outs, [*feats, *(p.grad for p in base.parameters()), *base.buffers()]))
        (outs, found), (right, expected) = results
        scale = max(float(other.detach().abs().max()) for other in expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=bound, atol=bound * scale)
        for one, other in zip(outs, right, strict=True):
            assert torch.equal(one.indices, other.indices)
            assert one.spatial_shape == other.spatial_shape
    # Once for the first number of voxels, once for all others.
    assert counter.frame_count <= 2


class SpconvStages(nn.Module):
    """An input layer, a stage of two fused layers, and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _normed(spconv.SubMConv3d(4, 4, 3, indice_key="stem"))
        self.stage = spconv.SparseSequential(
            _normed(spconv.SparseConv3d(4, 6, 3, 2, 1)), _normed(spconv.SubMConv3d(6, 6, 3))
        )
        self.last = _normed(spconv.SubMConv3d(6, 4, 3))

    def forward(self, x: spconv.SparseConvTensor) -> spconv.SparseConvTensor:
        return self.last(self.stage(self.stem(x)))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_on_a_gpu_a_stage_of_fused_layers_stays_whole(training: bool, monkeypatch) -> None:
    """The stage is no part of a graph, as on a GPU, and the layer behind it is."""
    monkeypatch.setattr(chain, "fuses_training", lambda device: True)
    net = SpconvStages().train(training)
    twin = copy.deepcopy(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter)
    for rows in (90, 60):
        found, right = compiled(_new_input(rows)), twin(_new_input(rows))
        torch.testing.assert_close(found.features, right.features, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.indices, right.indices)
    called = [node.target.__name__ for graph in counter.graphs for node in graph.graph.nodes
              if "spconv" in getattr(node.target, "__name__", "")]  # fmt: skip
    assert called
    assert not any("strided" in name for name in called)


def test_tensors_of_a_compiled_network_serve_eager_layers() -> None:
    net = SpconvEncoder().eval()
    compiled = torch.compile(net, backend="aot_eager")
    layers = [
        spconv.SubMConv3d(6, 4, 3, indice_key="coarse"),
        spconv.SparseInverseConv3d(6, 4, 3, indice_key="down"),
        spconv.SparseConv3d(6, 4, 3, 2),
    ]
    with torch.no_grad():
        for rows in (90, 60):
            found, expected = compiled(_new_input(rows))[1], net(_new_input(rows))[1]
            for layer in layers:
                torch.testing.assert_close(layer(found).features, layer(expected).features)
            torch.testing.assert_close(found.dense(), expected.dense())
            for key, record in expected.indice_dict.items():
                other = found.indice_dict[key]
                assert type(other) is type(record)
                assert torch.equal(other.pair_fwd, record.pair_fwd)
                assert torch.equal(other.out_indices, record.out_indices)
                assert other.out_spatial_shape == record.out_spatial_shape
        # Edits of coordinates that a graph returned count, as in eager.
        for x in (found, expected):
            x.indices[:, 1] = x.spatial_shape[0] - 1 - x.indices[:, 1]
        for layer in layers[2:]:
            torch.testing.assert_close(layer(found).features, layer(expected).features)


def test_inputs_that_a_graph_cannot_serve() -> None:
    net = SpconvEncoder().eval()
    compiled = torch.compile(net, backend="aot_eager")
    with torch.no_grad():
        compiled(_new_input(90))
        # No rows: Python runs the layers.
        assert compiled(_new_input(0))[0].features.shape == net(_new_input(0))[0].features.shape
        far = spconv.SparseConvTensor(*scan(1), [EXTENT] * 3, 1)
        far.indices[:, 1:] = EXTENT + 8
        for run in (compiled, net):
            with pytest.raises(SpconvError, match="points vanished"):
                run(far.shadow_copy())


@pytest.mark.parametrize("make", [spconv.SubMConv3d, spconv.SparseConv3d])
def test_edits_of_indices_inside_a_graph_are_refused(make: Any) -> None:
    layer = make(4, 4, 3)

    def run(x: spconv.SparseConvTensor) -> Tensor:
        x.indices[:, 1] = EXTENT - 1 - x.indices[:, 1]
        return layer(x).features * 2

    with pytest.raises(Exception, match="edits indices in place"):
        torch.compile(run, backend="aot_eager")(_spconv_input(30))


def test_indices_that_were_edited_before_a_compiled_strided_layer_are_refused() -> None:
    layer = spconv.SparseConv3d(4, 4, 3, 2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(_spconv_input(30))
    x = _spconv_input(30)
    x.indices[:, 1] = EXTENT - 1 - x.indices[:, 1]
    with pytest.raises(RuntimeError, match="edited in place"):
        compiled(x)
