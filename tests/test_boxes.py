"""Overlaps, average precision, maps and readers of boxes, and a detector that learns."""

import json
import math

import numpy as np
import pytest
import torch

import compat.spconv.pytorch as spconv
from tests._process import write
from tritonspconv.cli import main
from tritonspconv.models.detector import second_detector
from tritonspconv.points import VoxelGrid
from tritonspconv.testing.lidar import CLASS_NAMES, simulate_sweep
from tritonspconv.training import (
    BoxScene,
    BoxSet,
    Detection,
    TrainingSettings,
    average_precision,
    detection,
    fit,
    kitti_boxes,
    overlaps,
    simulated_boxes,
)
from tritonspconv.training.box_scenes import changed_scene
from tritonspconv.training.boxes import Judged, corners, distinct, points_inside
from tritonspconv.training.captured import CapturedNetwork
from tritonspconv.training.detection import box_batch, boxes_of, maps_of, run_detector
from tritonspconv.training.loop import follow_quickly

CPU = torch.device("cpu")
GRID = VoxelGrid((0.0, -6.4, -3.0, 12.8, 6.4, 1.0), (0.2, 0.2, 0.1))
FINE = VoxelGrid((0.0, -6.4, -3.0, 12.8, 6.4, 1.0), (0.1, 0.1, 0.1))


