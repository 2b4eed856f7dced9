"""Networks that an ONNX file cannot hold: the error names the module and the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tests.export._scans import Of, engine, minkowski, spconv_tensor, sweep
from tritonspconv import nn as tsnn
from tritonspconv.coords.row_tensor import plain
from tritonspconv.export import OnnxExportError, export_onnx

pytest.importorskip("onnx", reason="onnx is not installed")


def feats_of(x: Any) -> Any:
    return x.features if hasattr(x, "features") else x.feats


def with_feats(x: Any, feats: Any) -> Any:
    return x.replace_feature(feats) if hasattr(x, "replace_feature") else x.replace(feats)


def on_feats(function: Callable[[Any], Any], **layers: Any) -> Callable[[], nn.Module]:
    """Return a network that applies a function to the features of spconv's tensor."""
    return lambda: Of(lambda self, x: with_feats(x, function(feats_of(x))), **layers)


OUTSIDE = torch.randn(4)
STATISTICS = "normalises by the statistics of the scan"

# Networks of four channels, and the expected error.
SPCONV: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a branch by values": (on_feats(lambda f: f if f[:, 0].sum() > 0 else -f), "__getitem__|sum"),
    "a number of values": (on_feats(lambda f: f * f.max().item()), "calls max"),
    "numpy": (on_feats(lambda f: torch.from_numpy(f.numpy() * 2)), "calls numpy"),
    "a list": (on_feats(lambda f: torch.tensor(f.tolist())), "calls tolist"),
    "the number of rows": (on_feats(lambda f: f / f.shape[0]), "with the number of rows"),
    "size()": (on_feats(lambda f: f * f.size(0)), "with the number of rows"),
    "a branch by rows": (on_feats(lambda f: f if f.shape[0] > 9 else -f), "the number of rows"),
    "len()": (on_feats(lambda f: f * len(f)), "asks for the number of rows"),
    "zeros for rows": (
        on_feats(lambda f: f + torch.zeros(f.shape[0], 4)), "the number of rows|RowCount",
    ),
    "a selection": (on_feats(lambda f: f[f[:, 0] > 0]), "calls __gt__|selects rows"),
    "a mean over rows": (on_feats(lambda f: f - f.mean(0)), "calls mean over the rows"),
    "a sort": (on_feats(lambda f: f.sort(0).values), "calls sort, for which there is no ONNX node"),
    "a tensor of its own": (on_feats(lambda f: f + OUTSIDE), "no parameter and no buffer"),
    "random numbers": (on_feats(lambda f: f + torch.rand(4)), "no parameter and no buffer"),
    "random rows": (on_feats(lambda f: f + torch.rand_like(f)), "calls rand_like"),
    "dropout": (
        lambda: Of(lambda self, x: with_feats(x, self.drop(feats_of(x))), drop=nn.Dropout()),
        r"drop \(Dropout\) drops features at random",
    ),
    "a norm in training": (
        lambda: Of(lambda self, x: with_feats(x, self.bn(feats_of(x))), bn=nn.BatchNorm1d(4)),
        rf"bn \(BatchNorm1d\) {STATISTICS}",
    ),
    "a view that is changed": (
        on_feats(lambda f: torch.cat([f[:, :2].mul_(2), f], 1)), "other tensors show a part",
    ),
    "coordinates of its own": (
        lambda: Of(
            lambda self, x: self.conv(
                spconv.SparseConvTensor(x.features, x.indices // 2, x.spatial_shape, 1)
            ),
            conv=spconv.SubMConv3d(4, 4, 3),
        ),
        "floordiv",
    ),
    "values of coordinates": (
        on_feats(lambda f: f) and (
            lambda: Of(lambda self, x: with_feats(x, feats_of(x) * x.indices.max()))
        ),
        "calls max",
    ),
    "selected sites": (
        lambda: Of(lambda self, x: x.select_by_index(x.features[:, 0] > 0)), "calls gt",
    ),
    "a layer of a user": (
        lambda: Of(lambda self, x: self.mine(x), mine=_OwnLayer()),
        r"mine \(_OwnLayer\) calls numpy.*Line: .*test_onnx_refusals.py",
    ),
    "a sparse addition": (
        lambda: Of(
            lambda self, x: spconv.functional.sparse_add(x, self.down(x)),
            down=spconv.SparseConv3d(4, 4, 3, 1, 1),
        ),
        "calls|coordinates",
    ),
    "no output": (lambda: Of(lambda self, x: 3), "returns no tensor"),
    "an output that does not depend on the scan": (
        lambda: Of(lambda self, x: self.conv.weight, conv=spconv.SubMConv3d(4, 4, 3)),
        "does not depend on the input",
    ),
    "values of a dense tensor": (
        lambda: Of(lambda self, x: x.dense() * x.dense().max().item()), "calls item",
    ),
    "a shape made of a dense tensor": (
        lambda: Of(lambda self, x: x.dense().nonzero()), "calls nonzero",
    ),
    "a mask of a dense tensor": (
        lambda: Of(lambda self, x: (lambda d: d[d > 0])(x.dense())), "calls __getitem__",
    ),
    "autocast": (
        lambda: Of(lambda self, x: _autocast(self.conv, x), conv=spconv.SubMConv3d(4, 4, 3)),
        r"conv \(SubMConv3d\) runs under autocast",
    ),
}  # fmt: skip

