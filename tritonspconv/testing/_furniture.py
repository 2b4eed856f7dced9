"""The made-up rooms that the simulated camera looks at: walls, furniture, and where they stand."""

import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ROOM_CLASSES = (
    "floor",
    "wall",
    "ceiling",
    "door",
    "window",
    "table",
    "chair",
    "sofa",
    "bed",
    "shelf",
    "cabinet",
    "lamp",
    "plant",
)
(FLOOR, WALL, CEILING, DOOR, WINDOW, TABLE, CHAIR, SOFA, BED, SHELF, CABINET, LAMP, PLANT) = range(
    13
)

Color = tuple[float, float, float]
WOODS: tuple[Color, ...] = (
    (0.55, 0.38, 0.22),
    (0.72, 0.56, 0.38),
    (0.36, 0.24, 0.16),
    (0.9, 0.88, 0.84),
)
CLOTHS: tuple[Color, ...] = (
    (0.3, 0.35, 0.45),
    (0.55, 0.2, 0.2),
    (0.6, 0.58, 0.52),
    (0.2, 0.4, 0.35),
)
PAINTS: tuple[Color, ...] = (
    (0.9, 0.89, 0.85),
    (0.8, 0.84, 0.86),
    (0.87, 0.8, 0.68),
    (0.75, 0.82, 0.74),
)