def random_boxes(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.tensor([1.0, -5.0, -2.0, 3.5, 1.5, 1.2, -3.0])
    high = torch.tensor([11.0, 5.0, -1.0, 5.0, 2.0, 2.0, 3.0])
    return low + (high - low) * torch.rand(n, 7, generator=generator)


@pytest.mark.parametrize(
    ("other", "expected", "volume"),
    [
        ([0, 0, 0, 4, 2, 2, 0], 1, 1),
        ([0, 0, 0, 4, 2, 2, math.pi], 1, 1),
        ([2, 0, 0, 4, 2, 2, 0], 1 / 3, 1 / 3),
        ([0, 0, 1, 4, 2, 2, 0], 1, 1 / 3),
        ([0, 0, 3, 4, 2, 2, 0], 1, 0),
        ([0, 0, 0, 4, 2, 2, math.pi / 2], 4 / 12, 4 / 12),
        ([9, 0, 0, 4, 2, 2, 0], 0, 0),
        # A square that stands on its corner in a square of the same side: an octagon.
        ([0, 0, 0, 2, 2, 2, math.pi / 4], None, None),
    ],
)
def test_overlaps_of_known_boxes(other, expected, volume):
    first = torch.tensor([[0.0, 0, 0, 4, 2, 2, 0]])
    if expected is None:
        first[0, 3] = 2
        octagon = 8 * (math.sqrt(2) - 1)
        expected = volume = octagon / (8 - octagon)
    second = torch.tensor([other], dtype=torch.float32)
    for a, b in ((first, second), (second, first)):
        assert float(overlaps(a, b)) == pytest.approx(expected, abs=1e-6)
        assert float(overlaps(a, b, heights=True)) == pytest.approx(volume, abs=1e-6)
    assert overlaps(first, second[:0]).shape == (1, 0)


def test_overlaps_are_those_of_a_raster():
    boxes = random_boxes(12)
    axis = torch.arange(-10, 16, 0.02)
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    places = torch.stack([x, y], dim=-1).reshape(-1, 2)
    flat = boxes.clone()
    flat[:, 2], flat[:, 5] = 0, 1
    inside = []
    for box in flat:
        offset = places - box[:2]
        cos, sin = box[6].cos(), box[6].sin()
        along = (offset[:, 0] * cos + offset[:, 1] * sin).abs() <= box[3] / 2
        inside.append(along & ((offset[:, 1] * cos - offset[:, 0] * sin).abs() <= box[4] / 2))
    table = torch.stack(inside).double()
    shared = table @ table.t()
    areas = shared.diagonal()
    expected = shared / (areas[:, None] + areas[None] - shared)
    assert (overlaps(boxes, boxes) - expected).abs().max() < 0.01
    assert (expected > 0.05).sum() > 16  # not only overlaps of boxes with themselves


def test_points_inside_and_corners():
    box = torch.tensor([[1.0, 2, 0, 4, 2, 2, math.pi / 2]])
    points = torch.tensor([[1.0, 3.9, 0], [1.9, 2, 0.9], [2.1, 2, 0], [1, 2, 1.1]])
    assert points_inside(points, box).tolist() == [2]
    expected = torch.tensor([[0.0, 4], [0, 0], [2, 0], [2, 4]])
    assert torch.allclose(corners(box)[0], expected, atol=1e-5)


def box_at(x: float) -> list[float]:
    return [x, 0, 0, 4, 2, 2, 0]


def judged(found: list[float], scores: list[float], truth: list[float], ignored=()) -> Judged:
    boxes = [torch.tensor([box_at(x) for x in xs]).reshape(-1, 7) for xs in (found, truth)]
    skip = torch.tensor([x in ignored for x in truth], dtype=torch.bool)
    return Judged(boxes[0], torch.tensor(scores), boxes[1], skip)


@pytest.mark.parametrize(
    ("scans", "expected"),
    [
        ([judged([0, 10], [0.9, 0.8], [0, 10])], 1),
        ([judged([], [], [0])], 0),
        # One of two cars is found, and no mistake comes before it.
        ([judged([0, 20], [0.9, 0.8], [0, 10])], 0.5),
        # The mistake comes first, so precision is a half at every recall.
        ([judged([20, 0], [0.9, 0.8], [0])], 0.5),
        # A second box on the same car is a mistake, but comes after all cars are found.
        ([judged([0, 0.1], [0.9, 0.8], [0])], 1),
        ([judged([0, 10], [0.9, 0.8], [0, 10], ignored=(10,))], 1),
        # Scores are compared over all scans.
        ([judged([20], [0.9], [0]), judged([0], [0.8], [0])], 0.25),
    ],
)
def test_average_precision(scans, expected):
    assert average_precision(scans, 0.7) == pytest.approx(expected)


def test_average_precision_of_nothing():
    assert math.isnan(average_precision([judged([0], [0.9], [])], 0.7))
    assert math.isnan(average_precision([], 0.7))


def test_distinct_boxes():
    boxes = torch.tensor([box_at(x) for x in (0, 0.5, 10)])
    assert distinct(boxes, torch.tensor([0.5, 0.9, 0.1])) == [1, 2]
    assert distinct(boxes[:0], torch.zeros(0)) == []


def test_boxes_come_back_from_their_maps():
    boxes = random_boxes(40, seed=3)
    boxes = boxes[distinct(boxes, torch.ones(len(boxes)), 0.0)]
    boxes = torch.cat([boxes, torch.tensor([box_at(-1)])])  # outside: in no map
    none = torch.zeros(len(boxes), dtype=torch.bool)
    heat, cells, values, weights = maps_of(boxes, none, FINE)
    assert heat.shape == (16, 16)
    assert int((heat == 1).sum()) == int((weights == 1).sum()) == len(boxes) - 1
    assert torch.equal(heat.flatten()[cells], weights)
    assert torch.equal(cells, (heat.flatten() > 0.5).nonzero()[:, 0])
    assert len(cells) > 3 * len(boxes)
    maps = torch.zeros(9, 16, 16)
    maps[0] = torch.where(heat == 1, 4.0, -9.0)
    maps[1:].flatten(1)[:, cells] = values.t()
    found, scores = boxes_of(maps, FINE)
    assert scores.tolist() == pytest.approx([1 / (1 + math.exp(-4))] * len(found))
    overlap = overlaps(found, boxes[:-1])
    assert (overlap.amax(dim=0) > 0.999).sum() == len(found)
    assert len(found) >= len(boxes) - 3  # neighbours of one height may hide each other
    # Every cell near a car knows the car's box, wherever the score is highest.
    for cell in cells.tolist():
        maps[0] = -9.0
        maps[0].flatten()[cell] = 4.0
        found, _ = boxes_of(maps, FINE)
        assert overlaps(found, boxes).max() > 0.999
    assert maps_of(boxes[:0], none[:0], FINE).centres.eq(0).all()


def test_an_ignored_car_is_neither_right_nor_wrong():
    boxes = torch.tensor([box_at(3.0), box_at(9.0)])
    both = maps_of(boxes, torch.tensor([False, False]), FINE)
    one = maps_of(boxes, torch.tensor([False, True]), FINE)
    near, far = (both.centres == 1).flatten().nonzero()[:, 0].tolist()
    assert one.centres.flatten()[[near, far]].tolist() == [1, -1]
    assert ((one.centres == both.centres) | (one.centres == -1) | (both.centres < 0.2)).all()
    assert len(one.cells) == len(both.cells) // 2
    loss = detection._focal_loss(torch.zeros(16, 16), one.centres)
    wrong = torch.where(one.centres == -1, 9.0, 0.0)
    assert detection._focal_loss(wrong, one.centres) == loss


def test_boxes_of_the_simulator_hold_their_cars():
    sweep = simulate_sweep(3, azimuths=512, range_noise=0.0)
    cars = sweep.points[sweep.labels == CLASS_NAMES.index("car"), :3]
    grown = sweep.boxes.clone()
    grown[:, 3:6] += 0.01
    inside = points_inside(cars, grown)
    assert int(inside.sum()) == len(cars)
    assert (inside > 0).sum() > 5
    halved = sweep.boxes.clone()
    halved[:, 3:6] /= 2
    assert int(points_inside(cars, halved).sum()) < len(cars) / 10  # points lie on the outside


def test_a_changed_scene_keeps_its_points_in_its_boxes():
    sweep = simulate_sweep(3, azimuths=512, range_noise=0.0)
    grown = sweep.boxes.clone()
    grown[:, 3:6] += 0.01  # points lie on the faces
    scene = BoxScene(sweep.points, grown, grown[:, 0] > 0)
    for seed in range(4):
        changed = changed_scene(scene, seed)
        before = points_inside(scene.points[:, :3], scene.boxes)
        after = points_inside(changed.points[:, :3], changed.boxes)
        assert before.sum() > 1000
        assert (before - after).abs().max() <= 2
        assert torch.equal(changed.points, changed_scene(scene, seed).points)
        assert not torch.equal(changed.points, scene.points)


def test_a_scene_is_turned_by_up_to_ten_degrees_to_both_sides():
    boxes = torch.tensor([[10.0, 0.0, 0.0, 4.0, 2.0, 1.5, 0.0]])
    scene = BoxScene(torch.zeros(1, 4), boxes, torch.tensor([False]))
    turns = torch.stack([changed_scene(scene, seed).boxes[0, 6] for seed in range(60)]).rad2deg()
    assert -10 <= turns.min() < -7
    assert 7 < turns.max() <= 10


def write_kitti(folder, names=("000000", "000001", "000002", "000003")):
    """Write scans with a car 10 m ahead, turned by a quarter, as KITTI has them."""
    root = folder / "training"
    for name in names:
        xyz = np.array([[10, 0, 0], [10, 40, 0], [-5, 0, 0]], np.float32)
        points = np.concatenate([xyz, np.full((3, 1), 0.5, np.float32)], axis=1)
        (root / "velodyne").mkdir(parents=True, exist_ok=True)
        points.tofile(root / "velodyne" / f"{name}.bin")
        write(
            root, f"calib/{name}.txt",
            "P0: 1 0 0 0 0 1 0 0 0 0 1 0\n"
            "P2: 700 0 600 0 0 700 180 0 0 0 1 0\n"
            "R0_rect: 1 0 0 0 1 0 0 0 1\n"
            "Tr_velo_to_cam: 0 -1 0 0.1 0 0 -1 0.2 1 0 0 -0.3\n\n",
        )  # fmt: skip
        write(
            root, f"label_2/{name}.txt",
            "Car 0.00 0 0.0 0 100 50 160 1.5 1.6 4.0 0.1 1.95 9.7 -1.5707963\n"
            "Car 0.00 2 0.0 0 100 50 160 1.5 1.6 4.0 5.1 1.95 9.7 0\n"
            "Van 0.00 0 0.0 0 100 50 160 1.5 1.6 4.0 5.1 1.95 19.7 0\n"
            "DontCare -1 -1 -10 0 100 50 160 -1 -1 -1 -1000 -1000 -1000 -10\n",
        )  # fmt: skip
    return folder


def test_kitti_folders_are_read(tmp_path):
    write_kitti(tmp_path)
    train, val = kitti_boxes(tmp_path, "train"), kitti_boxes(tmp_path, "val")
    assert (train.count, val.count) == (3, 1)
    scene = val.load(0)
    assert scene.points.tolist() == [
        [10, 0, 0, 0.5]
    ]  # cars beside and behind are not in the picture
    first = scene.boxes[0].tolist()
    # Bottom 1.75 m below the laser; the camera's -90 degrees about its y axis are 0 about z.
    assert first == pytest.approx([10, 0, -1.75 + 0.75, 4, 1.6, 1.5, 0], abs=1e-5)
    assert scene.boxes[1, 1].item() == pytest.approx(-5)
    assert abs(scene.boxes[1, 6].item()) == pytest.approx(math.pi / 2)
    assert scene.ignored.tolist() == [False, True, True]
    write(tmp_path, "ImageSets/val.txt", "000001\n000002\n")
    assert kitti_boxes(tmp_path, "val").count == 2
    write(tmp_path, "training/label_2/000001.txt", "Car 1 2\n")
    with pytest.raises(
        ValueError, match=r"line 1 of .*000001\.txt must hold a class and 14 numbers"
    ):
        kitti_boxes(tmp_path, "val").load(0)
    write(tmp_path, "training/calib/000002.txt", "P2: 1 2\n")
    with pytest.raises(ValueError, match=r"000002\.txt must have lines P2, R0_rect"):
        kitti_boxes(tmp_path, "val").load(1)
    (tmp_path / "training" / "velodyne" / "000000.bin").write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"000000\.bin must hold points of four float32"):
        kitti_boxes(tmp_path, "train").load(0)
    with pytest.raises(FileNotFoundError, match=r"must hold training/label_2"):
        kitti_boxes(tmp_path / "training", "train")