MINKOWSKI: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a channelwise convolution": (
        lambda: Of(
            lambda self, x: self.dw(x), dw=ME.MinkowskiChannelwiseConvolution(4, 3, dimension=3)
        ),
        r"dw \(MinkowskiChannelwiseConvolution\) is a channelwise convolution.*no node",
    ),
    "pruning": (
        lambda: Of(lambda self, x: self.prune(x, x.F[:, 0] > 0), prune=ME.MinkowskiPruning()),
        "calls gt",
    ),
    "the tensor of a global pool": (
        lambda: Of(lambda self, x: self.pool(x), pool=ME.MinkowskiGlobalMaxPooling()),
        r"output '' is a sparse tensor without cells, such as the result of a global pool",
    ),
    "an instance norm": (
        lambda: Of(lambda self, x: self.norm(x), norm=ME.MinkowskiInstanceNorm(4)),
        r"norm \(MinkowskiInstanceNorm\)",
    ),
    "a generative layer": (
        lambda: Of(
            lambda self, x: self.up(self.down(x)),
            down=ME.MinkowskiConvolution(4, 4, 2, 2, dimension=3),
            up=ME.MinkowskiGenerativeConvolutionTranspose(4, 4, 2, 2, dimension=3),
        ),
        r"up \(MinkowskiGenerativeConvolutionTranspose\)",
    ),
    "a union": (
        lambda: Of(
            lambda self, x: self.down(x) + self.other(x),
            down=ME.MinkowskiConvolution(4, 4, 2, 2, dimension=3),
            other=ME.MinkowskiConvolution(4, 4, 3, dimension=3),
        ),
        "coordinates|calls",
    ),
    "a tensor made inside": (
        lambda: Of(lambda self, x: self.conv(ME.SparseTensor(x.F, x.C)),
                   conv=ME.MinkowskiConvolution(4, 4, 3, dimension=3)),
        r"inside SparseTensor\.",
    ),
    "dense": (lambda: Of(lambda self, x: x.dense()[0]), "inside SparseTensor.dense"),
    "coordinates in input units": (
        lambda: Of(
            lambda self, x: (lambda y: y.C.float() + y.F)(self.down(x)),
            down=ME.MinkowskiConvolution(4, 4, 2, 2, dimension=3),
        ),
        "coordinates in a form that the file does not have",
    ),
}  # fmt: skip