@dataclass(frozen=True)
class Solid:
    """A box or an ellipsoid around ``(x, y, z)``, turned by ``yaw``.

    Attributes:
        size: Full lengths along the solid's own x, y, z, in metres.
        round: True: the solid is an ellipsoid.
        only: The one face of a box that exists for the camera, as 2 * axis + (0 lower, 1 upper);
            None: all faces.
    """

    label: int
    color: Color
    x: float
    y: float
    z: float
    size: tuple[float, float, float]
    yaw: float = 0.0
    round: bool = False
    only: int | None = None

    @property
    def area(self) -> float:
        """Surface of the box in square metres; of an ellipsoid, that of a like sphere."""
        if self.round:
            return math.pi * math.prod(self.size) ** (2 / 3)
        return sum(self._face_areas())

    @property
    def radius(self) -> float:
        """Radius of a sphere around the solid."""
        return 0.5 * math.hypot(*self.size)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Return random points on the surface, float64 ``[count, 3]``."""
        if self.round:
            local = torch.randn(count, 3, generator=generator, dtype=torch.float64)
            local = 0.5 * local / local.norm(dim=1, keepdim=True)
        else:
            weights = torch.tensor(self._face_areas(), dtype=torch.float64)
            face = torch.multinomial(weights, count, replacement=True, generator=generator)
            local = torch.rand(count, 3, generator=generator, dtype=torch.float64) - 0.5
            local[torch.arange(count), face // 2] = (face % 2).double() - 0.5
        return self._turned(local * self._size(), self.yaw) + self._centre()

    def contains(self, points: Tensor) -> Tensor:
        """Return whether each point ``[N, 3]`` lies inside, by more than 2 mm."""
        local = self._turned(points - self._centre(), -self.yaw) / (self._size() - 0.004)
        if self.round:
            return local.norm(dim=1) < 0.5
        return (local.abs() < 0.5).all(dim=1)

    def _face_areas(self) -> list[float]:
        """Return square metres of the lower and upper face along x, y, z; 0 for unseen faces."""
        a, b, c = self.size
        areas = [b * c, b * c, c * a, c * a, a * b, a * b]
        return [area * (self.only in (None, face)) for face, area in enumerate(areas)]

    def _size(self) -> Tensor:
        return torch.tensor(self.size, dtype=torch.float64)

    def _centre(self) -> Tensor:
        return torch.tensor([self.x, self.y, self.z], dtype=torch.float64)

    @staticmethod
    def _turned(points: Tensor, yaw: float) -> Tensor:
        cos, sin = math.cos(yaw), math.sin(yaw)
        x, y, z = points.unbind(1)
        # No matrix product: its bits depend on the number of threads.
        return torch.stack([cos * x - sin * y, sin * x + cos * y, z], dim=1)


@dataclass(frozen=True)
class Piece:
    """A piece of furniture in its own frame: its back at y = 0, its middle at x = 0.

    Attributes:
        solids: Its parts.
        width: Along x, in metres.
        depth: Along y, in metres.
    """

    solids: tuple[Solid, ...]
    width: float
    depth: float


def furnish_room(rng: random.Random) -> tuple[list[Solid], tuple[float, float, float]]:
    """Return the solids of a room and its length, width and height in metres."""
    room = (rng.uniform(3.2, 4.6), rng.uniform(2.8, 3.8), rng.uniform(2.4, 2.7))
    solids, doorstep = _shell(rng, *room)
    footprints = [doorstep]
    # The largest piece first, while there is space for it.
    solids += _at_a_wall(rng, rng.choice((_sofa, _bed))(rng), room, footprints)
    solids += _dinner(rng, room, footprints)
    pieces = [_shelf, _cabinet, _lamp, _plant, *rng.choices((_shelf, _cabinet, _sofa, _table), k=2)]
    rng.shuffle(pieces)
    for piece in pieces:
        solids += _at_a_wall(rng, piece(rng), room, footprints)
    return solids, room


Footprint = tuple[float, float, float, float]


def _shell(
    rng: random.Random, length: float, width: float, height: float
) -> tuple[list[Solid], Footprint]:
    """Return floor, ceiling, walls, a door and windows, and the ground before the door."""
    paint, wood = rng.choice(PAINTS), rng.choice(WOODS)
    t = 0.1
    middle = (length / 2, width / 2)
    slab = (length, width, t)
    solids = [
        Solid(FLOOR, wood, *middle, -t / 2, slab, only=5),
        Solid(CEILING, (0.95, 0.95, 0.94), *middle, height + t / 2, slab, only=4),
        Solid(WALL, paint, -t / 2, middle[1], height / 2, (t, width, height), only=1),
        Solid(WALL, paint, length + t / 2, middle[1], height / 2, (t, width, height), only=0),
        Solid(WALL, paint, middle[0], -t / 2, height / 2, (length, t, height), only=3),
        Solid(WALL, paint, middle[0], width + t / 2, height / 2, (length, t, height), only=2),
    ]
    at = rng.uniform(0.7, width - 0.7)
    solids.append(Solid(DOOR, rng.choice(WOODS), 0.0, at, 1.02, (0.08, 0.88, 2.04)))
    solids.append(Solid(DOOR, (0.7, 0.7, 0.72), 0.06, at + 0.36, 1.02, (0.06, 0.12, 0.03)))
    for x in (0.3 * length, 0.75 * length)[: rng.randint(1, 2)]:
        glass = (0.55, 0.68, 0.8)
        solids.append(Solid(WINDOW, glass, x, width, 1.5, (rng.uniform(0.9, 1.2), 0.05, 1.2)))
        solids.append(Solid(WINDOW, (0.95, 0.95, 0.95), x, width - 0.06, 0.88, (1.25, 0.16, 0.04)))
    return solids, (0.0, at - 0.6, 0.9, at + 0.6)


def _at_a_wall(
    rng: random.Random, piece: Piece, room: tuple[float, float, float], taken: list[Footprint]
) -> list[Solid]:
    """Return the piece in a free place with its back to a wall; nothing where there is none."""
    length, width, _ = room
    for _ in range(40):
        side = rng.randrange(4)
        run = length if side % 2 == 0 else width
        slack = run / 2 - piece.width / 2 - 0.05
        if slack <= 0:
            continue
        along = run / 2 + rng.uniform(-slack, slack)
        gap = rng.uniform(0.01, 0.06)
        places = ((along, gap), (length - gap, along), (along, width - gap), (gap, along))
        x, y = places[side]
        yaw = side * math.pi / 2
        footprint = _footprint(piece, x, y, yaw)
        if _is_free(footprint, taken):
            taken.append(footprint)
            return _placed(piece, x, y, yaw + rng.gauss(0.0, 0.01))
    return []


def _footprint(piece: Piece, x: float, y: float, yaw: float) -> Footprint:
    cos, sin = round(math.cos(yaw)), round(math.sin(yaw))
    corners = [(-piece.width / 2, 0.0), (piece.width / 2, piece.depth)]
    xs = [x + cos * a - sin * b for a, b in corners]
    ys = [y + sin * a + cos * b for a, b in corners]
    return min(xs), min(ys), max(xs), max(ys)


def _is_free(place: Footprint, taken: list[Footprint], margin: float = 0.05) -> bool:
    return all(
        place[2] + margin <= other[0]
        or other[2] + margin <= place[0]
        or place[3] + margin <= other[1]
        or other[3] + margin <= place[1]
        for other in taken
    )


def _placed(piece: Piece, x: float, y: float, yaw: float) -> list[Solid]:
    """Return the solids of a piece in the frame of the room."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    return [
        replace(
            part,
            x=x + cos * part.x - sin * part.y,
            y=y + sin * part.x + cos * part.y,
            yaw=part.yaw + yaw,
        )
        for part in piece.solids
    ]


