"""The training learns, resumes with the same bits, and reads the documented formats."""

import argparse
import collections
import collections.abc
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import compat.spconv.pytorch as spconv
from tests._process import run, write
from tritonspconv.cli import main, train, train_tasks
from tritonspconv.demo.scenes import DTYPES
from tritonspconv.training import (
    Sample,
    ScanSet,
    Segmentation,
    TrainingSettings,
    collate,
    fit,
    kitti_set,
    scannet_set,
    simulated_set,
)
from tritonspconv.training.captured import CapturedNetwork
from tritonspconv.training.data import FIRST_VAL_SEED, voxels_of
from tritonspconv.training.folders import SCANNET_CLASSES
from tritonspconv.training.loop import validate
from tritonspconv.training.pictures import Shown, draw_predictions

CPU = torch.device("cpu")


def layered_set(count: int = 4) -> ScanSet:
    """Scans in which the class of a voxel is its third of the height."""

    def load(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        points = torch.rand(400, 3, generator=generator) * torch.tensor([1.6, 1.6, 1.2])
        feats = torch.cat([points - 0.5, torch.ones(400, 1)], dim=1)
        return points, feats, (points[:, 2] / 0.4).long()

    return ScanSet(("low", "middle", "high"), 0.1, count, load)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return spconv.SparseSequential(
        spconv.SubMConv3d(4, 8, 3, padding=1, indice_key="a"),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        spconv.SubMConv3d(8, 3, 3, padding=1, indice_key="a"),
    )


def run_net(net: nn.Module, feats: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
    return net(spconv.SparseConvTensor(feats, coords, [64, 64, 64], 2)).features


def forward(net: nn.Module, batch: Sample) -> torch.Tensor:
    return run_net(net, batch.feats, batch.coords)


def test_it_learns_and_a_resumed_training_has_the_same_bits(tmp_path):
    settings = TrainingSettings(epochs=12, batch_size=2, learning_rate=3e-2)
    whole_net = make_net()
    task = Segmentation(forward, layered_set(), layered_set(2))
    whole = fit(whole_net, task, settings, CPU)
    assert whole[-1].loss < 0.5 * whole[0].loss
    assert whole[-1].score > 0.8

    class Stop(Exception):
        pass

    def stop(epoch):
        if epoch.number == 4:
            raise Stop

    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(Stop):  # in the fourth epoch, before its checkpoint
        fit(make_net(), task, settings, CPU, checkpoint=checkpoint, report=stop)
    net = make_net()
    numbers = []
    resumed = fit(
        net, task, settings, CPU, checkpoint=checkpoint, resume=True,
        report=lambda epoch: numbers.append(epoch.number),
    )  # fmt: skip
    assert numbers == list(range(4, 13))
    assert [(e.loss, e.score, e.parts) for e in resumed] == [
        (e.loss, e.score, e.parts) for e in whole
    ]
    for name, value in whole_net.state_dict().items():
        assert torch.equal(net.state_dict()[name], value)
    other = TrainingSettings(epochs=13, batch_size=2, learning_rate=3e-2)
    message = r"the settings must be those of .*; got epochs 12 there and 13 now\. Train"
    with pytest.raises(ValueError, match=message):
        fit(net, task, other, CPU, checkpoint=checkpoint, resume=True)
    fewer = Segmentation(forward, layered_set(3), layered_set(2))
    with pytest.raises(ValueError, match=r"got training scans 4 there and 3 now\."):
        fit(net, fewer, settings, CPU, checkpoint=checkpoint, resume=True)
    wider = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"the network must be that of .*other names or shapes"):
        fit(wider, task, settings, CPU, checkpoint=checkpoint, resume=True)
    for content in (b"no checkpoint", b""):
        checkpoint.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read as one \(\w+Error\)\. Train"):
            fit(net, task, settings, CPU, checkpoint=checkpoint, resume=True)


@pytest.mark.filterwarnings("ignore:captured function. .* rows are more than:RuntimeWarning")
def test_captured_training_computes_the_same():
    """A first batch, a smaller batch and a batch that does not fit give eager results."""
    captured = CapturedNetwork(run_net)
    scans = layered_set(6)
    batches = []
    for numbers in ([0, 1], [2], [3, 4, 5, 0, 1, 2]):
        feats, coords = collate([scans.sample(number) for number in numbers])[1::-1]
        batches.append((feats, (coords % torch.tensor([2, 64, 64, 64])).int()))
    nets = make_net().train(), make_net().train()
    for batch in batches:
        found = []
        for net, function in zip(nets, (run_net, captured), strict=True):
            net.zero_grad()
            out = function(net, *batch)
            out.square().mean().backward()
            found.append([out.detach(), *(p.grad for p in net.parameters())])
        for eager, other in zip(*found, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-6)
    fast = captured._of_mode[True].fast
    assert (fast.replays, sum(fast.eager_calls.values())) == (2, 1)
    with torch.no_grad():
        for net in nets:
            net.eval()
        for factor in (1, 3):  # steps change the weights between two validations
            for net in nets:
                net[0].weight.mul_(factor)
            eager = run_net(nets[0], *batches[0])
            torch.testing.assert_close(captured(nets[1], *batches[0]), eager, rtol=1e-4, atol=1e-6)
    assert (fast.replays, captured._of_mode[False].fast.replays) == (2, 2)
    with torch.enable_grad():  # neither training nor validation
        torch.testing.assert_close(captured(nets[1], *batches[0]), eager, rtol=1e-4, atol=1e-6)
    assert (fast.replays, captured._of_mode[False].fast.replays) == (2, 2)


def test_minkowskiengine_finds_the_names_that_python_moved(monkeypatch):
    monkeypatch.setattr(collections, "Sequence", None, raising=False)
    monkeypatch.setattr(
        train_tasks.importlib, "import_module", lambda name: (name, collections.Sequence)
    )
    module, algo = train_tasks._library("minkunet", "original", torch.device("cuda"))
    assert module == ("MinkowskiEngine", collections.abc.Sequence)
    assert algo is None


def test_settings_that_are_left_out_are_those_of_the_command():
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    given, settings = parser.parse_args([]), TrainingSettings(epochs=1)
    assert settings.batch_size == given.batch_size
    assert settings.learning_rate == given.learning_rate
    assert settings.dtype == DTYPES[given.dtype]
    assert settings.seed == given.seed


@pytest.mark.parametrize("world", [None, "1"])
def test_a_single_process_joins_no_group(world, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    with train._processes(argparse.Namespace(device="cpu")) as (device, is_first):
        assert (device, is_first) == (CPU, True)
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("change", ["a larger scene", "fewer scans"])
def test_one_grid_serves_all_batches_that_it_holds(change):
    """A captured training makes no graph of a batch that does not fit, or that has fewer scans."""
    calls = []

    def run(net, feats, coords, shape, batch_size):
        calls.append((shape, batch_size))
        return feats

    forward = train_tasks._forward_spunet(run)
    batch = collate([layered_set(2).sample(number) for number in range(2)])
    largest = batch.coords.amax(dim=0).tolist()
    forward(None, batch)
    coords = batch.coords.clone()
    if change == "fewer scans":
        coords[:, 0] = 0
    else:
        coords[-1, 3] = 100
    forward(None, batch._replace(coords=coords))
    (shape, size), (other, other_size) = calls
    assert all(
        extent % 16 == 0 and extent > 1.5 * n for extent, n in zip(shape, largest[1:], strict=True)
    )
    assert (other == shape, other_size) == ((True, 1) if change == "fewer scans" else (False, 2))
    assert size == 2
    assert other[2] >= 101 or change == "fewer scans"


def test_the_last_batch_is_filled_with_the_first_scans():
    seen = []

    class Counted(Segmentation):
        def batch(self, numbers, seeds):
            seen.append(list(numbers))
            return super().batch(numbers, seeds)

    task = Counted(forward, layered_set(5), layered_set(1))
    fit(make_net(), task, TrainingSettings(epochs=1, batch_size=2), CPU)
    first, second, third = seen
    assert sorted([*first, *second, third[0]]) == [0, 1, 2, 3, 4]
    assert third[1] == first[0]


def test_iou_counts_voxels():
    class Table(nn.Module):
        def forward(self, sample: Sample) -> torch.Tensor:
            # A network that predicts the low class, except in the highest layers.
            return nn.functional.one_hot(2 * (sample.coords[:, 1] >= 10).long(), 3).float()

    scans = layered_set(2)
    task = Segmentation(lambda net, batch: net(batch), scans, scans)
    iou = list(validate(Table(), task, CPU, torch.float32).parts.values())
    labels = torch.cat([scans.sample(number).labels for number in range(2)])
    heights = torch.cat([scans.sample(number).coords[:, 1] for number in range(2)])
    found = 2 * (heights >= 10).long()
    for number in range(3):
        both = ((labels == number) & (found == number)).sum()
        either = ((labels == number) | (found == number)).sum()
        assert iou[number] == pytest.approx(float(both / either))


@pytest.mark.parametrize("count", [2, 20, 30])
def test_class_weights_come_from_the_first_twenty_scans(count):
    asked = []

    def load(number):
        asked.append(number)
        labels = torch.tensor([0, 0, 0, 1])
        return torch.arange(12.0).view(4, 3), torch.zeros(4, 4), labels

    scans = ScanSet(("often", "seldom"), 0.1, count, load)
    weights = Segmentation(forward, scans, scans)._class_weights
    assert asked == list(range(min(count, 20)))
    share = torch.tensor([0.75, 0.25])
    torch.testing.assert_close(weights[1] / weights[0], (share[0] / share[1]).sqrt())
    torch.testing.assert_close((weights * share).sum(), torch.tensor(1.0))


def test_voxels_have_the_most_frequent_class_and_mean_features():
    points = torch.tensor([[0.05, 0, 0], [0.06, 0, 0], [0.07, 0, 0], [0.15, 0, 0], [0.16, 0, 0]])
    labels = torch.tensor([2, 1, 1, -1, -1])
    feats = torch.tensor([[1.0], [2.0], [6.0], [4.0], [4.0]])
    found = voxels_of(points, feats, labels, 0.1, 3)
    assert found.coords.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]
    assert found.feats.flatten().tolist() == [3, 4]
    assert found.labels.tolist() == [1, -1]
    labels[0] = labels[1] = -1  # one labelled point is enough
    assert voxels_of(points, feats, labels, 0.1, 3).labels.tolist() == [1, -1]
    batch = collate([found, found])
    assert batch.coords[:, 0].tolist() == [0, 0, 1, 1]
    labels[2] = 3
    with pytest.raises(IndexError):
        voxels_of(points, feats, labels, 0.1, 3)


@pytest.mark.parametrize("extent", [40, 2**23])  # keys have 63 bits, and these cells need 69
def test_voxels_ascend_and_each_is_there_once(extent):
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(0, 3, (400, 3), generator=generator)
    cells[:, 2] *= 5
    cells = torch.cat([cells, cells.new_tensor([[extent - 1] * 3])])
    feats = torch.rand(401, 2, generator=generator)
    found = voxels_of(cells.flip(1).float(), feats, torch.zeros(401).long(), 1.0, 1)
    expected = sorted({tuple(cell) for cell in cells.tolist()})
    assert [tuple(coord) for coord in found.coords[:, 1:].tolist()] == expected
    for coord, mean in zip(found.coords[:, 1:], found.feats, strict=True):
        torch.testing.assert_close(mean, feats[(cells == coord).all(dim=1)].mean(dim=0))


@pytest.mark.parametrize("kind", ["rooms", "streets"])
def test_simulated_splits_share_no_scan(kind):
    first, second = simulated_set(kind, "train", 1), simulated_set(kind, "val", 1)
    assert FIRST_VAL_SEED > 10_000
    a, b = first.sample(0), second.sample(0)
    assert a.coords.shape != b.coords.shape
    assert torch.equal(a.coords, first.sample(0).coords)
    assert len(a.labels.unique()) > 5
    turned = first.sample(0, augment_seed=1)
    assert turned.coords.min() == 0
    assert not torch.equal(turned.coords, a.coords)
    assert torch.equal(turned.coords, first.sample(0, augment_seed=1).coords)


def test_semantic_kitti_folders_are_read(tmp_path):
    rng = np.random.default_rng(0)
    for sequence in ("00", "08"):
        folder = tmp_path / "sequences" / sequence
        (folder / "velodyne").mkdir(parents=True)
        (folder / "labels").mkdir()
        points = rng.uniform(-20, 20, (50, 4)).astype(np.float32)
        points.tofile(folder / "velodyne" / "000000.bin")
        # The upper half of a label is the number of the object.
        labels = np.array([40, 10, 252, 1, 99] * 10, np.uint32) | (7 << 16)
        labels.tofile(folder / "labels" / "000000.label")
    scans = kitti_set(tmp_path, "val", 0.01)
    assert scans.count == 1
    sample = scans.sample(0)
    assert sorted(sample.labels.tolist()) == [-1] * 20 + [0] * 20 + [8] * 10
    assert [scans.class_names[0], scans.class_names[8]] == ["car", "road"]
    (tmp_path / "sequences" / "08" / "velodyne" / "000000.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"000000.bin must hold the 50 points"):
        kitti_set(tmp_path, "val").sample(0)
    with pytest.raises(FileNotFoundError, match=r"must hold sequences/NN/labels"):
        kitti_set(tmp_path / "sequences", "train")


def write_scannet(folder, scenes):
    """Write scenes of six vertices as ScanNet has them; labels 1, 39 and 40, twice each."""
    plyfile = pytest.importorskip("plyfile")
    for scene in scenes:
        (folder / "scans" / scene).mkdir(parents=True)
        vertex = np.zeros(
            6, [(n, "<f4") for n in "xyz"] + [(n, "u1") for n in ("red", "green", "blue")]
        )
        vertex["x"], vertex["red"] = np.arange(6), 255
        stem = folder / "scans" / scene / f"{scene}_vh_clean_2"
        plyfile.PlyData([plyfile.PlyElement.describe(vertex, "vertex")]).write(f"{stem}.ply")
        label = np.array([(n,) for n in (1, 39, 40) * 2], [("label", "<u2")])
        plyfile.PlyData([plyfile.PlyElement.describe(label, "vertex")]).write(f"{stem}.labels.ply")


def test_scannet_folders_are_read(tmp_path):
    write_scannet(tmp_path, ["scene0000_00", "scene0001_00"])
    write(tmp_path, "scannetv2_train.txt", "scene0000_00\nscene0042_00\n")
    write(tmp_path, "scannetv2_val.txt", "scene0001_00\n")
    scans = scannet_set(tmp_path, "train", 0.5)
    assert scans.count == 1
    sample = scans.sample(0)
    assert sample.labels.tolist() == [0, 19, -1] * 2
    assert [SCANNET_CLASSES[n] for n in (0, 19)] == ["wall", "other furniture"]
    assert sample.feats[:, 0].tolist() == [0.5] * 6
    assert sample.feats[:, 1].tolist() == [-0.5] * 6
    mesh = tmp_path / "scans" / "scene0001_00" / "scene0001_00_vh_clean_2.ply"
    mesh.write_bytes(b"ply\nnothing")
    with pytest.raises(ValueError, match=r"vh_clean_2\.ply must be a PLY file"):
        scannet_set(tmp_path, "val").sample(0)
    write(tmp_path, "scannetv2_val.txt", "scene0009_00\n")
    with pytest.raises(FileNotFoundError, match=r"must hold scans/SCENE"):
        scannet_set(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match=r"must hold scannetv2_train\.txt"):
        scannet_set(tmp_path / "scans", "train")


TWO_PROCESSES = """
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.test_training import forward, layered_set, make_net, run_net
from tritonspconv.training import Segmentation, TrainingSettings, fit
from tritonspconv.training.captured import CapturedNetwork

torch.set_num_threads(1)
dist.init_process_group("gloo")
folder, resume = Path(sys.argv[1]), sys.argv[2] == "resume"
if sys.argv[3] == "captured":
    captured = CapturedNetwork(run_net)

    def forward(net, batch):
        return captured(net, batch.feats, batch.coords)


def keep(epoch):
    if epoch.number == 3 and not resume:  # the checkpoint is still that of the second epoch
        shutil.copy(folder / "whole.pt", folder / "resume.pt")


net = make_net()
history = fit(
    net,
    Segmentation(forward, layered_set(), layered_set(3)),
    TrainingSettings(epochs=4, batch_size=2, learning_rate=3e-2),
    torch.device("cpu"),
    checkpoint=folder / f"{sys.argv[2]}.pt",
    resume=resume,
    report=keep,
)
result = {"net": net.state_dict(), "losses": [e.loss for e in history], "score": history[-1].score}
torch.save(result, folder / f"{sys.argv[2]}{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


def train_in_two_processes(folder, name: str, how: str) -> None:
    script = write(folder, "two.py", TWO_PROCESSES)
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    run(*launch, script, folder, name, how, cwd=folder)


@pytest.mark.slow
def test_two_processes_train_a_captured_network(tmp_path):
    train_in_two_processes(tmp_path, "whole", "captured")
    first, other = (torch.load(tmp_path / f"whole{rank}.pt") for rank in range(2))
    assert first["losses"][-1] < 0.8 * first["losses"][0]
    assert other["losses"] == first["losses"]
    for name, value in first["net"].items():
        assert torch.equal(other["net"][name], value), name


@pytest.mark.slow
def test_two_processes_train_one_network_and_resume_with_the_same_bits(tmp_path):
    for name in ("whole", "resume"):
        train_in_two_processes(tmp_path, name, "eager")
    names = ("whole0", "whole1", "resume0", "resume1")
    first, *others = (torch.load(tmp_path / f"{name}.pt") for name in names)
    assert first["losses"][-1] < 0.8 * first["losses"][0]
    for other in others:
        assert other["losses"] == first["losses"]
        assert other["score"] == first["score"]
        for name, value in first["net"].items():
            assert torch.equal(other["net"][name], value), name
    # One process may not resume the run of two, because its batch norms would see other rows.
    alone = TrainingSettings(epochs=4, batch_size=2, learning_rate=3e-2)
    task = Segmentation(forward, layered_set(), layered_set(3))
    with pytest.raises(ValueError, match="got processes 2 there and 1 now"):
        fit(make_net(), task, alone, CPU, checkpoint=tmp_path / "resume.pt", resume=True)


def test_a_row_of_a_picture_has_the_same_height_in_every_picture(tmp_path):
    pytest.importorskip("matplotlib")
    coords = torch.tensor([[0, 0, 0, 0], [0, 0, 5, 5]])
    scan, heights = Shown(coords, torch.tensor([0, 1]), torch.tensor([0, 0])), []
    for count in (1, 2, 3):
        path = tmp_path / f"{count}.png"
        draw_predictions(path, [scan] * count, ("low", "high"))
        heights.append(int.from_bytes(path.read_bytes()[20:24], "big"))
    # The key takes some height too.
    assert heights[2] - heights[1] == heights[1] - heights[0] > heights[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize("network", ["minkunet", "spunet"])
def test_the_command_trains_and_draws(network, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    arguments = ["train", "--network", network, "--out", str(out), "--narrow", "16"]
    arguments += ["--scans", "2", "--val-scans", "1", "--epochs", "1", "--device", "cpu"]
    assert main([*arguments, "--voxel", "0.2", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "epoch   1: loss" in printed
    assert "epoch 1 takes longer than the others: it simulates the scans" in printed
    assert not math.isnan(float(printed.split("loss ")[1].split(",")[0]))
    for name in ("curves.png", "predictions.png", "checkpoint.pt"):
        assert (out / name).stat().st_size > 10_000
    assert main(["train", "--resume", "--out", str(tmp_path / "none")]) == 2
    assert "--resume needs" in capsys.readouterr().err


@pytest.mark.slow
def test_the_original_trains_beside_ours(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("spconv.pytorch")
    report = tmp_path / "report.json"
    arguments = ["train", "--network", "spunet", "--backend", "ours", "original", "--narrow", "16"]
    arguments += ["--scans", "1", "--val-scans", "1", "--epochs", "1", "--batch-size", "1"]
    arguments += [
        "--device",
        "cpu",
        "--voxel",
        "0.3",
        "--out",
        str(tmp_path),
        "--json",
        str(report),
    ]
    assert main(arguments) == 0
    assert "spunet through spconv.pytorch on CPU" in capsys.readouterr().out
    ours, original = (run["epochs"][0] for run in json.loads(report.read_text())["runs"])
    assert ours["loss"] == pytest.approx(original["loss"], rel=1e-4)
    assert (tmp_path / "checkpoint-original.pt").is_file()


def test_the_picture_leaves_out_ceilings(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    coords = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 5, 0, 0], [0, 5, 0, 1]])
    scan = Shown(coords, torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 2, 2]))
    draw_predictions(tmp_path / "a.png", [scan, scan], ("floor", "wall", "ceiling"))
    (figure,) = figures
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles[1:3] == ["prediction", "wrong: 50.0 %, ceiling left out"]
    assert titles[::3] == ["scan 0: truth", "scan 1: truth"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["floor", "wall"]
    draw_predictions(tmp_path / "a.png", [scan], ("floor", "wall", "roof"))
    assert figures[1].axes[2].get_title(loc="left") == "wrong: 25.0 %"
