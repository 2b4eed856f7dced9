"""Taps as kernel constants: their offsets, and which windows share kernels."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels._record import record_launches
from tritonspconv import ActiveSites, ConvGeometry, Grid
from tritonspconv.kernels.eager.sites import build_index
from tritonspconv.kernels.triton import neighbor_table, sites
from tritonspconv.kernels.triton._grid import Taps, is_narrow, window_corner, window_taps
from tritonspconv.testing import random_sites

# Size, dilation, lines of taps in all, lines in a plane.
WINDOWS = {
    "3": ((3,), (1,), 1, 1),
    "3x3": ((3, 3), (1, 1), 1, 1),
    "5x5": ((5, 5), (1, 1), 5, 1),
    "5x5-dilated": ((5, 5), (3, 2), 5, 1),
    "2x2x2": ((2, 2, 2), (1, 1, 1), 1, 1),
    "3x3x3": ((3, 3, 3), (1, 1, 1), 9, 3),
    "3x3x3-dilated": ((3, 3, 3), (4, 2, 3), 9, 3),
    "2x3x3": ((2, 3, 3), (1, 1, 1), 6, 3),
    "3x2x4-dilated": ((3, 2, 4), (2, 1, 1), 6, 2),
    "3x3x1": ((3, 3, 1), (1, 1, 1), 1, 1),
    "3x1x7": ((3, 1, 7), (1, 1, 1), 3, 1),
    "2x2x2x2": ((2, 2, 2, 2), (1, 1, 1, 1), 4, 2),
    "1x3x3x3": ((1, 3, 3, 3), (1, 1, 1, 1), 9, 3),
    "2x1x3x5-dilated": ((2, 1, 3, 5), (3, 1, 2, 1), 6, 3),
    "8x8": ((8, 8), (1, 1), 16, 2),
    "5x5x5": ((5, 5, 5), (1, 1, 1), 25, 5),
    "5x5x5-dilated": ((5, 5, 5), (2, 1, 3), 25, 5),
    "3x3x3x3-dilated": ((3, 3, 3, 3), (1, 2, 1, 3), 9, 3),
}
CUBE = tuple(itertools.product((-1, 0, 1), repeat=3))
SCATTERED = tuple(
    map(tuple, torch.randint(-9, 9, (70, 3), generator=torch.Generator().manual_seed(0)).tolist())
)

# Offsets, and the number of lines of taps; each line is a plane of its own.
UNEVEN = {
    "a-tap-short": (CUBE[:-1], 1),
    "a-tap-twice": (CUBE[:13] + CUBE[12:13] + CUBE[14:], 1),
    "a-plane-aside": (tuple((x, y + (x > 0), z) for x, y, z in CUBE), 1),
    "a-line-aside-in-each-plane": (tuple((x, y + (y > 0), z) for x, y, z in CUBE), 3),
    "planes-of-a-plus": (tuple(offset for offset in CUBE if 0 in offset[1:]), 3),
    "scattered-planes": (
        tuple((x + 7 * i, y - i, z) for i in range(3) for x, y, z in SCATTERED[:10]),
        3,
    ),
}


def window(size: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Every offset of a window that begins at -5 on each axis, last axis fastest."""
    axes = zip(size, dilation, strict=True)
    return tuple(itertools.product(*([-5 + step * i for i in range(n)] for n, step in axes)))