def test_simulated_splits_share_no_scene():
    first, second = simulated_boxes("train", 1).load(0), simulated_boxes("val", 1).load(0)
    assert len(first.boxes) != len(second.boxes) or not torch.equal(first.boxes, second.boxes)
    assert 3 < int((~first.ignored).sum()) < len(first.boxes)


def easy_set(count: int, first: int = 0) -> BoxSet:
    """Scenes of two cars along a street that are full of points, in a small grid."""

    def load(number: int) -> BoxScene:
        generator = torch.Generator().manual_seed(first + number)
        boxes = torch.tensor([[3.0, -3, -1.5, 4, 1.8, 1.5, 0], [9.0, 3, -1.5, 4, 1.8, 1.5, 0]])
        boxes[:, :2] += torch.rand(2, 2, generator=generator) - 0.5
        boxes[:, 6] = 0.3 * torch.rand(2, generator=generator)
        points = []
        for x, y, z, *size, angle in boxes.tolist():
            local = (torch.rand(600, 3, generator=generator) - 0.5) * torch.tensor(size)
            cos, sin = math.cos(angle), math.sin(angle)
            turned = [local[:, 0] * cos - local[:, 1] * sin, local[:, 0] * sin + local[:, 1] * cos]
            place = torch.stack([turned[0] + x, turned[1] + y, local[:, 2] + z], dim=1)
            points.append(torch.nn.functional.pad(place, (0, 1), value=0.5))
        return BoxScene(torch.cat(points), boxes, torch.zeros(2, dtype=torch.bool))

    return BoxSet(GRID, count, load)


