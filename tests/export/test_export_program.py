"""Exported programs equal the eager networks, run without this package, and report faults."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tests._capture_cases import EXTENT, NETS, scan
from tests._process import ROOT, run, write
from tritonspconv import ExportError, export_program
from tritonspconv.export._outputs import as_plain, check_equal
from tritonspconv.export._program import _grid

PAGE = ROOT / "docs" / "compile-export.md"
CAPACITY = 260

pytestmark = [
    # torch.export and AOTInductor call functions that torch itself has deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:copyreg"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


class Everything(nn.Module):
    """Each kind of layer of the engine, with two samples."""

    def __init__(self) -> None:
        super().__init__()
        n = ts.nn
        self.stem = n.Sequential(n.SubMConv3d(4, 8, 3), n.BatchNorm(8), n.ReLU())
        self.down = n.Sequential(n.SparseConv3d(8, 8, 2, 2), n.BatchNorm(8), nn.GELU())
        self.pool = n.MaxPool3d(3, 2, 1)
        self.up = n.SparseConvTranspose3d(8, 8, 3, 2, 1)
        self.back = n.SparseInverseConv3d(8, 8, 2)
        self.norm = n.InstanceNorm(16)
        self.last = n.Linear(16, 3)

    def forward(self, x: ts.SparseTensor) -> dict[str, Any]:
        stem = self.stem(x)
        down = self.down(stem)
        small = self.pool(down)
        joined = self.norm(ts.cat([stem, self.back(down, like=stem)]))
        return {
            "points": self.last(joined).feats,
            "up": self.up(small),
            "dense": small.dense(),
            "pooled": ts.ops.global_pool(down.feats, down.batch_index, 2, "max"),
            "parts": (down, 3, None),
            "x": x,
        }


class SpconvEverything(nn.Module):
    """Pools, a transposed and an inverse layer of ``compat.spconv``, in a batch dict."""

    def __init__(self) -> None:
        super().__init__()
        self.down = spconv.SparseSequential(
            spconv.SubMConv3d(4, 8, 3, indice_key="a"),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            spconv.SparseMaxPool3d(3, 2, 1, indice_key="p"),
            spconv.SubMConv3d(8, 8, 3, indice_key="b"),
        )
        self.back = spconv.SparseInverseConv3d(8, 8, 3, indice_key="p")
        self.up = spconv.SparseConvTranspose3d(8, 8, 3, 2, 1)
        self.mean = spconv.SparseGlobalAvgPool()

    def forward(self, batch_dict: dict[str, Any]) -> dict[str, Any]:
        x = spconv.SparseConvTensor(
            batch_dict["voxel_features"], batch_dict["voxel_coords"].int(), [EXTENT] * 3,
            batch_dict["batch_size"],
        )  # fmt: skip
        down = self.down(x)
        batch_dict["encoded"] = self.back(down)
        batch_dict["up"] = self.up(down)
        batch_dict["mean"] = self.mean(down)
        return batch_dict


class MinkowskiEverything(nn.Module):
    """A U-Net of ``compat.minkowski`` with a pool, given a sparse tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ME.MinkowskiConvolution(4, 8, 5, bias=True, dimension=3)
        self.down = ME.MinkowskiConvolution(8, 8, 2, stride=2, dimension=3)
        self.norm = ME.MinkowskiBatchNorm(8)
        self.pool = ME.MinkowskiAvgPooling(3, stride=2, dimension=3)
        self.up = ME.MinkowskiConvolutionTranspose(8, 8, 2, stride=2, dimension=3)
        self.mix = ME.MinkowskiConvolution(16, 8, 1, dimension=3)
        self.relu = ME.MinkowskiReLU()

    def forward(self, x: ME.SparseTensor) -> tuple[ME.SparseTensor, ME.SparseTensor]:
        stem = self.relu(self.stem(x))
        down = self.relu(self.norm(self.down(stem)))
        joined = ME.cat(self.up(down), stem)
        return self.mix(joined) + stem, self.pool(down)


