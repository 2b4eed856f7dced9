"""A seeded rotating LiDAR in a made-up street: sweeps to test and measure on."""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonspconv.testing._street import CLASS_NAMES, MISS, Ground, Shape, car_boxes, furnish_street

__all__ = ["CLASS_NAMES", "LidarSweep", "simulate_sweep"]


@dataclass(frozen=True)
class LidarSweep:
    """Points of one turn of the sensor.

    Attributes:
        points: float32 ``[N, 4]``: x (forward), y (left), z (up) in metres from the sensor, and
            intensity in 0..1. The road lies near ``z = -sensor_height``.
        labels: int64 ``[N]``: index into `CLASS_NAMES`.
        boxes: float32 ``[M, 7]``, one box for each car of the street, seen or not: x, y, z of the
            centre, length, width and height in metres, and the angle about z of the length from the
            x axis, in radians, counter-clockwise.
    """

    points: Tensor
    labels: Tensor
    boxes: Tensor


def simulate_sweep(
    seed: int = 0,
    *,
    beams: int = 64,
    azimuths: int = 2048,
    max_range: float = 100.0,
    sensor_height: float = 1.73,
    range_noise: float = 0.02,
    dropout: float = 0.03,
) -> LidarSweep:
    """Cast every ray of a rotating LiDAR into a random street and return the echoes.

    The street has kerbs, a crossing, houses behind front gardens, parked and moving cars, trees,
    lamps and pedestrians. With the default sensor a sweep has some 120 thousand points.

    Args:
        seed: Chooses the street and the noise. On one machine a seed gives one sweep, bit for bit.
        beams: Lasers, from +2 to -24.33 degrees, denser in the upper half.
        azimuths: Firings per turn.
        max_range: Metres beyond which there is no echo.
        sensor_height: Metres from the road to the sensor.
        range_noise: Standard deviation of the measured range, in metres.
        dropout: Chance that an echo at close range and normal incidence is lost.

    Returns:
        The points in firing order (azimuth by azimuth, upper beam first) with their classes, and
        the boxes of the cars.

    Raises:
        ValueError: A size is below one or a length is not positive.

    Example:
        >>> sweep = simulate_sweep(seed=1, beams=16, azimuths=128)
        >>> sweep.points.shape[1], sweep.boxes.shape[1], len(sweep.boxes) > 10
        (4, 7, True)
    """
    if beams < 1 or azimuths < 1:
        raise ValueError(
            f"simulate_sweep: beams and azimuths must be at least 1; got beams={beams}, "
            f"azimuths={azimuths}. Use beams=64, azimuths=2048 for a full-size sweep."
        )
    if max_range <= 0 or sensor_height <= 0:
        raise ValueError(
            "simulate_sweep: max_range and sensor_height must be positive metres; got "
            f"max_range={max_range}, sensor_height={sensor_height}."
        )
    generator = torch.Generator().manual_seed(seed)
    ground = Ground.draw(random.Random(f"ground {seed}"), sensor_height)
    shapes = furnish_street(random.Random(f"street {seed}"), ground)
    rays = _directions(beams, azimuths)
    fuzz = torch.rand(azimuths, beams, generator=generator, dtype=torch.float64)

    echo = _cast_ground(ground, rays, max_range)
    for shape in shapes:
        _cast_shape(shape, rays, fuzz, echo)
    points, labels = _measure(echo, rays, generator, max_range, range_noise, dropout)
    return LidarSweep(points, labels, car_boxes(shapes))


def _directions(beams: int, azimuths: int) -> Tensor:
    """Return unit ray directions, float64 ``[azimuths, beams, 3]``."""
    upper = (beams + 1) // 2
    elevation = torch.cat(
        [
            torch.linspace(2.0, -8.33, upper, dtype=torch.float64),
            torch.linspace(-8.83, -24.33, beams - upper, dtype=torch.float64),
        ]
    ).deg2rad()
    azimuth = torch.arange(azimuths, dtype=torch.float64) * (-2 * math.pi / azimuths) + math.pi
    return torch.stack(
        [
            azimuth.cos()[:, None] * elevation.cos(),
            azimuth.sin()[:, None] * elevation.cos(),
            elevation.sin().expand(azimuths, beams),
        ],
        dim=-1,
    )


