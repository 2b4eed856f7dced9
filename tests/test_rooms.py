"""Simulated rooms are seeded and furnished, and lack the surfaces that no camera sees."""

import random

import pytest
import torch

from tritonspconv.testing._furniture import furnish_room
from tritonspconv.testing.rooms import ROOM_CLASSES, simulate_room


def test_a_seed_gives_one_room():
    first, second, other = (simulate_room(seed, density=200) for seed in (3, 3, 4))
    assert torch.equal(first.points, second.points)
    assert torch.equal(first.labels, second.labels)
    assert first.points.shape != other.points.shape


def test_a_room_is_what_it_says():
    rooms = [simulate_room(seed) for seed in range(4)]
    labels = torch.cat([room.labels for room in rooms])
    assert labels.bincount(minlength=len(ROOM_CLASSES)).min() > 0
    voxels = 0
    for room in rooms:
        points = room.points
        assert points.dtype == torch.float32
        assert points.shape == (len(room.labels), 6)
        assert points[:, :3].min() > -0.05
        assert points[:, :3].max() < 5
        assert 0 <= points[:, 3:].min() < points[:, 3:].max() <= 1
        floor = points[room.labels == 0, 2]
        assert floor.mean() == pytest.approx(float(floor.median()), abs=0.002)
        assert floor.std() < 0.005
        voxels += len((points[:, :3] / 0.05).floor().unique(dim=0))
    assert 120_000 < voxels < 160_000


def test_nothing_is_seen_through_furniture():
    for seed in range(3):
        solids, _ = furnish_room(random.Random(f"room {seed}"))
        room = simulate_room(seed, density=300, noise=0.0)
        xyz = room.points[:, :3].double()
        # The scan is shifted by less than 5 cm, so look at the inside of thicker objects.
        for solid in solids:
            if min(solid.size) > 0.3 and not solid.round and solid.only is None:
                inner = solid.__class__(
                    **{**vars(solid), "size": tuple(s - 0.11 for s in solid.size)}
                )
                assert not inner.contains(xyz).any()


@pytest.mark.parametrize("argument", [{"density": 0.0}, {"noise": -1.0}, {"stations": 0}])
def test_arguments_that_make_no_sense(argument):
    with pytest.raises(
        ValueError, match=r"simulate_room: density must be positive, .*got density="
    ):
        simulate_room(**argument)