def two_samples(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return features [N, 4] and coordinates [N, 4] of two samples."""
    feats, coords = scan(rows, seed)
    coords[rows // 3 :, 0] = 1
    return feats, coords


def engine_case(feats: Tensor, coords: Tensor) -> tuple[Any, ...]:
    return (ts.SparseTensor(feats, coords, spatial_shape=(EXTENT,) * 3, batch_size=2),)


def spconv_case(feats: Tensor, coords: Tensor) -> tuple[Any, ...]:
    frame = object()  # the network does not read it
    return ({"voxel_features": feats, "voxel_coords": coords, "batch_size": 2, "frame": frame},)


def minkowski_case(feats: Tensor, coords: Tensor) -> tuple[Any, ...]:
    return (ME.SparseTensor(feats, coords),)


CASES = {
    "tritonspconv": (Everything, engine_case, {}),
    "compat.spconv": (SpconvEverything, spconv_case, {"coords": "voxel_coords"}),
    "compat.minkowski": (MinkowskiEverything, minkowski_case, {}),
}


def made(name: str, **options: Any):
    """Return a network, its arguments for a scan, and its program."""
    kind, case, more = CASES[name]
    net = kind().eval()
    program = export_program(
        net, case(*two_samples(200, 0)), capacity=CAPACITY, headroom=4, **more, **options
    )
    return net, case, program


def buffers(feats: Tensor, coords: Tensor, capacity: int = CAPACITY) -> tuple[Tensor, ...]:
    """Return the inputs of a program; a result would show that rows behind the count were read."""
    n = len(coords)
    rows = torch.full((capacity, feats.shape[1]), torch.nan)
    cells = torch.full((capacity, coords.shape[1]), 1, dtype=torch.int32)
    rows[:n], cells[:n] = feats, coords
    return rows, cells, torch.tensor(n)


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest):
    """Make each library's network, its arguments and its program once."""
    torch.manual_seed(0)
    return made(request.param)


def test_a_program_equals_the_network_on_other_scans(exported) -> None:
    net, case, program = exported
    module = program.module()
    for rows in (CAPACITY, 90, 2):
        feats, coords = two_samples(rows, rows)
        with torch.no_grad():
            outputs, faults = module(*buffers(feats, coords))
            args = case(feats, coords)
            values = list(args[0].values()) if isinstance(args[0], dict) else []
            given = {id(value) for value in values if not isinstance(value, int)}
            expected = as_plain(net(*args), given)
        assert not faults.any()
        check_equal(outputs, expected)


def test_an_empty_scan_is_a_scan(exported) -> None:
    outputs, faults = exported[2].module()(*buffers(*two_samples(0, 0)))
    assert not faults.any()
    counts = [int(value["count"]) for value in tables(outputs)]
    assert counts
    assert not any(counts)


def tables(tree: Any) -> list[dict[str, Tensor]]:
    """Return the tables of rows among outputs."""
    if isinstance(tree, dict) and "count" in tree:
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [table for value in values for table in tables(value)]


def test_a_program_holds_torch_operations_of_fixed_shapes(exported) -> None:
    program = exported[2]
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    ours = [name for name in names if not name.startswith("aten.") and "getitem" not in name]
    assert not ours
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            assert all(type(extent) is int for extent in value.shape), node


def test_padding_of_results_is_zero(exported) -> None:
    outputs, _ = exported[2].module()(*buffers(*two_samples(90, 1)))
    for table in tables(outputs):
        count = int(table["count"])
        assert not table["features"][count:].any()
        if "coords" in table:
            assert bool((table["coords"][count:, 0] == -1).all())


def test_faults_say_what_is_wrong(exported) -> None:
    module = exported[2].module()
    feats, coords = two_samples(90, 1)
    rows, cells, _ = buffers(feats, coords)
    _, faults = module(rows.nan_to_num(), cells, torch.tensor(CAPACITY + 5))
    assert faults[0] == 5
    outside = coords.clone()
    outside[3:5, 0] = 2
    _, faults = module(*buffers(feats, outside))
    assert faults[1] == 2
    repeated = coords.clone()
    repeated[7] = repeated[8]
    _, faults = module(*buffers(feats, repeated))
    assert faults[2] == 1


@pytest.mark.parametrize("name", NETS)
def test_a_level_that_overflows_is_counted(name: str) -> None:
    net = NETS[name]().eval()
    example = dict(zip(("feats", "coords"), scan(20, 2), strict=True))
    program = export_program(
        net, (), example, capacity=CAPACITY, level_capacities=[100], coords="coords"
    )
    feats, coords = scan(CAPACITY, 1)
    outputs, faults = program.module()(*buffers(feats, coords))
    expected = net(feats, coords)
    assert faults[:3].tolist() == [0, 0, 0]
    assert faults[3] > 0
    if isinstance(outputs, dict):
        assert faults[3] == len(expected) - 100


def test_a_state_dict_keeps_the_names_of_the_network() -> None:
    net = NETS["compat.spconv"]().eval()
    example = dict(zip(("feats", "coords"), scan(60), strict=True))
    program = export_program(net, (), example, capacity=CAPACITY, coords="coords")
    names = {name for name in net.state_dict() if "num_batches" not in name}
    assert names <= {*program.state_dict}


SCRIPT = """
import sys, torch
program, scans, kind = sys.argv[1:]
if kind == "aoti":
    call = torch._inductor.aoti_load_package(program)
else:
    call = torch.export.load(program).module()
results = [call(*inputs) for inputs in torch.load(scans)]
assert not any(name.split(".")[0] in ("tritonspconv", "compat") for name in sys.modules)
torch.save(results, scans + ".out")
"""


def run_elsewhere(program: Path, kind: str, inputs: list[Any], folder: Path) -> list[Any]:
    """Run a program in a process that cannot import this package."""
    scans = folder / "scans.pt"
    torch.save(inputs, scans)
    script = write(folder, "script.py", SCRIPT)
    run("-I", script, program, scans, kind, cwd=folder, PYTHONPATH="")
    return torch.load(f"{scans}.out", weights_only=False)


def test_a_program_runs_without_this_package(exported, tmp_path: Path) -> None:
    program = exported[2]
    torch.export.save(program, tmp_path / "net.pt2")
    inputs = [buffers(*two_samples(rows, rows)) for rows in (0, 150)]
    found = run_elsewhere(tmp_path / "net.pt2", "program", inputs, tmp_path)
    for (outputs, faults), given in zip(found, inputs, strict=True):
        expected, _ = program.module()(*given)
        assert not faults.any()
        check_equal(outputs, expected)


class Refused(nn.Module):
    """A network with one step between two layers."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.first = spconv.SubMConv3d(4, 8, 3)
        self.step = step

    def forward(self, feats: Tensor, coords: Tensor) -> Any:
        return self.step(self.first(spconv.SparseConvTensor(feats, coords, [EXTENT] * 3, 1)))


class Step(nn.Module):
    """Calls a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


REFUSED = {
    "mean over rows": (lambda x: x.features.mean(0), "padding"),
    "selection of rows": (lambda x: x.features[x.features[:, 0] > 0], "size that depends"),
    "item": (lambda x: x.dense().sum().item(), "reads|value"),
    "branch": (lambda x: x if x.dense().sum() > 0 else x.minus(), "value"),
    "tolist": (lambda x: x.dense().flatten().tolist(), "tolist"),
    "numpy": (lambda x: torch.from_numpy(x.dense().numpy() * 2), "numpy"),
    "nonzero": (lambda x: x.dense().nonzero(), "shape or value"),
    "mask": (lambda x: x.dense()[x.dense() > 0], "mask"),
    "object": (lambda x: object(), "returns a object"),
    "pairs": (lambda x: x._sites.rows_of(x.indices), "cannot run|value"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_program_cannot_do_is_refused_by_module(name: str) -> None:
    function, reason = REFUSED[name]
    net = Refused(Step(function)).eval()
    example = dict(zip(("feats", "coords"), scan(60), strict=True))
    place = r"the model \(Refused\)" if name == "object" else r"the module 'step' \(Step\)"
    with pytest.raises(ExportError, match=rf"(?s){place} cannot be exported: .*({reason})"):
        export_program(net, (), example, coords="coords")


class Minkowski(nn.Module):
    """A network of ``compat.minkowski`` with one step behind a strided layer."""

    def __init__(self, function: Any, *layers: nn.Module) -> None:
        super().__init__()
        self.first = ME.MinkowskiConvolution(4, 8, 3, dimension=3)
        self.down = ME.MinkowskiConvolution(8, 8, 2, stride=2, dimension=3)
        self.layers = nn.ModuleList(layers)
        self.function = function

    def forward(self, x: ME.SparseTensor) -> Any:
        x = self.first(x)
        return self.function(x, self.down(x), *self.layers)


def test_layers_of_minkowski_without_a_fixed_size_are_refused_by_name() -> None:
    pruned = Minkowski(lambda x, _, prune: prune(x, x.F[:, 0] > 0), ME.MinkowskiPruning())
    with pytest.raises(ExportError, match=r"the module 'layers.0' \(MinkowskiPruning\)"):
        export_program(pruned.eval(), (ME.SparseTensor(*scan(60)),))
    up = ME.MinkowskiGenerativeConvolutionTranspose(8, 8, 2, stride=2, dimension=3)
    union = Minkowski(lambda x, down, up: x + up(down), up)
    with pytest.raises(ExportError, match="a comparison of the coordinates of coordinate map key"):
        export_program(union.eval(), (ME.SparseTensor(*scan(60)),))
    dense = Minkowski(lambda x, down: down.dense()[0])
    with pytest.raises(ExportError, match="pass shape="):
        export_program(dense.eval(), (ME.SparseTensor(*scan(60)),))


CORNER = torch.zeros(3, dtype=torch.int32)
OF_MINKOWSKI = {
    "dense": (lambda x, _: x.dense(torch.Size([1, 8] + [EXTENT] * 3), CORNER)[0], []),
    "generative": (
        lambda _, down, up: up(down),
        [ME.MinkowskiGenerativeConvolutionTranspose(8, 8, 2, stride=2, dimension=3)],
    ),
    "global pool": (
        lambda x, _, pool, spread: spread(x, pool(x)),
        [ME.MinkowskiGlobalAvgPooling(), ME.MinkowskiBroadcastMultiplication()],
    ),
    "pool transposed": (
        lambda _, down, up: up(down),
        [ME.MinkowskiPoolingTranspose(2, stride=2, dimension=3)],
    ),
}


@pytest.mark.parametrize("name", OF_MINKOWSKI)
def test_layers_of_minkowski_are_exported(name: str) -> None:
    function, layers = OF_MINKOWSKI[name]
    net = Minkowski(function, *layers).eval()
    program = export_program(net, (ME.SparseTensor(*scan(60)),), capacity=CAPACITY, headroom=2)
    feats, coords = scan(CAPACITY, 3)
    outputs, faults = program.module()(*buffers(feats, coords))
    assert not faults.any()
    check_equal(outputs, as_plain(net(ME.SparseTensor(feats, coords))))


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of its network runs without this package, in Python and in C++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    made, used = re.findall(
        r"```python\n(.*?)```", text.partition("## Export and deploy")[2], re.DOTALL
    )[:2]
    names: dict[str, Any] = {}
    exec(compile(made, "made", "exec"), names)
    run("-I", write(tmp_path, "used.py", used), cwd=tmp_path, PYTHONPATH="")

    capacity, package = 3000, tmp_path / "backbone_aoti.pt2"
    scans = [scan(rows, rows) for rows in (0, 1, 900)]
    inputs = [buffers(*each, capacity) for each in scans]
    expected = [names["program"].module()(*each)[0].detach() for each in inputs]
    for (outputs, faults), dense in zip(
        run_elsewhere(package, "aoti", inputs, tmp_path), expected, strict=True
    ):
        assert not faults.any()
        check_equal(outputs, dense)

    (source,) = re.findall(r"```cpp\n(.*?)```", text, re.DOTALL)
    assert "kCapacity = 60000" in source
    write(tmp_path, "runner.cpp", source.replace("kCapacity = 60000", f"kCapacity = {capacity}"))
    build(compiler, tmp_path)
    for (feats, coords), dense in zip(scans, expected, strict=True):
        feats.numpy().tofile(tmp_path / "features.bin")
        coords.numpy().tofile(tmp_path / "coords.bin")
        files = [package, "features.bin", "coords.bin", "out.bin"]
        subprocess.run([tmp_path / "runner", *files], cwd=tmp_path, check=True, timeout=120)
        out = torch.from_file(str(tmp_path / "out.bin"), size=dense.numel())
        check_equal(out.reshape(dense.shape), dense)


def build(compiler: str, folder: Path) -> None:
    """Compile the runner of the page."""
    home = Path(torch.__file__).parent
    include, lib = home / "include", home / "lib"
    subprocess.run(
        [
            compiler, "-std=c++20", "-O1", "runner.cpp", "-o", "runner", f"-I{include}",
            f"-I{include}/torch/csrc/api/include", f"-L{lib}", "-Wl,--no-as-needed", "-ltorch",
            "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}",
        ],
        cwd=folder, check=True, timeout=600,
    )  # fmt: skip


def test_a_step_may_write_in_place() -> None:
    def step(x: spconv.SparseConvTensor) -> Tensor:
        feats = x.features
        feats[:, 0] = 2.0
        feats += 0.5
        feats.relu_()
        return feats.data * 3

    net = Refused(Step(step)).eval()
    example = dict(zip(("feats", "coords"), scan(60), strict=True))
    program = export_program(net, (), example, coords="coords", capacity=CAPACITY)
    feats, coords = scan(100, 1)
    outputs, _ = program.module()(*buffers(feats, coords))
    with torch.no_grad():
        check_equal(outputs, net(feats, coords))


def test_a_number_of_rows_in_python_is_found_out() -> None:
    net = Refused(Step(lambda x: x.features / x.features.shape[0])).eval()
    example = dict(zip(("feats", "coords"), scan(60), strict=True))
    with pytest.raises(ExportError, match="other results than the network"):
        export_program(net, (), example, coords="coords")


def test_a_buffer_that_counts_is_refused() -> None:
    net = Refused(spconv.SparseConv3d(8, 8, 3, 2, record_voxel_count=True)).eval()
    example = dict(zip(("feats", "coords"), scan(60), strict=True))
    with pytest.raises(ExportError, match="max_num_voxels_during_training"):
        export_program(net, (), example, coords="coords")
    assert int(net.step.get_max_num_voxels()) == 0


def test_options_are_checked() -> None:
    net = NETS["compat.spconv"]()
    example = dict(zip(("feats", "coords"), scan(60), strict=True))
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        export_program(net, (), example, coords="coords")
    net.eval()
    with pytest.raises(TypeError, match=r"args must be a tuple .*such as \(x,\); got Tensor"):
        export_program(net, example["feats"])
    with pytest.raises(ValueError, match="export_program: exactly one argument"):
        export_program(net, (), example)
    for options, message in (
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"headroom": 0.5}, "headroom must be at least 1"),
        ({"level_capacities": [5, 5]}, "1 positive numbers"),
        ({"box": ((0, 0), (5, 5))}, "one entry for each of 3 axes"),
    ):
        with pytest.raises(ValueError, match=message):
            export_program(net, (), example, coords="coords", **options)
    empty = dict(zip(("feats", "coords"), scan(0), strict=True))
    with pytest.raises(ValueError, match="at least one row"):
        export_program(net, (), empty, coords="coords")


def test_an_example_that_repeats_rows_is_refused() -> None:
    feats, coords = scan(60)
    coords[1] = coords[0]
    net = NETS["tritonspconv"]().eval()
    with pytest.raises(ExportError, match="repeated"):
        export_program(net, (), {"feats": feats, "coords": coords}, coords="coords")


@pytest.mark.parametrize(("farthest", "reach"), [(0, 1), (1, 4), (-5, 16), (7, 16), (-8, 32)])
def test_without_a_box_the_grid_is_a_cube_that_reaches_twice_as_far(farthest, reach) -> None:
    grid = _grid(torch.tensor([[0, 0, farthest, 0], [2, 0, 0, 0]], dtype=torch.int32), None)
    assert grid.lower == (-reach,) * 3
    assert grid.shape == (2 * reach,) * 3
    assert grid.batch_size == 3
