"""Networks of the engine and of both adapters, and the tools that capture graphs of them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
import tritonspconv as ts

EXTENT = 12


def check_operator(case: str, operands: tuple[Any, ...], *, makes_rows: bool) -> None:
    """Run the checks of torch on a registered operator.

    Args:
        case: Name of the operator, perhaps with a comma and further words.
        operands: Its arguments.
        makes_rows: How many rows the result has is a size that no static graph has.
    """
    operator = getattr(torch.ops.tritonspconv, case.split(",")[0]).default
    sizes = "dynamic" if makes_rows else "static"
    checks = "test_schema", "test_faketensor", f"test_aot_dispatch_{sizes}"
    torch.library.opcheck(operator, operands, test_utils=checks)


def scan(rows: int, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return features [N, 4] and distinct coordinates int32 [N, 4] of about ``rows`` sites."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(EXTENT**3, generator=generator)[:rows].sort().values
    axes = torch.stack([cells // EXTENT**2, cells // EXTENT % EXTENT, cells % EXTENT], 1)
    coords = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), axes], 1).int()
    return torch.randn(rows, 4, generator=generator).to(device), coords.to(device)


class EngineNet(nn.Module):
    """Three layers of the engine, pointwise torch functions between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ts.nn.SubMConv3d(4, 8, 3)
        self.norm = ts.nn.BatchNorm(8)
        self.down = ts.nn.SparseConv3d(8, 8, 3, 2, 1)
        self.last = ts.nn.SubMConv3d(8, 8, 3)

    def forward(self, feats: Tensor, coords: Tensor) -> Tensor:
        x = ts.SparseTensor(feats, coords, spatial_shape=[EXTENT] * 3, batch_size=1)
        x = self.norm(self.first(x))
        x = self.down(x.replace(torch.relu(x.feats) * 1.5))
        x = self.last(x.replace(torch.relu(x.feats) + 1))
        return torch.tanh(x.dense())


class SpconvNet(nn.Module):
    """Three layers of ``compat.spconv``, pointwise torch functions between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = spconv.SubMConv3d(4, 8, 3, padding=1, indice_key="first")
        self.norm = nn.BatchNorm1d(8)
        self.down = spconv.SparseConv3d(8, 8, 3, 2, padding=1, indice_key="down")
        self.last = spconv.SubMConv3d(8, 8, 3, padding=1, indice_key="last")

    def forward(self, feats: Tensor, coords: Tensor) -> Tensor:
        x = spconv.SparseConvTensor(feats, coords, [EXTENT] * 3, 1)
        x = self.first(x)
        x = x.replace_feature(torch.relu(self.norm(x.features)))
        x = self.down(x)
        x = x.replace_feature(torch.relu(x.features) + 1)
        return torch.tanh(self.last(x).dense())


class MinkowskiNet(nn.Module):
    """Three layers of ``compat.minkowski``, and its norm and ReLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ME.MinkowskiConvolution(4, 8, 3, dimension=3)
        self.norm = ME.MinkowskiBatchNorm(8)
        self.relu = ME.MinkowskiReLU()
        self.down = ME.MinkowskiConvolution(8, 8, 3, stride=2, dimension=3)
        self.last = ME.MinkowskiConvolution(8, 8, 3, dimension=3)

    def forward(self, feats: Tensor, coords: Tensor) -> Tensor:
        x = ME.SparseTensor(feats, coords)
        x = self.relu(self.norm(self.first(x)))
        x = self.relu(self.down(x))
        y = self.last(x)
        y += x
        return torch.tanh(y.F * 2)


NETS: dict[str, type[nn.Module]] = {
    "tritonspconv": EngineNet,
    "compat.spconv": SpconvNet,
    "compat.minkowski": MinkowskiNet,
}


def _jit_trace(net: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    return torch.jit.trace(net, inputs, check_trace=False)


def _jit_script(net: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    return torch.jit.script(net)


def _onnx(net: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    torch.onnx.export(net, inputs, io.BytesIO(), dynamo=False)
    raise AssertionError("the exporter wrote a file")


def _onnx_dynamo(net: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    torch.onnx.export(net, inputs, io.BytesIO(), dynamo=True, verbose=False)
    raise AssertionError("the exporter wrote a file")


def _export(net: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    return torch.export.export(net, inputs).module()


def _export_strict(net: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    return torch.export.export(net, inputs, strict=True).module()


def _make_fx(net: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(net)(*inputs)


def _vmap(net: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    feats, coords = inputs
    torch.func.vmap(lambda f: net(f, coords))(torch.stack([feats, feats]))
    raise AssertionError("vmap returned")


def _func_grad(net: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    feats, coords = inputs
    torch.func.grad(lambda f: net(f, coords).sum())(feats)
    raise AssertionError("torch.func.grad returned")


def _forward_mode(net: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    feats, coords = inputs
    with torch.autograd.forward_ad.dual_level():
        net(torch.autograd.forward_ad.make_dual(feats, torch.ones_like(feats)), coords)
    raise AssertionError("forward mode returned")


def _compile(**options: Any) -> Callable[..., Callable[..., Any]]:
    return lambda net, inputs: torch.compile(net, **options)


# The case's name in the documentation. Callers use a tool's result in the same way as the network.
TOOLS: dict[str, Callable[[nn.Module, tuple[Tensor, ...]], Callable[..., Any]]] = {
    "`torch.compile`": _compile(backend="aot_eager"),
    "`torch.compile(dynamic=True)`": _compile(backend="aot_eager", dynamic=True),
    "`torch.compile(fullgraph=True)`": _compile(backend="aot_eager", fullgraph=True),
    "`torch.jit.trace`": _jit_trace,
    "`torch.jit.script`": _jit_script,
    "`torch.onnx.export(dynamo=False)`": _onnx,
    "`torch.onnx.export(dynamo=True)`": _onnx_dynamo,
    "`torch.export.export`": _export,
    "`torch.export.export(strict=True)`": _export_strict,
    "`make_fx`": _make_fx,
    "`torch.func.vmap`": _vmap,
    "`torch.func.grad`": _func_grad,
    "forward-mode differentiation": _forward_mode,
}


def outcome(tool: str, net: nn.Module, inputs: list[tuple[Tensor, ...]]) -> str:
    """Return ``"works"``, ``"refused"`` or a description of the fault of a network under a tool.

    A tool works if the graph that it makes from the first inputs gives the network's results on all
    inputs. A tool is refused if the error names the entry cannot-record.
    """
    torch.compiler.reset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            captured = TOOLS[tool](net, inputs[0])
            results = [captured(*given) for given in inputs]
        except Exception as error:
            return "refused" if "cannot-record" in _messages(error) else f"fails: {error}"
        expected = [net(*given) for given in inputs]
    if all(torch.allclose(*pair, atol=1e-6) for pair in zip(results, expected, strict=True)):
        return "works"
    return "wrong numbers"


def _messages(error: BaseException | None) -> str:
    """Return the messages of an error and of its causes."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)