def make_net() -> torch.nn.Module:
    torch.manual_seed(0)
    net = second_detector(spconv, GRID.spatial_shape, channel_divisor=4)
    follow_quickly(net)
    return net


def test_a_detector_finds_cars():
    net, task = make_net(), Detection(easy_set(8), easy_set(3, first=100))
    settings = TrainingSettings(epochs=12, batch_size=2, learning_rate=1e-2)
    history = fit(net, task, settings, CPU)
    assert history[-1].loss < 0.3 * history[0].loss
    assert history[0].score < 0.2
    assert history[-1].parts["from above, 0.5"] > 0.8


def test_a_captured_detector_computes_the_same():
    torch.manual_seed(0)
    batch = box_batch([easy_set(2).load(n) for n in range(2)], GRID)
    larger = box_batch([easy_set(4).load(n) for n in (2, 3)], GRID)
    losses = []
    for forward in (run_detector, CapturedNetwork(run_detector)):
        net = make_net().train()
        task = Detection(easy_set(2), easy_set(1), forward)
        rows = []
        for each in (batch, larger):
            net.zero_grad()
            loss = task.loss(net, each)
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
            rows.append((loss.detach(), gradient))
        losses.append(rows)
    for (loss, gradient), (captured, captured_gradient) in zip(*losses, strict=True):
        assert torch.allclose(loss, captured, rtol=1e-5)
        assert (gradient - captured_gradient).abs().max() < 1e-4 * gradient.abs().max()


def test_the_grid_must_fit():
    with pytest.raises(ValueError, match=r"must have 40 cells along z and multiples of 8"):
        second_detector(spconv, [40, 60, 64])


@pytest.mark.slow
def test_the_command_trains_on_a_kitti_folder_and_resumes(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_kitti(tmp_path)
    out, report = tmp_path / "out", tmp_path / "report.json"
    arguments = ["train", "--network", "second", "--data", str(tmp_path), "--out", str(out)]
    arguments += ["--narrow", "8", "--voxel", "0.4", "--epochs", "2", "--device", "cpu"]
    assert main([*arguments, "--json", str(report)]) == 0
    assert "from above, 0.7" in capsys.readouterr().out
    assert len(json.loads(report.read_text())["runs"][0]["epochs"]) == 2
    for name in ("curves.png", "predictions.png"):
        assert (out / name).stat().st_size > 10_000
    assert main([*arguments, "--resume"]) == 0
    assert main(["train", "--network", "second", "--data", "rooms"]) == 2
    assert "rooms have none" in capsys.readouterr().err