def _dinner(
    rng: random.Random, room: tuple[float, float, float], taken: list[Footprint]
) -> list[Solid]:
    """Return a table in the middle of the room with chairs around it, where there is space."""
    solids: list[Solid] = []
    table = _table(rng)
    x, y = room[0] / 2 + rng.uniform(-0.4, 0.4), room[1] / 2 - table.depth / 2
    footprint = _footprint(table, x, y, 0.0)
    if _is_free(footprint, taken):
        taken.append(footprint)
        solids += _placed(table, x, y, 0.0)
        middle = y + table.depth / 2
        for number in range(rng.randint(2, 4)):
            side = 1 if number % 2 else -1
            away = side * (table.depth / 2 + rng.uniform(0.2, 0.45))
            shift = (-0.35 if number < 2 else 0.35) * (table.width > 1.1)
            yaw = (0.0 if side < 0 else math.pi) + rng.gauss(0.0, 0.15)
            chair = _chair(rng)
            # The chair faces the table.
            at = (x + shift, middle + away + side * 0.24)
            solids += _placed(chair, *at, yaw)
    return solids


def _legs(label: int, color: Color, width: float, depth: float, height: float) -> list[Solid]:
    return [
        Solid(label, color, dx, dy, height / 2, (0.05, 0.05, height))
        for dx in (-width / 2 + 0.05, width / 2 - 0.05)
        for dy in (0.05, depth - 0.05)
    ]


def _table(rng: random.Random) -> Piece:
    width, depth, height = rng.uniform(1.0, 1.5), rng.uniform(0.6, 0.85), rng.uniform(0.7, 0.76)
    color = rng.choice(WOODS)
    top = Solid(TABLE, color, 0.0, depth / 2, height, (width, depth, 0.04))
    return Piece((top, *_legs(TABLE, color, width, depth, height - 0.02)), width, depth)


def _chair(rng: random.Random) -> Piece:
    color = rng.choice(WOODS + CLOTHS)
    seat = Solid(CHAIR, color, 0.0, 0.22, 0.45, (0.42, 0.44, 0.04))
    back = Solid(CHAIR, color, 0.0, 0.02, 0.72, (0.42, 0.04, 0.4))
    return Piece((seat, back, *_legs(CHAIR, color, 0.42, 0.44, 0.43)), 0.42, 0.44)


def _sofa(rng: random.Random) -> Piece:
    width, depth = rng.uniform(1.4, 2.1), rng.uniform(0.8, 0.95)
    color = rng.choice(CLOTHS)
    parts = [
        Solid(SOFA, color, 0.0, depth / 2, 0.22, (width, depth, 0.32)),
        Solid(SOFA, color, 0.0, 0.11, 0.58, (width, 0.22, 0.42)),
    ]
    for side in (-1, 1):
        parts.append(
            Solid(SOFA, color, side * (width / 2 - 0.1), depth / 2, 0.45, (0.2, depth, 0.3))
        )
        cushion = (width / 2 - 0.24, depth - 0.3, 0.16)
        parts.append(Solid(SOFA, color, side * width / 4 * 0.8, depth / 2 + 0.1, 0.44, cushion))
    return Piece(tuple(parts), width, depth)


