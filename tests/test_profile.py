"""`tritonspconv profile` counts sites, pairs and maps rightly, and names a network's bound."""

import itertools
import json

import pytest
import torch
from torch import nn

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tests._process import write
from tritonspconv import ops
from tritonspconv.cli import main
from tritonspconv.cli import profile as profile_command
from tritonspconv.kernel_map import KernelMap
from tritonspconv.points import VoxelGrid
from tritonspconv.profile import LayerProfile, NetworkProfile, profile_network, script
from tritonspconv.profile.words import verdicts
from tritonspconv.testing import random_sites

CPU = torch.device("cpu")


def make_net() -> nn.Module:
    return spconv.SparseSequential(
        spconv.SubMConv3d(4, 8, 3, padding=1, indice_key="a"),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        spconv.SubMConv3d(8, 8, 3, padding=1, indice_key="a"),
        spconv.SparseConv3d(8, 16, 2, stride=2, indice_key="b"),
        spconv.SparseInverseConv3d(16, 8, 2, indice_key="b"),
        spconv.SubMConv3d(8, 5, 1, indice_key="c"),
    )


def test_layers_of_spconv():
    coords = random_sites(300, extent=12, batch_size=1).coords
    feats = torch.randn(300, 4)

    def make_input():
        return spconv.SparseConvTensor(feats, coords, [12, 12, 12], 1)

    calls = ops.sparse_conv, KernelMap.__init__
    found = profile_network(make_net(), make_input, CPU, passes=1)
    assert calls == (ops.sparse_conv, KernelMap.__init__)
    sparse = [layer for layer in found.layers if layer.role == "sparse"]
    assert [layer.role for layer in found.layers] == ["sparse", "norm", "other"] + ["sparse"] * 4
    coarse = len((coords[:, 1:] // 2).unique(dim=0))
    sites = [(layer.sites_in, layer.sites_out) for layer in sparse]
    assert sites == [(300, 300), (300, 300), (300, coarse), (coarse, 300), (300, 300)]
    assert [bool(layer.maps_built) for layer in sparse] == [True, False, True, False, False]
    near = (coords[:, None, 1:] - coords[:, 1:]).abs().amax(dim=-1) <= 1
    assert [layer.pairs for layer in sparse] == [int(near.sum())] * 2 + [300, 300, 0]
    assert sparse[0].flops == 2 * int(near.sum()) * 4 * 8
    for layer in sparse:
        assert layer.ms == pytest.approx(layer.map_ms + layer.product_ms)
        assert layer.product_ms > 0
    assert found.forward_ms > 0
    assert found.backward_ms > 0


def test_layers_of_minkowski_and_of_the_engine():
    coords = random_sites(200, extent=10, batch_size=1).coords
    feats = torch.randn(200, 3)
    net = nn.Sequential(
        ME.MinkowskiConvolution(3, 4, kernel_size=3, dimension=3),
        ME.MinkowskiBatchNorm(4),
        ME.MinkowskiConvolution(4, 5, kernel_size=2, stride=2, dimension=3),
    )
    found = profile_network(net, lambda: ME.SparseTensor(feats, coordinates=coords), CPU, passes=1)
    counts = [(layer.role, layer.maps_built, layer.pairs > 0) for layer in found.layers]
    assert [count for count in counts if count[0] == "sparse"] == [("sparse", 1, True)] * 2
    net = ts.nn.Sequential(ts.nn.SubMConv3d(3, 4, kernel_size=3), ts.nn.MaxPool3d(2, stride=2))

    def make_input():
        return ts.SparseTensor(feats, coords, spatial_shape=(10, 10, 10), batch_size=1)

    found = profile_network(net, make_input, CPU, backward=False, passes=1)
    assert [(layer.maps_built, layer.pairs > 0) for layer in found.layers] == [(1, True)] * 2
    assert found.backward_ms == 0


def test_the_command_writes_all_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "mynet.py", "from tests.test_profile import make_net\n")
    rows = torch.rand(400, 4).tolist()
    (tmp_path / "scan.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    arguments = ["profile", "mynet:make_net", "scan.csv", "--passes", "1", "--device", "cpu"]
    outputs = ["--html", "page.html", "--trace", "trace.json", "--json", "report.json"]
    assert main([*arguments, *outputs]) == 0
    assert "The slowest layers are" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert page.count("<i style=") == 4 + 4 + 4 * 5  # the key, the whole, and five layers
    assert page.count('<tr class="minor">') == 2  # norm and activation
    assert 'name="viewport"' in page
    assert "http" not in page
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"0", "3", "4"} <= {event.get("name") for event in events}
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["layers"]) == 7
    assert report["verdicts"]
    assert main(["profile", "torch.nn:ReLU", "scan.csv", "--device", "cpu"]) == 2
    assert "must hold layers of a sparse library" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["compat.spconv", "tritonspconv.nn"])
@pytest.mark.parametrize(("network", "shape"), [("second", [41, 20, 18]), ("unet", [48, 32, 32])])
def test_a_network_gets_the_extents_that_it_expects(library, network, shape):
    grid = VoxelGrid((0, 0, 0, 1.8, 2, 4), (0.1, 0.1, 0.1))
    assert grid.spatial_shape == [40, 20, 18]
    coords = torch.zeros(1, 4, dtype=torch.int32)
    made = profile_command._maker(library, network, torch.ones(1, 4), coords, grid, 1)()
    assert list(made.spatial_shape) == shape


