"""The made-up street that the simulated LiDAR looks at: ground, solids, and where they stand."""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

CLASS_NAMES = (
    "road",
    "sidewalk",
    "terrain",
    "building",
    "car",
    "vegetation",
    "trunk",
    "pole",
    "pedestrian",
)
ROAD, SIDEWALK, TERRAIN, BUILDING, CAR, VEGETATION, TRUNK, POLE, PEDESTRIAN = range(9)

MISS = math.inf
# Metres between the road and the body of a car.
_CLEARANCE = 0.22


@dataclass(frozen=True)
class Ground:
    """A street along x with raised pavements, crossed by another one along y.

    Attributes:
        height: Metres from the road to the sensor.
        centre: y of the middle of the street, which lies to the left of the sensor's lane.
        half_width: Half the carriageway, parking bays included.
        crossings: x of the middle of each side street.
        phases: Phases of the long waves of the terrain.
    """

    height: float
    centre: float
    half_width: float
    crossings: tuple[float, ...]
    phases: tuple[float, float, float]
    crossing_half_width: float = 4.2
    pavement: float = 2.8
    kerb: float = 0.13
    wave: float = 0.12

    @classmethod
    def draw(cls, rng: random.Random, height: float) -> "Ground":
        ahead = rng.uniform(22.0, 34.0)
        phases = tuple(rng.uniform(0.0, 2 * math.pi) for _ in range(3))
        return cls(
            height=height,
            centre=rng.uniform(1.7, 2.1),
            half_width=rng.uniform(6.3, 7.0),
            crossings=(ahead, ahead - rng.uniform(62.0, 74.0), ahead + rng.uniform(60.0, 72.0)),
            phases=(phases[0], phases[1], phases[2]),
        )

    def _past_road(self, x: Tensor, y: Tensor) -> Tensor:
        """Return metres from the nearest carriageway (negative on it)."""
        distance = (y - self.centre).abs() - self.half_width
        for crossing in self.crossings:
            distance = torch.minimum(distance, (x - crossing).abs() - self.crossing_half_width)
        return distance

    def elevation(self, x: Tensor, y: Tensor) -> Tensor:
        """Return z of the ground at ``(x, y)``."""
        a, b, c = self.phases
        waves = 0.06 * torch.sin(x / 19 + a) + 0.04 * torch.sin(y / 13 + b)
        waves = waves + 0.02 * torch.sin(x / 5 + y / 7 + c)
        return waves - self.height + self.kerb * (self._past_road(x, y) > 0)

    def at(self, x: float, y: float) -> float:
        """Return z of the ground at one place."""
        place = torch.tensor([x, y], dtype=torch.float64)
        return float(self.elevation(place[0], place[1]))

    def blocked(self, x: float, margin: float) -> bool:
        """Tell whether ``x`` lies within ``margin`` metres of a side street."""
        return any(abs(x - c) < self.crossing_half_width + margin for c in self.crossings)

    def surface(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return class and albedo of the ground at ``(x, y)``."""
        past = self._past_road(x, y)
        label = torch.where(past <= 0, ROAD, torch.where(past < self.pavement, SIDEWALK, TERRAIN))
        albedo = torch.tensor([0.24, 0.42, 0.5], dtype=torch.float64)[label]
        off_centre = (y - self.centre).abs()
        dashes = (off_centre < 0.08) & (torch.remainder(x, 9.0) < 4.0)
        bays = (off_centre - (self.half_width - 2.3)).abs() < 0.06
        near = self.crossings[0] - self.crossing_half_width
        zebra = (x > near - 4.5) & (x < near - 1.0) & (torch.remainder(y, 1.0) < 0.5)
        clear_of_junction = ~zebra & torch.stack(
            [(x - c).abs() > self.crossing_half_width + 5.0 for c in self.crossings]
        ).all(dim=0)
        painted = (label == ROAD) & (((dashes | bays) & clear_of_junction) | zebra)
        return label, torch.where(painted, 0.95, albedo)


@dataclass(frozen=True)
class Shape:
    """A solid around ``(x, y)``, standing on ``base`` and reaching up to ``top`` (z, metres)."""

    x: float
    y: float
    base: float
    top: float
    label: int
    albedo: float

    @property
    def radius(self) -> float:
        """Radius of an upright cylinder that holds the shape."""
        raise NotImplementedError

    def hit(self, rays: Tensor, fuzz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return distance (inf = missed), cosine of incidence and "is glass" for each ray."""
        raise NotImplementedError


@dataclass(frozen=True)
class Box(Shape):
    """A box turned by ``yaw``; ``glazing`` is the window's share of each 3 m of its walls."""

    length: float = 1.0
    width: float = 1.0
    yaw: float = 0.0
    glazing: float = 0.0

    @property
    def radius(self) -> float:
        return 0.5 * math.hypot(self.length, self.width)

    def hit(self, rays: Tensor, fuzz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        turn = torch.tensor([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], dtype=torch.float64)
        centre = torch.tensor([self.x, self.y, 0.5 * (self.base + self.top)], dtype=torch.float64)
        half = 0.5 * torch.tensor([self.length, self.width, self.top - self.base]).double()
        origin = -turn @ centre
        local = (rays[..., None, :] * turn).sum(dim=-1)
        safe = torch.where(local.abs() < 1e-12, 1e-12, local)
        first, second = (-half - origin) / safe, (half - origin) / safe
        near, axis = torch.minimum(first, second).max(dim=-1)
        far = torch.maximum(first, second).amin(dim=-1)
        cosine = local.gather(-1, axis[..., None])[..., 0].abs()
        spot = origin + local * near[..., None]
        along = torch.where(axis == 0, spot[..., 1], spot[..., 0])
        panes = torch.remainder(torch.stack([along, spot[..., 2]]), 3.0) < 3.0 * self.glazing
        glass = panes.all(dim=0) & (axis != 2)
        return torch.where((near <= far) & (near > 0), near, MISS), cosine, glass


@dataclass(frozen=True)
class Cylinder(Shape):
    """An upright cylinder without caps."""

    thickness: float = 0.2

    @property
    def radius(self) -> float:
        return 0.5 * self.thickness

    def hit(self, rays: Tensor, fuzz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = rays[..., :2].square().sum(dim=-1)
        along = rays[..., 0] * self.x + rays[..., 1] * self.y
        root = along.square() - flat * (self.x**2 + self.y**2 - self.radius**2)
        distance = (along - root.clamp(min=0).sqrt()) / flat
        height = distance * rays[..., 2]
        struck = (root > 0) & (distance > 0) & (height > self.base) & (height < self.top)
        cosine = (root.clamp(min=0) / flat).sqrt() / self.radius
        return torch.where(struck, distance, MISS), cosine, torch.zeros_like(struck)


@dataclass(frozen=True)
class Foliage(Shape):
    """An ellipsoid of leaves: rays enter it and stop after a random depth, or pass through."""

    thickness: float = 3.0
    depth: float = 0.7

    @property
    def radius(self) -> float:
        return 0.5 * self.thickness

    def hit(self, rays: Tensor, fuzz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centre = torch.tensor([self.x, self.y, 0.5 * (self.base + self.top)], dtype=torch.float64)
        radii = torch.tensor([self.radius, self.radius, 0.5 * (self.top - self.base)]).double()
        ray, origin = rays / radii, -centre / radii
        square, along = ray.square().sum(dim=-1), (ray * origin).sum(dim=-1)
        root = along.square() - square * (origin.square().sum() - 1)
        half_chord = root.clamp(min=0).sqrt() / square
        entry = -along / square - half_chord
        penetration = -self.depth * torch.log1p(-fuzz)
        struck = (root > 0) & (entry > 0) & (penetration < 2 * half_chord)
        distance = torch.where(struck, entry + penetration, MISS)
        return distance, 0.3 + 0.6 * fuzz, torch.zeros_like(struck)


def furnish_street(rng: random.Random, ground: Ground) -> list[Shape]:
    """Furnish both sides of the street, from 100 m behind the sensor to 100 m ahead."""
    shapes: list[Shape] = []
    for side in (-1, 1):
        shapes += _houses(rng, ground, side)
        shapes += _parked_cars(rng, ground, side)
        shapes += _pavement_life(rng, ground, side)
    for _ in range(5):
        lane = rng.choice((-1, 1))
        x = rng.choice((-1, 1)) * rng.uniform(9.0, 75.0)
        shapes += _car(rng, ground, x, ground.centre + lane * 1.75, math.pi * (lane > 0))
    crossing = ground.crossings[0]
    shapes += _car(rng, ground, crossing + 1.9, ground.centre + rng.uniform(14, 30), math.pi / 2)
    return shapes


def _houses(rng: random.Random, ground: Ground, side: int) -> list[Shape]:
    """Return a row of houses with set-backs, gaps, and hedges before the deeper gardens."""
    shapes: list[Shape] = []
    kerb = ground.centre + side * ground.half_width
    x = -105.0
    while x < 105.0:
        length, depth = rng.uniform(9.0, 22.0), rng.uniform(9.0, 14.0)
        set_back = ground.pavement + rng.choice((0.3, rng.uniform(2.0, 4.0), rng.uniform(4.0, 8.0)))
        middle = x + length / 2
        if not ground.blocked(middle, ground.pavement + length / 2):
            y = kerb + side * (set_back + depth / 2)
            z = ground.at(middle, y) - 0.5
            top = z + rng.choice((7.0, 10.0, 13.0, 16.0)) + rng.uniform(-0.5, 1.0)
            solid = (middle, y, z, top, BUILDING, rng.uniform(0.3, 0.7))
            yaw = rng.gauss(0.0, 0.012)
            shapes.append(Box(*solid, length=length, width=depth, yaw=yaw, glazing=0.45))
            if set_back > ground.pavement + 2.5:
                hedge = kerb + side * (ground.pavement + 0.6)
                z = ground.at(middle, hedge)
                for step in range(int(length / 1.2)):
                    bush = (x + 0.8 + 1.2 * step, hedge, z - 0.3, z + rng.uniform(1.0, 1.4))
                    shapes.append(Foliage(*bush, VEGETATION, 0.45, thickness=1.6, depth=0.1))
            x += length + rng.choice((0.0, 0.0, rng.uniform(2.5, 7.0)))
        else:
            x += 2.0
    return shapes


def _car(rng: random.Random, ground: Ground, x: float, y: float, yaw: float) -> list[Shape]:
    """Return a car or a van: a body clear of the road, and a glazed cabin."""
    van = rng.random() < 0.15
    length = rng.uniform(4.9, 5.6) if van else rng.uniform(3.9, 4.8)
    width = rng.uniform(1.85, 2.0) if van else rng.uniform(1.7, 1.85)
    height = rng.uniform(1.9, 2.3) if van else rng.uniform(1.42, 1.62)
    paint = rng.choice((0.12, 0.25, 0.55, 0.7, 0.9))
    yaw += rng.gauss(0.0, 0.02)
    z = ground.at(x, y)
    shoulder = z + (0.62 if van else 0.6) * height
    back = -(0.05 if van else 0.08) * length
    cabin_x, cabin_y = x + back * math.cos(yaw), y + back * math.sin(yaw)
    cabin = 0.85 * length if van else 0.58 * length
    return [
        Box(x, y, z + _CLEARANCE, shoulder, CAR, paint, length=length, width=width, yaw=yaw),
        Box(
            cabin_x,
            cabin_y,
            shoulder,
            z + height,
            CAR,
            paint,
            length=cabin,
            width=0.88 * width,
            yaw=yaw,
            glazing=0.8,
        ),
    ]


def car_boxes(shapes: list[Shape]) -> Tensor:
    """Return a box around body, cabin and the air below of each car: see `LidarSweep.boxes`."""
    parts = [shape for shape in shapes if isinstance(shape, Box) and shape.label == CAR]
    rows = []
    for body, cabin in zip(parts[::2], parts[1::2], strict=True):
        base = body.base - _CLEARANCE
        size = (body.length, body.width, cabin.top - base)
        rows.append((body.x, body.y, 0.5 * (base + cabin.top), *size, body.yaw))
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 7)


def _parked_cars(rng: random.Random, ground: Ground, side: int) -> list[Shape]:
    """Return the cars in the parking bays, with free bays between."""
    shapes: list[Shape] = []
    x = -90.0 + rng.uniform(0.0, 4.0)
    while x < 90.0:
        if rng.random() < 0.5 and not ground.blocked(x, 7.0):
            y = ground.centre + side * (ground.half_width - 1.1 + rng.uniform(-0.12, 0.12))
            shapes += _car(rng, ground, x, y, math.pi * (side > 0))
        x += rng.uniform(5.9, 7.2)
    return shapes


def _pavement_life(rng: random.Random, ground: Ground, side: int) -> list[Shape]:
    """Return trees and lamps along the kerb, and people between them and the houses."""
    shapes: list[Shape] = []
    line = ground.centre + side * (ground.half_width + 0.55)
    x, lamp = -92.0 + rng.uniform(0.0, 6.0), rng.random() < 0.5
    while x < 92.0:
        if not ground.blocked(x, 2.0):
            z = ground.at(x, line)
            if lamp:
                shapes.append(Cylinder(x, line, z, z + 8.0, POLE, 0.6, thickness=0.18))
            else:
                shapes += _tree(rng, x, line, z)
        lamp = not lamp
        x += rng.uniform(7.0, 11.0)
    for _ in range(rng.randint(4, 8)):
        x, y = rng.uniform(-40.0, 40.0), line + side * rng.uniform(0.5, 1.7)
        z, tall = ground.at(x, y), rng.uniform(1.55, 1.85)
        coat = rng.uniform(0.2, 0.7)
        body = Cylinder(x, y, z, z + tall - 0.25, PEDESTRIAN, coat, thickness=0.46)
        shapes += [body, Foliage(x, y, z + tall - 0.3, z + tall, PEDESTRIAN, 0.5, 0.24, 0.001)]
    return shapes


def _tree(rng: random.Random, x: float, y: float, z: float) -> list[Shape]:
    """Return a trunk under a crown of overlapping clumps of leaves."""
    bole, crown = rng.uniform(2.0, 2.8), rng.uniform(3.0, 4.6)
    shapes: list[Shape] = [
        Cylinder(x, y, z, z + bole + 1.0, TRUNK, 0.35, thickness=rng.uniform(0.22, 0.45))
    ]
    for _ in range(4):
        clump = crown * rng.uniform(0.55, 0.8)
        across, along = rng.uniform(-0.3, 0.3) * crown, rng.uniform(-0.3, 0.3) * crown
        low = z + bole + rng.uniform(0.0, 0.45) * crown
        leaves = (x + along, y + across, low, low + clump)
        shapes.append(Foliage(*leaves, VEGETATION, 0.45, thickness=clump))
    return shapes
