"""Made-up sites: random cells with the awkward cases on request, and surfaces for measurements."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tritonspconv.coords import ActiveSites, Grid


def random_sites(
    n: int,
    ndim: int = 3,
    *,
    extent: int | Sequence[int] = 12,
    lower: int | Sequence[int] = 0,
    batch_size: int = 2,
    bounded: bool = True,
    repeats: int = 0,
    outside: int = 0,
    ascending: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> ActiveSites:
    """Return distinct random cells of a box, in random order.

    Args:
        n: Number of rows, ``repeats`` and ``outside`` included.
        ndim: Spatial axes.
        extent: Cells along each axis.
        lower: Smallest coordinate of each axis.
        batch_size: Number of samples.
        bounded: True: the grid is the box. False: the grid around the cells drawn.
        repeats: Number of rows that repeat a cell of another row.
        outside: Number of rows outside the box; needs ``bounded``.
        ascending: Order the rows by batch and coordinates.
        generator: Source of randomness; the default is torch's own.
        device: Device of the result. The draw is made on the CPU: equal seeds, equal sites.

    Raises:
        ValueError: There are fewer cells than rows to draw, or ``outside`` without ``bounded``.
    """
    shape = _per_axis(extent, ndim)
    first = _per_axis(lower, ndim)
    cells = batch_size * math.prod(shape)
    distinct = n - repeats - outside
    if distinct > cells or distinct < min(repeats, 1):
        raise ValueError(
            f"random_sites: cannot draw {distinct} distinct and {repeats} repeated sites from a "
            f"grid of {cells} cells; n={n}, repeats={repeats}, outside={outside}."
        )
    if outside and not bounded:
        raise ValueError("random_sites: nothing lies outside an unbounded grid; got outside > 0.")

    grid = Grid(first, shape, batch_size, bounded=True)
    coords = grid.coords(_distinct(cells, distinct, generator))
    copies = coords[torch.randint(max(distinct, 1), (repeats,), generator=generator)]
    coords = torch.cat([coords, copies, _outside(grid, outside, generator)])
    coords = coords[torch.randperm(n, generator=generator)]
    if ascending:
        rows = sorted(range(n), key=lambda row: coords[row].tolist())
        coords = coords[rows]
    if not bounded:
        grid = Grid.around(coords)
    return ActiveSites(coords.to(device), grid)


def surface_sites(
    radius: int,
    ndim: int = 3,
    *,
    batch_size: int = 1,
    thickness: float = 1.25,
    device: torch.device | str = "cpu",
) -> ActiveSites:
    """Return a sphere's shell in a bounded grid of ``2 * radius`` cells a side, rows ascending.

    Scans and meshes are surfaces. With 3^3 taps a site of the shell has 12.7 neighbours on average,
    itself included; random sites have almost none.

    Args:
        radius: Outer radius in cells; 128 gives 252,392 sites in three dimensions.
        ndim: Spatial axes.
        batch_size: Number of equal samples.
        thickness: Thickness of the shell, in cells, inwards.
        device: Device of the result.
    """
    centres = torch.arange(-radius, radius, device=device) + 0.5
    squares = torch.zeros((), device=device)
    for axis in range(ndim):
        squares = squares + centres.square().reshape([-1 if i == axis else 1 for i in range(ndim)])
    inside = (squares <= radius**2) & (squares >= max(radius - thickness, 0) ** 2)
    cells = inside.nonzero().int()
    coords = torch.cat(
        [torch.nn.functional.pad(cells, (1, 0), value=sample) for sample in range(batch_size)]
    )
    return ActiveSites(coords, Grid((0,) * ndim, (2 * radius,) * ndim, batch_size))


def block_sites(shape: Sequence[int], batch_size: int = 1) -> ActiveSites:
    """Return every cell of a bounded grid, ascending: the dense case."""
    cells = list(itertools.product(range(batch_size), *(range(n) for n in shape)))
    coords = torch.tensor(cells, dtype=torch.int32).reshape(len(cells), 1 + len(shape))
    return ActiveSites(coords, Grid((0,) * len(shape), tuple(shape), batch_size))


def _per_axis(value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    return (value,) * ndim if isinstance(value, int) else tuple(value)


def _outside(grid: Grid, n: int, generator: torch.Generator | None) -> Tensor:
    """Draw cells that miss the grid along one axis, the batch included, by one or two."""
    lower, upper = (0, *grid.lower), (grid.batch_size - 1, *grid.upper)
    coords = torch.tensor([lower] * n, dtype=torch.int32).reshape(n, 1 + grid.ndim)
    for row in coords:
        axis, above, distance = torch.randint(1 << 30, (3,), generator=generator).tolist()
        axis %= 1 + grid.ndim
        row[axis] = upper[axis] + 1 + distance % 2 if above % 2 else lower[axis] - 1 - distance % 2
    return coords


def _distinct(cells: int, n: int, generator: torch.Generator | None) -> Tensor:
    """Draw ``n`` different integers below ``cells``, which may be too many to permute."""
    if cells <= 4 * n + 1000:
        return torch.randperm(cells, generator=generator)[:n]
    drawn = torch.empty(0, dtype=torch.int64)
    while drawn.numel() < n:
        more = torch.randint(cells, (2 * n,), generator=generator)
        drawn = torch.cat([drawn, more]).unique()
    return drawn[torch.randperm(drawn.numel(), generator=generator)[:n]]