SCRIPT = """
import argparse
import torch
from tests.test_profile import make_input, make_net

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int)
steps = parser.parse_args().steps
net = make_net()
torch.nn.Linear(3, 3)(torch.ones(1, 3))  # no network of ours
for step in range(steps):
    try:
        net(make_input()).features.sum().backward()
    except Exception:
        print("a handler of the script")
    print("step", step)
"""


def make_input():
    coords = random_sites(300, extent=12, batch_size=1).coords
    return spconv.SparseConvTensor(torch.randn(300, 4), coords, [12, 12, 12], 1)


def test_a_script_is_run_until_its_network_is_measured(tmp_path, capsys):
    path = write(tmp_path, "train.py", SCRIPT)
    page = tmp_path / "page.html"
    calls = ops.sparse_conv, KernelMap.__init__, nn.Module.__call__
    arguments = ["profile", str(path), "--html", str(page), "--call", "2"]
    assert main([*arguments, "--args", "--steps 5"]) == 0
    assert calls == (ops.sparse_conv, KernelMap.__init__, nn.Module.__call__)
    printed = capsys.readouterr().out
    assert "step 0" in printed
    assert "step 1" not in printed
    assert "SubMConv3d" in printed
    assert ", backward" not in printed  # it is not measured
    assert "train.py, forward pass 2" in page.read_text()
    assert ", backward" not in page.read_text()
    assert main([*arguments, "--args", "--steps 1"]) == 2
    assert "it ended after 1" in capsys.readouterr().err
    assert main(["profile", str(tmp_path / "none.py")]) == 2


WITH_LOSS = """
import torch
from tests.test_profile import make_input, make_net

net, loss = make_net(), torch.nn.ReLU()
for _ in range(2):
    loss(net(make_input()).features)
"""


def test_the_time_of_a_network_ends_before_the_next_module(tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(script, "now", lambda device: next(ticks))
    profile = script.profile_script(write(tmp_path, "loss.py", WITH_LOSS), call=2)
    assert profile.forward_ms == 1


@pytest.mark.filterwarnings("ignore")  # warnings of the originals
@pytest.mark.parametrize("library", ["spconv.pytorch", "MinkowskiEngine"])
def test_layers_of_the_originals(library):
    import collections
    import collections.abc

    if library == "MinkowskiEngine":
        collections.Sequence = collections.abc.Sequence
    module = pytest.importorskip(library, exc_type=ImportError)
    coords = random_sites(200, extent=10, batch_size=1).coords
    feats = torch.randn(200, 4)
    if library == "MinkowskiEngine":
        net = nn.Sequential(module.MinkowskiConvolution(4, 8, kernel_size=3, dimension=3))
        found = profile_network(
            net, lambda: module.SparseTensor(feats, coordinates=coords), CPU, passes=1
        )
    else:
        conv = module.SubMConv3d(4, 8, 3, padding=1, algo=module.ConvAlgo.Native)
        net = module.SparseSequential(conv)
        found = profile_network(
            net, lambda: module.SparseConvTensor(feats, coords, [10] * 3, 1), CPU,
            backward=False, passes=1,
        )  # fmt: skip
    (layer,) = found.layers
    assert (layer.role, layer.sites_in, layer.sites_out) == ("sparse", 200, 200)
    assert layer.ms > 0


def layer(role: str, **numbers: float) -> LayerProfile:
    return LayerProfile(role, role, role, **numbers)


def test_the_table_leaves_out_columns_that_say_nothing():
    convolution = layer("sparse", ms=4, host_ms=1, product_ms=3, map_ms=1)
    bare = NetworkProfile("CPU", [convolution, layer("norm", ms=1)], bandwidth=1, rate=1)
    head, *rows = profile_command.table(bare)
    assert head == [name for name in profile_command.HEAD if name not in ("host ms", "memory MiB")]
    assert [len(row) for row in rows] == [len(head)] * 2
    assert rows[0][-4:-2] == ["1.00", "3.00"]
    convolution.added_bytes = 1 << 20
    on_gpu = NetworkProfile("a GPU", [convolution], bandwidth=1, rate=1)
    head, row = profile_command.table(on_gpu)
    assert head == profile_command.HEAD
    assert (row[head.index("host ms")], row[-1]) == ("1.00", "1.0")


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (NetworkProfile("x", [layer("other", ms=1)]), "has no sparse convolution"),
        (NetworkProfile("x", [layer("sparse", ms=1)], busy=0.11), "GPU is busy 11 % of the time"),
        (NetworkProfile("x", [layer("sparse", ms=4, map_ms=2, maps_built=3)]),
         "take 50 % of the time: 3 maps are built for 1 layer."),
        (NetworkProfile("x", [layer("sparse", ms=4), layer("norm", ms=4)]),
         "Norms, activations and other dense modules take 50 %"),
        (NetworkProfile("x", [layer("sparse", ms=10, product_ms=10, moved_bytes=500, flops=10)],
                        bandwidth=1e5, rate=1e4),
         "reach 50 % of the bandwidth of a copy and 10 % of the rate"),
        (NetworkProfile("x", [layer("sparse", ms=10, product_ms=10, moved_bytes=50, flops=1)],
                        bandwidth=1e5, rate=1e4),
         "neither bounds them"),
    ],
)  # fmt: skip
def test_what_bounds_a_network_is_said_in_words(profile, expected):
    assert expected in verdicts(profile)[0]