def _bed(rng: random.Random) -> Piece:
    width, depth = rng.choice((0.95, 1.45)), 2.05
    wood, cloth = rng.choice(WOODS), rng.choice(CLOTHS)
    parts = [
        Solid(BED, wood, 0.0, depth / 2, 0.2, (width, depth, 0.2)),
        Solid(BED, wood, 0.0, 0.03, 0.5, (width, 0.06, 0.8)),
        Solid(BED, cloth, 0.0, depth / 2 + 0.03, 0.4, (width - 0.06, depth - 0.1, 0.2)),
        Solid(BED, (0.93, 0.93, 0.9), 0.0, 0.32, 0.54, (0.62, 0.38, 0.16), round=True),
    ]
    return Piece(tuple(parts), width, depth)


def _shelf(rng: random.Random) -> Piece:
    width, depth, height = rng.uniform(0.7, 1.1), 0.3, rng.uniform(1.5, 2.1)
    wood = rng.choice(WOODS)
    parts = [Solid(SHELF, wood, 0.0, 0.01, height / 2, (width, 0.02, height))]
    for side in (-1, 1):
        x = side * (width / 2 - 0.01)
        parts.append(Solid(SHELF, wood, x, depth / 2, height / 2, (0.02, depth, height)))
    boards = rng.randint(4, 6)
    for number in range(boards + 1):
        z = number * (height - 0.02) / boards + 0.01
        parts.append(Solid(SHELF, wood, 0.0, depth / 2, z, (width, depth, 0.02)))
        x = -width / 2 + 0.04
        while number < boards and x < width / 2 - 0.1 and rng.random() < 0.85:
            thick, tall = rng.uniform(0.03, 0.09), rng.uniform(0.17, 0.24)
            color = (rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9))
            at = (x + thick / 2, 0.12, z + 0.01 + tall / 2)
            parts.append(Solid(SHELF, color, *at, (thick, 0.18, tall)))
            x += thick + 0.002
    return Piece(tuple(parts), width, depth)


def _cabinet(rng: random.Random) -> Piece:
    width, depth, height = rng.uniform(0.8, 1.6), rng.uniform(0.4, 0.6), rng.uniform(0.6, 1.9)
    color = rng.choice(WOODS)
    parts = [Solid(CABINET, color, 0.0, depth / 2, height / 2, (width, depth, height))]
    for side in (-1, 1):
        handle = (side * 0.06, depth + 0.015, 0.6 * height)
        parts.append(Solid(CABINET, (0.5, 0.5, 0.52), *handle, (0.02, 0.03, 0.16)))
    return Piece(tuple(parts), width, depth + 0.03)


def _lamp(rng: random.Random) -> Piece:
    height = rng.uniform(1.4, 1.7)
    metal = (0.3, 0.3, 0.32)
    parts = (
        Solid(LAMP, metal, 0.0, 0.2, 0.015, (0.3, 0.3, 0.03)),
        Solid(LAMP, metal, 0.0, 0.2, height / 2, (0.03, 0.03, height)),
        Solid(LAMP, (0.96, 0.93, 0.8), 0.0, 0.2, height, (0.36, 0.36, 0.3), round=True),
    )
    return Piece(parts, 0.4, 0.4)


def _plant(rng: random.Random) -> Piece:
    parts = [Solid(PLANT, (0.6, 0.35, 0.25), 0.0, 0.25, 0.15, (0.3, 0.3, 0.3))]
    for _ in range(5):
        green, side = (0.2, rng.uniform(0.35, 0.55), 0.2), rng.uniform(0.25, 0.45)
        at = (rng.uniform(-0.12, 0.12), 0.25 + rng.uniform(-0.08, 0.12), rng.uniform(0.5, 1.1))
        parts.append(Solid(PLANT, green, *at, (side, side, side), round=True))
    return Piece(tuple(parts), 0.5, 0.5)