ENGINE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a group norm": (
        lambda: Of(lambda self, x: self.norm(x), norm=tsnn.GroupNorm(2, 4)), r"norm \(GroupNorm\)",
    ),
    "len() of a sparse tensor": (
        lambda: Of(lambda self, x: x.replace(x.feats / len(x))), "number of rows",
    ),
    "num_rows": (
        lambda: Of(lambda self, x: x.replace(x.feats / x.num_rows)), "number of rows",
    ),
    "shape of a sparse tensor": (
        lambda: Of(lambda self, x: x.replace(x.feats * x.shape[0])), "number of rows",
    ),
    "listed pairs": (
        lambda: Of(
            lambda self, x: x.replace(ts.ops.sparse_pool(x.feats, _listed(x.feats))),
        ),
        "pairs of rows that the network lists",
    ),
    # The recorder does not see these numbers; the comparison on other scans finds them.
    "a number that goes around the recorder": (
        lambda: Of(lambda self, x: x.replace(x.feats * x.sites.num_rows)),
        "differs by .* when another scan runs through the file",
    ),
    "a constant that goes around the recorder": (
        lambda: Of(lambda self, x: x.replace(x.feats + float(x.sites.coords.sum()))),
        "differs by .* when another scan runs through the file",
    ),
}  # fmt: skip


class _OwnLayer(spconv.SubMConv3d):
    """A layer whose convolution a user has replaced."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3)

    def _conv_forward(self, training: bool, inp: Any, *args: Any, **kwargs: Any) -> Any:
        return inp.replace_feature(torch.from_numpy(inp.features.numpy()))


def _autocast(conv: Any, x: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return conv(x)


def _listed(feats: Any) -> Any:
    rows = torch.arange(plain(feats).shape[0])
    return ts.map_from_pairs(rows, rows, torch.tensor([0, len(rows)]), len(rows), len(rows))


CASES = [
    *((name, "spconv", spconv_tensor) for name in SPCONV),
    *((name, "minkowski", minkowski) for name in MINKOWSKI),
    *((name, "engine", engine) for name in ENGINE),
]


@pytest.mark.parametrize(
    ("name", "face", "tensor"), CASES, ids=lambda x: x if type(x) is str else ""
)
def test_the_error_names_module_and_reason(
    name: str, face: str, tensor: Callable[..., Any], tmp_path: Path
) -> None:
    make, words = {"spconv": SPCONV, "minkowski": MINKOWSKI, "engine": ENGINE}[face][name]
    net = make()
    net.training = False
    x = tensor(*sweep(0))
    net_runs = name not in ("numpy", "a list", "a layer of a user")
    with torch.no_grad():
        if net_runs:
            net(x)
    with pytest.raises(OnnxExportError, match=f"(?s)^export_onnx: .*({words})"):
        export_onnx(net, x, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_the_error_of_user_code_keeps_its_cause(tmp_path: Path) -> None:
    def broken(self: Any, x: Any) -> Any:
        raise KeyError("spatial_features")

    with pytest.raises(OnnxExportError, match="raised KeyError while it was recorded") as caught:
        export_onnx(Of(broken).eval(), engine(*sweep(0)), tmp_path / "net.onnx")
    assert isinstance(caught.value.__cause__, KeyError)


def test_hooks_are_gone_after_an_error(tmp_path: Path) -> None:
    from torch.nn.modules import module

    with pytest.raises(OnnxExportError):
        export_onnx(SPCONV["a sort"][0]().eval(), spconv_tensor(*sweep(0)), tmp_path / "net.onnx")
    assert not module._global_forward_hooks
    assert not module._global_forward_pre_hooks
    assert not module._global_forward_hooks_always_called


def test_a_global_pool_of_several_samples_is_refused():
    coords = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.int32)
    x = ME.SparseTensor(torch.randn(3, 4), coords)
    net = Of(lambda self, x: self.pool(x).F, pool=ME.MinkowskiGlobalMaxPooling()).eval()
    with pytest.raises(OnnxExportError, match=r"pool \(MinkowskiGlobalMaxPooling\) selects rows"):
        export_onnx(net, (x,), "unused.onnx")
