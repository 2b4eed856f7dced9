"""Published networks as ONNX: the file gives the network's results, on other scans too."""

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
from tests.export._scans import SHAPE, engine, minkowski, spconv_tensor, sweep, trained
from tests.nn.blocks.published import DetectorBlock, SegmentorBlock
from tritonspconv import nn as tsnn
from tritonspconv.export import OnnxExportError, OnnxNetwork, export_onnx
from tritonspconv.export.onnx.schema import _schemas
from tritonspconv.models import lidar
from tritonspconv.models.minkowski import mink_unet, mink_unet_of_spconv

onnx = pytest.importorskip("onnx", reason="onnx is not installed")


class EngineUNet(nn.Module):
    """A small U-Net of the engine's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = tsnn.Sequential(tsnn.SubMConv3d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU())
        self.down = tsnn.SparseConv3d(8, 16, 3, 2, 1)
        self.middle = tsnn.Sequential(tsnn.SubMConv3d(16, 16, (3, 1, 3), dilation=(2, 1, 1)))
        self.up = tsnn.SparseInverseConv3d(16, 8, 3)
        self.wide = tsnn.SparseConvTranspose3d(16, 8, 3, 2, 1)
        self.head = tsnn.Linear(16, 3)

    def forward(self, x: ts.SparseTensor) -> Any:
        x = self.stem(x)
        y = self.middle(self.down(x))
        z = self.head(ts.cat([x, self.up(y, x)]))
        return z, self.wide(y, x) + x


class ResidualOfPublishedBlocks(nn.Module):
    """Blocks of CenterPoint and Pointcept, with in-place ReLUs and norms by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = DetectorBlock(
            4, 8, downsample=spconv.SubMConv3d(4, 8, 1, indice_key="one"), indice_key="a"
        )
        self.down = spconv.SparseMaxPool3d(2, 2, indice_key="down")
        self.second = SegmentorBlock(8, 16, indice_key="b")
        self.up = spconv.SparseInverseConv3d(16, 8, 2, indice_key="down")

    def forward(self, x: Any) -> Any:
        y = self.first(x)
        return self.up(self.second(self.down(y)))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "SECOND": (lambda: lidar.second_encoder(spconv), spconv_tensor),
    "residual encoder": (lambda: lidar.residual_encoder(spconv), spconv_tensor),
    "SpUNet": (lambda: lidar.sparse_unet(spconv, channel_divisor=8), spconv_tensor),
    "MinkUNet": (lambda: mink_unet(ME, depth=14, channel_divisor=8), minkowski),
    "MinkUNet of spconv": (
        lambda: mink_unet_of_spconv(spconv, depth=14, channel_divisor=8),
        spconv_tensor,
    ),
    "engine": (EngineUNet, engine),
    "published blocks": (ResidualOfPublishedBlocks, spconv_tensor),
}


@pytest.mark.parametrize("fold", [False, True], ids=["plain", "folded"])
@pytest.mark.parametrize("name", NETS)
def test_the_file_computes_what_the_network_computes(name: str, fold: bool, tmp_path: Path) -> None:
    make, tensor = NETS[name]
    net = trained(make())
    others = [tensor(*sweep(seed)) for seed in (1, 2, 3)]
    path = tmp_path / "net.onnx"
    report = export_onnx(net, tensor(*sweep(0)), path, fold=fold, check=others)
    assert len({check.rows for check in report.checks}) == len(report.checks) == 6
    assert report.max_error <= 2e-6 * max(check.max_value for check in report.checks)
    assert all(check.max_value > 0.01 for check in report.checks)
    # Compare with numbers that the export did not make, and run the checker of the onnx package.
    found = OnnxNetwork(path)(others[0])
    with torch.no_grad():
        expected = net(others[0])
    first = found if not isinstance(found, dict) else next(iter(found.values()))
    right = expected[0] if isinstance(expected, tuple) else expected
    feats = next(getattr(right, n) for n in ("feats", "features", "F") if hasattr(right, n))
    torch.testing.assert_close(first.feats, feats, rtol=1e-5, atol=1e-5)
    onnx.checker.check_model(onnx.load(path))
    if fold:
        assert "BatchNormalization" not in report.operators


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    net = trained(lidar.second_encoder(spconv)).to(dtype)
    scans = [spconv_tensor(*sweep(seed, dtype=dtype)) for seed in range(2)]
    report = export_onnx(net, scans[0], tmp_path / "net.onnx", check=scans[1:])
    # The attribute epsilon is a float32. Sums that differ in the last bits of float32 may round to
    # neighbours in float16.
    largest = max(check.max_value for check in report.checks)
    limit = 1e-9 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps * largest
    assert report.max_error < limit
    assert OnnxNetwork(tmp_path / "net.onnx")(scans[1])["0"].dtype == dtype