@dataclass
class _Echo:
    """The nearest hit of each ray so far; all ``[azimuths, beams]``."""

    distance: Tensor
    cosine: Tensor
    albedo: Tensor
    label: Tensor
    glass: Tensor


def _measure(
    echo: _Echo,
    rays: Tensor,
    generator: torch.Generator,
    max_range: float,
    range_noise: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Turn exact hits into noisy echoes: range noise, intensity and lost returns."""
    shape = echo.distance.shape
    noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    chance = torch.rand(shape, generator=generator, dtype=torch.float64)

    reach = (echo.distance / max_range).clamp(max=1.0)
    grazing = 1.0 - echo.cosine
    lost = dropout + 0.5 * reach.square() * grazing.square() + 0.1 * reach.pow(4)
    lost = torch.where(echo.glass, 0.65, lost)
    kept = (echo.distance <= max_range) & (chance > lost)

    brightness = echo.albedo * (0.35 + 0.65 * echo.cosine) * (1.0 + 0.12 * noise[0])
    brightness = torch.where(echo.glass, 0.15 * brightness, brightness).clamp(0.0, 1.0)
    measured = echo.distance[kept] + range_noise * noise[1][kept]
    xyz = rays[kept] * measured[:, None]
    points = torch.cat([xyz, brightness[kept][:, None]], dim=1).to(torch.float32)
    return points, echo.label[kept]


def _cast_ground(ground: Ground, rays: Tensor, max_range: float) -> _Echo:
    """Intersect the rays with the ground by bisection between its lowest and highest level."""
    fall = (-rays[..., 2]).clamp(min=1e-9)
    near = (ground.height - ground.kerb - ground.wave) / fall
    far = (ground.height + ground.wave) / fall
    reaches = near < max_range
    direction, near, far = rays[reaches], near[reaches], far[reaches]
    for _ in range(12):
        middle = 0.5 * (near + far)
        place = direction * middle[:, None]
        above = place[:, 2] > ground.elevation(place[:, 0], place[:, 1])
        near, far = torch.where(above, middle, near), torch.where(above, far, middle)
    place = direction * far[:, None]

    shape = rays.shape[:-1]
    echo = _Echo(
        distance=torch.full(shape, MISS, dtype=torch.float64),
        cosine=torch.zeros(shape, dtype=torch.float64),
        albedo=torch.zeros(shape, dtype=torch.float64),
        label=torch.zeros(shape, dtype=torch.int64),
        glass=torch.zeros(shape, dtype=torch.bool),
    )
    echo.distance[reaches] = far
    echo.cosine[reaches] = -direction[:, 2]
    echo.label[reaches], echo.albedo[reaches] = ground.surface(place[:, 0], place[:, 1])
    return echo


def _cast_shape(shape: Shape, rays: Tensor, fuzz: Tensor, echo: _Echo) -> None:
    """Update ``echo`` with one shape, looking only at the azimuths that it can cover."""
    azimuths = rays.shape[0]
    away = math.hypot(shape.x, shape.y)
    column = (math.pi - math.atan2(shape.y, shape.x)) * azimuths / (2 * math.pi)
    spread = azimuths / 2
    if away > shape.radius:
        spread = math.asin(shape.radius / away) * azimuths / (2 * math.pi) + 1
    first, last = math.floor(column - spread), math.ceil(column + spread)
    columns = torch.arange(first, min(last + 1, first + azimuths)) % azimuths

    distance, cosine, glass = shape.hit(rays[columns], fuzz[columns])
    known = echo.distance[columns]
    nearer = distance < known
    echo.distance[columns] = torch.where(nearer, distance, known)
    echo.cosine[columns] = torch.where(nearer, cosine, echo.cosine[columns])
    echo.albedo[columns] = echo.albedo[columns].masked_fill(nearer, shape.albedo)
    echo.label[columns] = echo.label[columns].masked_fill(nearer, shape.label)
    echo.glass[columns] = torch.where(nearer, glass, echo.glass[columns])