def listed(taps: Taps, corner: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The offsets that a kernel works out from its constants."""
    ndim = len(corner)
    found = []
    for line, v in itertools.product(range(taps.lines), range(taps.volume)):
        entry = taps.constants[2 * ndim * v : 2 * ndim * (v + 1)]
        assert entry[ndim:] == (1,) * ndim
        plane, place = line // taps.lines_in_plane, line % taps.lines_in_plane
        axes = zip(corner, entry[:ndim], taps.plane_step, taps.line_step, strict=True)
        found.append(tuple(c + e + plane * p + place * q for c, e, p, q in axes))
    return found


@pytest.mark.parametrize("order", ["last_axis_fastest", "first_axis_fastest"])
@pytest.mark.parametrize(
    ("size", "dilation", "lines", "lines_in_plane"), WINDOWS.values(), ids=WINDOWS
)
def test_equal_lines_are_taken_together(size, dilation, lines, lines_in_plane, order):
    offsets = window(size, dilation)
    if order == "first_axis_fastest":
        offsets = tuple(offset[::-1] for offset in offsets)
    (taps,) = window_taps(offsets)
    assert (taps.lines, taps.lines_in_plane) == (lines, lines_in_plane)
    assert len(taps.constants) == taps.volume * 2 * len(size)
    assert listed(taps, window_corner(offsets)) == list(offsets)


@pytest.mark.parametrize(("offsets", "lines"), UNEVEN.values(), ids=UNEVEN)
def test_lines_and_planes_that_differ_stay_apart(offsets, lines):
    (taps,) = window_taps(offsets)
    assert (taps.lines, taps.lines_in_plane) == (lines, 1)
    assert listed(taps, window_corner(offsets)) == list(offsets)


@pytest.mark.parametrize(
    "offsets",
    [window((5,) * 3, (1,) * 3)[:-1], window((2, 37), (1, 1)), window((37, 2), (1, 1)), SCATTERED],
    ids=["a-tap-short", "lines-of-37", "lines-of-2", "scattered"],
)
def test_many_taps_that_do_not_repeat_are_listed_in_order_32_at_a_time(offsets):
    parts = window_taps(offsets)
    assert [part.first for part in parts] == list(range(0, len(offsets), 32))
    found = [listed(part, window_corner(offsets)) for part in parts]
    assert list(itertools.chain(*found)) == list(offsets)


@pytest.mark.compile
def test_windows_that_differ_by_padding_share_their_kernels():
    inputs = random_sites(50, 3, extent=(9, 8, 10))
    with record_launches() as launches:
        for padding in ((0, 0, 0), (1, 1, 1), (0, 1, 1), (-2, 0, 1)):
            geometry = ConvGeometry((3, 3, 3), (2, 2, 2), padding, (1, 1, 1))
            grid = Grid((0, 0, 0), (7, 7, 7), 2)
            arguments = inputs.coords, geometry.offsets, geometry.stride, True
            _, index, *_ = sites.reached_sites(*arguments, grid, inputs.grid)
            neighbor_table.reverse_table(
                torch.empty(27, 0), *arguments, build_index(inputs.coords, inputs.grid),
                index, inputs.grid, grid,
            )  # fmt: skip
    names = [launch.name for launch in launches]
    assert len(names) == len(set(names)), names


@pytest.mark.gpu  # The interpreter takes numbers from 2**31 to 2**32 for negative ones.
def test_cells_beyond_a_billion_are_found(triton_device):
    """Keys of the coarse grid easily fit an int32; the fine cells only just fit."""
    geometry = ConvGeometry((2,), (2,), (0,), (1,))
    fine = torch.tensor([[0, 1_700_000_001], [0, 7]], dtype=torch.int32, device=triton_device)
    coarse = torch.tensor([[0, 3], [0, 850_000_000]], dtype=torch.int32, device=triton_device)
    in_sites = ActiveSites(fine, Grid((0,), (1_800_000_000,), 1))
    out_sites = ActiveSites(coarse, Grid((0,), (900_000_000,), 1))
    indices = [build_index(side.coords, side.grid) for side in (in_sites, out_sites)]
    rows, *_ = neighbor_table.reverse_table(
        torch.empty(2, 2, device=triton_device), fine, geometry.offsets, geometry.stride, True,
        *indices, in_sites.grid, out_sites.grid,
    )  # fmt: skip
    assert rows.tolist() == [[-1, -1], [1, 0]]


@pytest.mark.parametrize(
    ("extent", "stride", "offset", "narrow"),
    [
        (2**30 - 1, 1, 0, True),
        (2**30, 1, 0, False),
        (2**29, 2, 0, False),
        (10, 2, 2**29 - 1, True),
        (10, 2, 2**29, False),
        (10, 2, 2**31, False),
    ],
)
def test_int32_is_for_what_it_holds(extent, stride, offset, narrow):
    grid = Grid((0,), (extent,), 1)
    # The place of the window does not matter, only its reach.
    offsets = ((-(2**31) + 5,), (-(2**31) + 5 + offset,))
    assert is_narrow(grid, offsets, (stride,)) == narrow


def test_int32_is_for_fine_cells_along_the_axis_of_the_largest_stride():
    grid = Grid((0, 0), (1, 2**28), 1)
    assert is_narrow(grid, ((0, 0),), (1, 2))
    assert not is_narrow(grid, ((0, 0),), (1, 4))