class Detector(nn.Module):
    """SECOND with a dense head, which makes its sparse tensor itself, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = lidar.second_encoder(spconv)
        self.neck = nn.Sequential(
            nn.Conv2d(256, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
            nn.ConvTranspose2d(16, 8, 2, 2),
        )  # fmt: skip
        self.score = nn.Conv2d(8, 3, 1)
        self.register_buffer("shift", torch.randn(8, 1, 1))

    def forward(self, voxels: Any, coords: Any, batch_size: int) -> dict[str, Any]:
        x = spconv.SparseConvTensor(voxels, coords.int(), SHAPE, batch_size)
        dense = self.encoder(x)[0].dense()
        n, c, d, h, w = dense.shape
        bev = self.neck(dense.view(n, c * d, h, w))
        bev += self.shift
        return {"score": self.score(bev).permute(0, 2, 3, 1).sigmoid(), "bev": bev}


@pytest.mark.slow
def test_a_detector_with_its_dense_head(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    net = trained(Detector())

    def scan(seed: int) -> tuple[Any, ...]:
        feats, coords = sweep(seed)
        return feats, coords.long(), 1

    path = tmp_path / "net.onnx"
    report = export_onnx(net, scan(0), path, fold=True, check=[scan(1)])
    assert report.inputs == ("voxels", "coords")
    assert report.outputs == ("score", "bev")
    assert report.operators["ConvTranspose"] == 1
    assert report.max_error < 1e-5
    feats, coords, _ = scan(2)
    found = OnnxNetwork(path)(feats, coords)
    with torch.no_grad():
        torch.testing.assert_close(found, net(feats, coords, 1), rtol=1e-4, atol=1e-5)
    onnx.checker.check_model(onnx.load(path))
    with pytest.raises(ValueError, match="lie outside the grid"):
        OnnxNetwork(path)(feats, coords + torch.tensor([1, 0, 0, 0]))


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_rows(rows: int, tmp_path: Path) -> None:
    net = trained(EngineUNet())
    feats, coords = sweep(0)
    export_onnx(net, engine(feats, coords), tmp_path / "net.onnx")
    few = engine(feats[:rows], coords[:rows])
    found = OnnxNetwork(tmp_path / "net.onnx")(few)
    with torch.no_grad():
        for path, expected in zip(("0", "1"), net(few), strict=True):
            torch.testing.assert_close(found[path].feats, expected.feats)
            assert torch.equal(found[path].coords, expected.coords)


def test_a_batch_of_samples(tmp_path: Path) -> None:
    def batch(*seeds: int) -> spconv.SparseConvTensor:
        scans = [sweep(seed) for seed in seeds]
        coords = [xyz + torch.tensor([n, 0, 0, 0]).int() for n, (_, xyz) in enumerate(scans)]
        return spconv.SparseConvTensor(
            torch.cat([f for f, _ in scans]), torch.cat(coords), SHAPE, 2
        )

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = spconv.SparseConv3d(4, 8, 3, 2, 1)
            self.pool = spconv.SparseGlobalMaxPool()

        def forward(self, x: Any) -> Any:
            x = self.conv(x)
            return self.pool(x), x.dense()

    net = Pooled().eval()
    path = tmp_path / "net.onnx"
    report = export_onnx(net, batch(0, 1), path, check=[batch(2, 3)])
    assert report.max_error == 0
    assert OnnxNetwork(path).batch_size == 2
    with pytest.raises(ValueError, match=r"batch_size=2.*got 1"):
        OnnxNetwork(path)(spconv_tensor(*sweep(0)))


def test_shared_layers_and_their_weights_stand_in_the_file_once(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = spconv.SubMConv3d(4, 4, 3, indice_key="a")
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Any) -> Any:
            for _ in range(2):
                x = self.conv(x)
                x = x.replace_feature(self.norm(x.features))
            return x

    net = trained(Twice())
    export_onnx(net, spconv_tensor(*sweep(0)), tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    names = [tensor.name for tensor in model.graph.initializer]
    assert sorted(names) == sorted(
        ["conv.weight", "conv.bias", "norm.weight", "norm.bias", "norm.running_mean",
         "norm.running_var"]
    )  # fmt: skip
    convs = [node for node in model.graph.node if node.op_type == "SparseConvolution"]
    keys = [a.s for node in convs for a in node.attribute if a.name == "indice_key"]
    assert keys == [b"a", b"a"]
    assert [list(model.graph.initializer[0].dims)] == [[4, 3, 3, 3, 4]]


def test_the_checker_rejects_a_node_that_does_not_fit_its_schema(tmp_path: Path) -> None:
    export_onnx(EngineUNet().eval(), engine(*sweep(0)), tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    node = next(node for node in model.graph.node if node.op_type == "SparseConvolution")
    for attribute in list(node.attribute):
        if attribute.name == "stride":
            node.attribute.remove(attribute)
    with pytest.raises(onnx.checker.ValidationError, match="stride"):
        onnx.checker.check_model(model)


def test_readers_may_rely_on_all_attributes_but_these() -> None:
    optional = {
        schema.name: {name for name, a in schema.attributes.items() if not a.required}
        for schema in _schemas(onnx.defs.OpSchema)
    }
    relation = {"input_spatial_shape", "output_spatial_shape", "taps"}
    assert optional == {
        "SparseConvolution": relation | {"act_type"},
        "SparsePool": relation | {"floor"},
        "SparseToDense": set(),
        "SparseGlobalPool": set(),
    }


def test_the_example_and_the_network_stay_as_they_were(tmp_path: Path) -> None:
    net = trained(NETS["published blocks"][0]())
    x = spconv_tensor(*sweep(0))
    feats, state = x.features.clone(), {k: v.clone() for k, v in net.state_dict().items()}
    export_onnx(net, x, tmp_path / "net.onnx", fold=True)
    assert torch.equal(x.features, feats)
    assert not x.indice_dict
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())
    net.train()
    net(x).features.sum().backward()


def test_inputs_that_do_not_fit_the_file(tmp_path: Path) -> None:
    feats, coords = sweep(0)
    export_onnx(EngineUNet().eval(), engine(feats, coords), tmp_path / "net.onnx")
    network = OnnxNetwork(tmp_path / "net.onnx")
    with pytest.raises(TypeError, match=r"takes 1 inputs, \['x'\]; got 2"):
        network(feats, coords)
    with pytest.raises(TypeError, match="'x' must be a sparse tensor; got Tensor"):
        network(feats)
    with pytest.raises(ValueError, match=r"spatial_shape=\[41, 160, 160\].*got \[64, 160, 160\]"):
        network(ts.SparseTensor(feats, coords, spatial_shape=[64, 160, 160], batch_size=1))
    with pytest.raises(ValueError, match="repeat a site"):
        network(engine(torch.cat([feats, feats]), torch.cat([coords, coords])))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), tmp_path / "x.onnx")
    with pytest.raises(ValueError, match=r"tritonspconv\.signature"):
        OnnxNetwork(tmp_path / "x.onnx")


def test_arguments(tmp_path: Path) -> None:
    net, x = EngineUNet().eval(), engine(*sweep(0))
    with pytest.raises(ValueError, match="dialect must be one of"):
        export_onnx(net, x, tmp_path / "net.onnx", dialect="tensorrt")  # pyright: ignore
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        export_onnx(EngineUNet(), x, tmp_path / "net.onnx")
    twice = engine(torch.cat([x.feats, x.feats]), torch.cat([x.coords, x.coords]))
    with pytest.raises(OnnxExportError, match="repeat an earlier row"):
        export_onnx(net, twice, tmp_path / "net.onnx")
    with pytest.raises(OnnxExportError, match="has 1 rows; an example needs at least two"):
        export_onnx(net, engine(x.feats[:1], x.coords[:1]), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_batch_dict_whose_dense_tensor_is_changed_in_place(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = spconv.SparseConv3d(4, 8, 3, 4, 1)

        def forward(self, batch_dict: dict[str, Any]) -> dict[str, Any]:
            x = spconv.SparseConvTensor(
                batch_dict["voxel_features"], batch_dict["voxel_coords"].int(), SHAPE,
                batch_dict["batch_size"],
            )  # fmt: skip
            batch_dict["encoded"] = self.conv(x)
            dense = batch_dict["encoded"].dense()
            dense.relu_()
            n, c, d, h, w = dense.shape
            bev = dense.view(n, c * d, h, w)
            bev[:, 0] = -1
            batch_dict["dense"], batch_dict["bev"] = dense, bev * 2
            return batch_dict

    def scan(seed: int) -> dict[str, Any]:
        feats, coords = sweep(seed)
        return {"voxel_features": feats, "voxel_coords": coords.long(), "batch_size": 1}

    net, given = Backbone().eval(), scan(0)
    report = export_onnx(net, given, tmp_path / "net.onnx", check=[scan(1)])
    assert report.max_error == 0
    assert report.inputs == ("batch_dict.voxel_features", "batch_dict.voxel_coords")
    assert list(given) == ["voxel_features", "voxel_coords", "batch_size"]
    found = OnnxNetwork(tmp_path / "net.onnx")(*list(scan(2).values())[:2])
    assert found.keys() == {"voxel_features", "voxel_coords", "encoded", "dense", "bev"}
    with torch.no_grad():
        assert torch.equal(found["bev"], net(scan(2))["bev"])
    onnx.checker.check_model(onnx.load(tmp_path / "net.onnx"))


def test_coordinates_that_the_tensor_stride_does_not_divide(tmp_path: Path) -> None:
    feats, coords = sweep(0)
    net = ME.MinkowskiConvolution(4, 4, 3, stride=2, dimension=3).eval()
    with pytest.raises(ValueError, match="not multiples of the tensor stride"):
        export_onnx(net, ME.SparseTensor(feats, coords, tensor_stride=2), tmp_path / "net.onnx")
    steps = torch.tensor([1, 2, 2, 2], dtype=torch.int32)
    doubled = [ME.SparseTensor(f, c * steps, tensor_stride=2) for f, c in map(sweep, range(2))]
    report = export_onnx(net, doubled[0], tmp_path / "net.onnx", check=doubled[1:])
    assert report.max_error < 1e-6
