"""Seeded scans of made-up rooms: coloured, labelled point clouds to train, test and measure on."""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonspconv.testing._furniture import ROOM_CLASSES, Solid, furnish_room

__all__ = ["ROOM_CLASSES", "RoomScan", "simulate_room"]

# A pixel of the simulated camera is two degrees wide.
_COLUMNS, _ROWS = 180, 90
_HIGHEST_VIEW = math.radians(25.0)


@dataclass(frozen=True)
class RoomScan:
    """The visible surfaces of one room.

    Attributes:
        points: float32 ``[N, 6]``: x, y, z in metres (z up; the floor and one corner of the room
            lie less than 5 cm from zero), then red, green, blue in 0..1.
        labels: int64 ``[N]``: index into `ROOM_CLASSES`.
    """

    points: Tensor
    labels: Tensor


def simulate_room(
    seed: int = 0, *, density: float = 2000.0, noise: float = 0.004, stations: int = 8
) -> RoomScan:
    """Furnish a random room and return the points that a hand-held depth camera sees.

    The room has walls, a door, windows, shelves, cabinets, a sofa or a bed, a table with chairs,
    lamps and plants. Surfaces that no station sees are missing, as they are in a real scan: the
    backs of furniture, and most of the ceiling. With the default density four rooms have about
    140 thousand voxels of 5 cm.

    Args:
        seed: Chooses the room, the stations and the noise. On one machine a seed gives one scan,
            bit for bit.
        density: Points on a square metre of surface, before unseen points are left out.
        noise: Standard deviation of each coordinate, in metres.
        stations: Number of places that the camera looks from, in all directions below 25 degrees.

    Returns:
        The points in random order with their classes.

    Example:
        >>> room = simulate_room(seed=1, density=50)
        >>> room.points.shape[1], len(room.points) == len(room.labels)
        (6, True)
        >>> ROOM_CLASSES[int(room.labels.mode().values)]
        'wall'

    Raises:
        ValueError: The density is not positive, the noise is negative, or there is no station.
    """
    if density <= 0 or noise < 0 or stations < 1:
        raise ValueError(
            "simulate_room: density must be positive, noise not negative and stations at least 1; "
            f"got density={density}, noise={noise}, stations={stations}."
        )
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(f"room {seed}")
    solids, room = furnish_room(rng)
    places, colors, labels = _sample(solids, density, generator)
    seen = torch.zeros(len(places), dtype=torch.bool)
    for _ in range(stations):
        seen |= _seen_from(places, _station(rng, solids, room))
    places, colors, labels = places[seen], colors[seen], labels[seen]

    jitter = torch.randn(places.shape, generator=generator, dtype=torch.float64)
    shade = 0.06 * torch.randn(len(places), 1, generator=generator, dtype=torch.float64)
    # Move the room off the planes of a voxel grid: a floor at exactly 0 would fill two layers of
    # voxels.
    places = places + torch.tensor([rng.uniform(0.01, 0.04) for _ in range(3)]).double()
    points = torch.cat([places + noise * jitter, (colors + shade).clamp(0.0, 1.0)], dim=1)
    order = torch.randperm(len(points), generator=generator)
    return RoomScan(points[order].float(), labels[order])


def _sample(
    solids: list[Solid], density: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return points on the surfaces that lie inside no other solid, with colours and classes."""
    counts = torch.tensor([max(1, round(density * solid.area)) for solid in solids])
    places = torch.cat(
        [
            solid.sample(count, generator)
            for solid, count in zip(solids, counts.tolist(), strict=True)
        ]
    )
    owner = torch.arange(len(solids)).repeat_interleave(counts)
    order = places[:, 0].argsort(stable=True)
    places, owner = places[order], owner[order]

    hidden = torch.zeros(len(places), dtype=torch.bool)
    for solid in solids:
        if solid.only is not None:
            continue  # nothing stands in a wall, but doors and windows, which are nearer
        ends = torch.tensor([solid.x - solid.radius, solid.x + solid.radius], dtype=torch.float64)
        first, last = torch.searchsorted(places[:, 0].contiguous(), ends).tolist()
        hidden[first:last] |= solid.contains(places[first:last])
    places, owner = places[~hidden], owner[~hidden]
    colors = torch.tensor([solid.color for solid in solids], dtype=torch.float64)
    labels = torch.tensor([solid.label for solid in solids])
    return places, colors[owner], labels[owner]


def _station(
    rng: random.Random, solids: list[Solid], room: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Return a place for the camera that is inside no solid."""
    place = (room[0] / 2, room[1] / 2, 1.5)
    for _ in range(100):
        place = (
            rng.uniform(0.4, room[0] - 0.4),
            rng.uniform(0.4, room[1] - 0.4),
            rng.uniform(1.2, 1.75),
        )
        point = torch.tensor([place], dtype=torch.float64)
        if not any(bool(solid.contains(point)) for solid in solids):
            break
    return place


def _seen_from(places: Tensor, station: tuple[float, float, float]) -> Tensor:
    """Return which points ``[N, 3]`` are, within a few centimetres, the nearest of their pixel."""
    ray = places - torch.tensor(station, dtype=torch.float64)
    distance = ray.norm(dim=1)
    elevation = (ray[:, 2] / distance.clamp(min=1e-6)).asin()
    azimuth = torch.atan2(ray[:, 1], ray[:, 0])
    column = ((azimuth / (2 * math.pi) + 0.5) * _COLUMNS).long().clamp(0, _COLUMNS - 1)
    row = ((elevation / math.pi + 0.5) * _ROWS).long().clamp(0, _ROWS - 1)
    pixel = row * _COLUMNS + column
    nearest = torch.full((_ROWS * _COLUMNS,), math.inf, dtype=torch.float64)
    nearest = nearest.scatter_reduce(0, pixel, distance, "amin")
    return (distance < 1.04 * nearest[pixel] + 0.02) & (elevation < _HIGHEST_VIEW)
