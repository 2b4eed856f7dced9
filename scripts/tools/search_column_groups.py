"""Search the groups of taps by which the columns of 3x3x3 kernel maps are ordered. Needs no GPU.

  python -m scripts.tools.search_column_groups --waymo scan.npz --seconds 600

A tile of the forward kernel runs every tap that any of its 128 columns has. Columns are sorted by a
key of 16 bits, each of which says whether a tap of one group is present; here a group is a box of
the window. By simulated annealing the search looks for the boxes, and their order, with which tiles
run the fewest taps for each pair: on a LiDAR scan, on its next level, on a sphere, and for the
outputs of a 3x3x3 / 2 layer. It prints the boxes for ``CUBE_GROUPS`` of
``tritonspconv/kernels/triton/_column_order.py``, and what the old ones and the new ones do, also on
a scene that took no part.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tritonspconv import ActiveSites, ConvGeometry, Grid, kernel_map
from tritonspconv.bench.scenes import SceneStore
from tritonspconv.kernel_map import output_sites
from tritonspconv.kernels.eager.invert_table import mask_words
from tritonspconv.kernels.triton.column_groups import AXIS_RANGES, CUBE_GROUPS, box_mask

TILE, BITS = 128, len(CUBE_GROUPS)
RANGES = tuple(AXIS_RANGES)
SUBMANIFOLD = ConvGeometry.submanifold((3, 3, 3), (1, 1, 1))
HALF = ConvGeometry((2,) * 3, (2,) * 3, (0,) * 3, (1,) * 3)
STRIDED = ConvGeometry((3,) * 3, (2,) * 3, (1,) * 3, (1,) * 3)

Box = tuple[str, str, str]
Groups = Sequence[Box]

# Each sort of box but the whole window and its centre, which nearly every column has.
BOXES: list[Box] = [
    (slow, middle, fast)
    for slow, middle, fast in itertools.product(RANGES, RANGES, RANGES)
    if (slow, middle, fast) not in {("*", "*", "*"), ("0", "0", "0")}
]


class Sample:
    """The masks of a table's columns.

    Args:
        name: Name of the table.
        sites: Its input sites.
        geometry: Its geometry.
        weight: Its weight.
    """

    def __init__(
        self, name: str, sites: ActiveSites, geometry: ConvGeometry, weight: float
    ) -> None:
        self.name, self.weight = name, weight
        rows = kernel_map(sites, geometry).out_table.rows
        masks = mask_words(rows)[0].numpy().view(np.uint32)
        self.pairs = int((rows >= 0).sum())
        self.masks, self._places = np.unique(masks, return_inverse=True)

    def taps_per_pair(self, groups: Groups) -> float:
        """Return how many taps tiles run for each pair, where columns are ordered by ``groups``."""
        key = np.zeros(len(self.masks), np.uint16)
        for box in groups:
            key = (key << 1) | ((self.masks & np.uint32(box_mask(box))) != 0)
        for shift in (8, 4, 2, 1):
            key ^= key >> shift
        order = np.argsort(key[self._places], kind="stable")
        masks = self.masks[self._places[order]]
        tiles = np.bitwise_or.reduceat(masks, np.arange(0, len(masks), TILE))
        return TILE * int(np.unpackbits(tiles.view(np.uint8)).sum()) / self.pairs


def samples(waymo: Path | None, max_points: int | None) -> tuple[list[Sample], Sample]:
    """Return what the search looks at, and what it does not."""
    store = SceneStore(torch.device("cpu"), waymo, None, 128, max_points)

    def sites_of(name: str) -> ActiveSites:
        scene = store[name]
        return ActiveSites(scene.indices, Grid((0, 0, 0), scene.spatial_shape, scene.batch_size))

    scan = sites_of("waymo_b4")
    return [
        Sample("scan", scan, SUBMANIFOLD, 1.0),
        Sample("scan, next level", output_sites(scan, HALF), SUBMANIFOLD, 0.8),
        Sample("sphere", sites_of("sphere"), SUBMANIFOLD, 0.5),
        Sample("scan, 3x3x3 / 2", scan, STRIDED, 0.4),
    ], Sample("scan in voxels of 5 cm, held out", sites_of("waymo_5cm_b4"), SUBMANIFOLD, 0.0)


def changed(old: Groups) -> Groups:
    """Return groups with one box replaced, changed along an axis, swapped or moved."""
    groups, place, kind = list(old), random.randrange(BITS), random.random()
    if kind < 0.25:
        groups[place] = random.choice(BOXES)
    elif kind < 0.6:
        box = list(groups[place])
        box[random.randrange(3)] = random.choice(RANGES)
        groups[place] = (box[0], box[1], box[2])
    elif kind < 0.85:
        other = min(max(place + random.choice((-3, -2, -1, 1, 2, 3)), 0), BITS - 1)
        groups[place], groups[other] = groups[other], groups[place]
    else:
        box = groups.pop(place)
        groups.insert(random.randrange(BITS), box)
    return groups


def anneal(looked_at: list[Sample], seconds: float) -> Groups:
    """Return the best groups found; says every half minute how far it is."""
    first = [sample.taps_per_pair(CUBE_GROUPS) for sample in looked_at]
    total = sum(sample.weight for sample in looked_at)

    def cost_of(groups: Groups) -> float:
        ratios = (s.taps_per_pair(groups) / was for s, was in zip(looked_at, first, strict=True))
        return sum(s.weight * ratio for s, ratio in zip(looked_at, ratios, strict=True)) / total

    groups: Groups = list(CUBE_GROUPS)
    best = groups
    cost = least = 1.0
    start = said = time.monotonic()
    while (gone := time.monotonic() - start) < seconds:
        candidate = changed(groups)
        new_cost = cost_of(candidate)
        heat = 0.003 * (1 - gone / seconds) ** 2 + 1e-5
        if new_cost < cost or random.random() < math.exp((cost - new_cost) / heat):
            groups, cost = candidate, new_cost
        if cost < least:
            best, least = groups, cost
        if time.monotonic() - said > 30:
            said = time.monotonic()
            print(f"{gone:.0f} s: {cost:.4f}, best {least:.4f}", file=sys.stderr)
    return best


def main() -> int:
    """Search, and print the boxes and what they do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--waymo", type=Path, help="scan around a vehicle; simulated if left out")
    parser.add_argument("--max-points", type=int, help="use only so many points of the scan")
    parser.add_argument("--seconds", type=float, default=600, help="how long to search")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    looked_at, held_out = samples(args.waymo, args.max_points)
    best = anneal(looked_at, args.seconds)
    for box in best:
        print(f"    {box!r},")
    for sample in (*looked_at, held_out):
        old, new = sample.taps_per_pair(CUBE_GROUPS), sample.taps_per_pair(best)
        print(f"{sample.name}: {old:.3f} taps a pair, now {new:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
