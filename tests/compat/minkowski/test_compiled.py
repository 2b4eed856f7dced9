"""Networks of ``compat.minkowski`` under ``torch.compile``: one graph, and the results of eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import compat.minkowski as ME
from compat.minkowski.MinkowskiFunctional import relu
from compat.minkowski.modules.resnet_block import BasicBlock, Bottleneck
from tests._capture_cases import check_operator
from tritonspconv.models.minkowski import mink_unet

pytestmark = [
    # torch.compile reads .grad of every tensor. It hides the warning, but not if warnings are
    # errors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def cloud(rows: int, seed: int = 0, extent: int = 60) -> ME.SparseTensor:
    """Return about ``rows`` voxels of two samples, negative coordinates among them."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(-extent // 2, extent // 2, (rows, 3), generator=generator)
    batch = torch.arange(rows) % 2
    coords = torch.cat([batch[:, None], cells], 1).int().unique(dim=0)
    return ME.SparseTensor(torch.randn(len(coords), 4, generator=generator), coords)


def conv(c_in: int, c_out: int, kernel_size: int = 3, stride: int = 1, **options) -> nn.Module:
    return ME.MinkowskiConvolution(c_in, c_out, kernel_size, stride, dimension=3, **options)


class Blocks(nn.Module):
    """Residual blocks of two kinds, one of them strided, a sum, a product and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(4, 8, 5, bias=True)
        self.first = BasicBlock(8, 8, dimension=3)
        project = nn.Sequential(conv(8, 16, 1, 2), ME.MinkowskiBatchNorm(16))
        self.second = BasicBlock(8, 16, stride=2, downsample=project, dimension=3)
        project = nn.Sequential(conv(16, 16, 1), ME.MinkowskiBatchNorm(16))
        self.third = Bottleneck(16, 4, downsample=project, dimension=3)
        self.linear = ME.MinkowskiLinear(16, 5)

    def forward(self, x: ME.SparseTensor) -> ME.SparseTensor:
        y = relu(self.stem(x))
        y = self.second(self.first(y) + y * 0.5)
        return self.linear(ME.MinkowskiSigmoid()(self.third(y)))


class UpAndDown(nn.Module):
    """Two strided layers to one map, and the way back by a transposed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.pooled = conv(4, 6, 2, 2), conv(4, 6, 3, 2)
        self.up = ME.MinkowskiConvolutionTranspose(12, 4, kernel_size=2, stride=2, dimension=3)
        self.head = conv(8, 3, 1, bias=True)

    def forward(self, x: ME.SparseTensor) -> ME.SparseTensor:
        y = self.up(ME.cat(self.down(x), self.pooled(x)))
        return self.head(ME.cat([y, x]))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "blocks": Blocks,
    "up and down": UpAndDown,
    "MinkUNet": lambda: mink_unet(ME, depth=14, channel_divisor=8),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Return two equal networks."""
    torch.manual_seed(0)
    net, twin = NETWORKS[name](), NETWORKS[name]()
    twin.load_state_dict(net.state_dict())
    return net, twin


def step(net: nn.Module, run: Callable, x: ME.SparseTensor) -> list[Tensor]:
    """Return features, coordinates and, in training, gradients and statistics."""
    with torch.set_grad_enabled(net.training):
        out = run(x)
    found = [out.F.detach(), out.C]
    if net.training:
        net.zero_grad()
        (out.F.float() * torch.linspace(-1, 1, out.F.shape[1])).square().mean().backward()
        found += [parameter.grad.clone() for parameter in net.parameters()]
        found += [buffer.clone() for buffer in net.buffers()]
    return found


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_one_graph_with_the_results_of_eager(name: str, training: bool) -> None:
    net, twin = (module.train(training) for module in pair(name))
    # One graph for any number of voxels; a backward pass is a graph of its own.
    counter = CompileCounterWithBackend("aot_eager" if training else "eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
    for rows in (300, 420, 800):
        x, same = cloud(rows, rows), cloud(rows, rows)
        for found, expected in zip(step(net, compiled, x), step(twin, twin, same), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert x.coordinate_manager.size(x.coordinate_map_key) == len(x)
    assert counter.frame_count <= (2 if training else 1)


def test_a_hundred_numbers_of_voxels_compile_two_graphs() -> None:
    net, twin = (module.eval() for module in pair("up and down"))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    with torch.no_grad():
        for rows in range(100, 200):
            x = cloud(rows, rows)
            assert torch.equal(compiled(x).F, twin(cloud(rows, rows)).F)
    assert counter.frame_count == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    net, twin = (module.train() for module in pair("blocks"))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype):
        found, expected = compiled(cloud(300)), twin(cloud(300))
    assert found.F.dtype == expected.F.dtype == dtype
    torch.testing.assert_close(found.F, expected.F, rtol=0.1, atol=0.05)


def test_a_result_has_the_manager_and_keys_of_eager() -> None:
    net = conv(4, 4, 3, 2)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x = cloud(300)
    with torch.no_grad():
        out = compiled(x)
        # The same tensor again, and a result as the input of eager layers and of the graph.
        assert torch.equal(compiled(x).F, out.F)
        assert torch.equal(compiled(out).F, net(out).F)
        assert torch.equal(net(x).F, out.F)
    assert type(out) is ME.SparseTensor
    assert out.coordinate_manager is x.coordinate_manager
    assert out.coordinate_map_key == net(x).coordinate_map_key
    assert out.coordinate_map_key.get_key() == ([2, 2, 2], "")
    assert out.tensor_stride == [2, 2, 2]
    assert out.D == 3


def test_tensors_of_one_manager() -> None:
    """The second tensor of a manager has a key with an id of its own."""
    net, twin = (module.eval() for module in pair("blocks"))
    compiled = torch.compile(net, backend="eager")
    first = cloud(300)
    for seed in (1, 2):
        other = cloud(200, seed)
        x = ME.SparseTensor(other.F, other.C, coordinate_manager=first.coordinate_manager)
        with torch.no_grad():
            assert torch.equal(compiled(x).F, twin(x).F)


@pytest.mark.parametrize("kind", [ME.MinkowskiConvolution, ME.MinkowskiConvolutionTranspose])
def test_a_layer_that_works_row_by_row_keeps_the_map(kind: type[nn.Module]) -> None:
    net = kind(4, 6, kernel_size=1, bias=True, dimension=3)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    first, other = cloud(100), cloud(60, 1)
    x = ME.SparseTensor(other.F, other.C, coordinate_manager=first.coordinate_manager)
    assert x.coordinate_map_key.get_key()[1]  # the empty id is that of the first tensor
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(x), net(x)
    assert found.coordinate_map_key == x.coordinate_map_key
    torch.testing.assert_close(found.F, expected.F, rtol=0.02, atol=0.01)


# Python has to run these layers and operations: the results are those of eager all the same.
APART: dict[str, Callable[[], Callable]] = {
    "generative": lambda: nn.Sequential(
        conv(4, 4, 2, 2),
        ME.MinkowskiGenerativeConvolutionTranspose(4, 4, kernel_size=2, stride=2, dimension=3),
    ),
    "expanded": lambda: conv(4, 4, 3, 1, expand_coordinates=True),
    "new fine sites": lambda: ME.MinkowskiConvolutionTranspose(
        4, 4, kernel_size=3, stride=1, dimension=3
    ),
    "custom window": lambda: conv(
        4, 4, kernel_generator=ME.KernelGenerator(
            region_type=ME.RegionType.CUSTOM, dimension=3,
            region_offsets=torch.tensor([[0, 0, 0], [1, 0, 0]]).int(),
        ),
    ),
    "pool": lambda: ME.MinkowskiMaxPooling(2, 2, dimension=3),
    "union": lambda: lambda x: x + prune(x, x.F[:, 0] > 0),
    "tensor": lambda: lambda x: x - x.F.mean(),
    "no rows": lambda: lambda x: conv_of_none(prune(x, x.F[:, 0] > 100)),
}  # fmt: skip
conv_of_none, prune = conv(4, 4), ME.MinkowskiPruning()


@pytest.mark.parametrize("name", APART)
def test_what_python_runs_is_right(name: str) -> None:
    torch.manual_seed(0)
    before, apart, behind = conv(4, 4), APART[name](), conv(4, 4)

    def run(x: ME.SparseTensor) -> ME.SparseTensor:
        return behind(relu(apart(before(x))))

    compiled = torch.compile(run, backend="eager")
    for rows in (200, 260):
        with torch.no_grad():
            found, expected = compiled(cloud(rows, rows)), run(cloud(rows, rows))
        assert torch.equal(found.C, expected.C)
        assert torch.equal(found.F, expected.F)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: conv(5, 4), "in_channels=5"),
        (lambda: ME.MinkowskiConvolution(4, 4, 3, dimension=2), "dimension=2"),
        (
            lambda: ME.MinkowskiConvolutionTranspose(4, 4, 3, stride=2, dimension=3),
            "tensor stride that its stride divides",
        ),
    ],
)
def test_errors_are_those_of_eager(layer: Callable[[], nn.Module], message: str) -> None:
    net = layer()
    for run in (net, torch.compile(net, backend="eager")):
        with pytest.raises(AssertionError, match=message):
            run(cloud(100))


def test_one_site_has_no_statistics() -> None:
    net = nn.Sequential(conv(4, 4, 2, 2), ME.MinkowskiBatchNorm(4)).train()
    compiled = torch.compile(net, backend="eager")
    compiled(cloud(100))
    lonely = ME.SparseTensor(torch.ones(2, 4), torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]]).int())
    with pytest.raises(RuntimeError, match=r"in training needs 2 output sites; got 1"):
        compiled(lonely)


def test_a_layer_that_users_changed_runs_in_python() -> None:
    net = nn.Sequential(conv(4, 4), ME.MinkowskiReLU())
    net[0].fold_relu()
    calls = []

    class Own(type(net[0].conv)):
        @staticmethod
        def apply(features, kernel, *rest):
            calls.append(len(features))
            return features * 2

    x = cloud(100)
    with torch.no_grad():
        compiled = torch.compile(net, backend="eager")
        assert torch.equal(compiled(x).F, net(x).F)
        net[0].conv = Own()
        assert torch.equal(compiled(x).F, relu(x * 2).F)
    assert calls


def _operands() -> dict[str, tuple]:
    x = cloud(60, extent=12)
    manager, key = x.coordinate_manager, "1 1 1:"
    same, half = "C HYPER_CUBE 3 3 3 1 1 1 1 1 1", "C HYPER_CUBE 2 2 2 2 2 2 1 1 1"
    coarse = manager.size(manager.stride(x.coordinate_map_key, 2))
    cases: dict[str, tuple] = {"minkowski_rows": (x.F.new_zeros(len(x), 0), manager, key, half, 1)}
    for name, step, taps, rows in (("same", same, 27, len(x)), ("half", half, 8, coarse)):
        kernel = torch.randn(taps, 4, 6)
        place = manager, key, step, rows, "VIO", torch.float32, "ieee"
        cases[f"minkowski_convolution_forward, {name}"] = (x.F, kernel, torch.randn(6), *place)
        grad = torch.randn(rows, 6)
        cases[f"minkowski_convolution_grads, {name}"] = (grad, x.F, kernel, *place, True, True)
    return cases


@pytest.mark.parametrize("case", _operands())
def test_operators_pass_the_checks_of_torch(case: str) -> None:
    check_operator(case, _operands()[case], makes_rows=case == "minkowski_rows")
