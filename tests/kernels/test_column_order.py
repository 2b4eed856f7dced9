"""The groups of taps by which columns are ordered."""

import ast

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests._process import ROOT, run
from tritonspconv import reference
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernels.triton._column_order import CUBE_GROUPS, box_mask, tap_groups

CPU = torch.device("cpu")


def groups_of(geometry: ConvGeometry) -> list[int]:
    return tap_groups(geometry.offsets, CPU).tolist()


@pytest.mark.parametrize("order", ["last_axis_fastest", "first_axis_fastest"])
@pytest.mark.parametrize("dilation", [(1, 1, 1), (2, 1, 3)])
def test_cubes_are_grouped_by_boxes(order, dilation):
    geometry = ConvGeometry.submanifold((3, 3, 3), dilation, order)
    masks = groups_of(geometry)
    assert masks == [box_mask(box) for box in CUBE_GROUPS]
    assert len(set(masks)) == 16
    # Groups are listed from the slowest axis on: the first group is a plane across that axis.
    axis = 0 if order == "last_axis_fastest" else 2
    plane = [v for v in range(27) if masks[0] >> v & 1]
    assert len(plane) == 9
    assert {geometry.offsets[v][axis] for v in plane} == {dilation[axis]}


def test_boxes():
    assert box_mask(("*", "*", "*")) == 2**27 - 1
    assert box_mask(("0", "0", "0")) == 1 << 13
    assert box_mask(("-", "+", "0+")) == 1 << 7 | 1 << 8
    taps = [v for v in range(27) if box_mask(("-0", "0", "*")) >> v & 1]
    assert taps == [3, 4, 5, 12, 13, 14]


def test_few_taps_stand_for_themselves():
    masks = groups_of(ConvGeometry((2,) * 3, (2,) * 3, (0,) * 3, (1,) * 3))
    assert masks[:8] == [0] * 8
    assert sorted(masks[8:]) == [1 << v for v in range(8)]


@pytest.mark.parametrize(
    "geometry",
    [
        ConvGeometry.submanifold((5, 5), (1, 1)),
        ConvGeometry((3, 3, 2), (1, 1, 1), (1, 1, 0), (1, 1, 1)),
        ConvGeometry.of_taps(reference.taps((3, 3, 3))[::-1], (1, 1, 1), (1, 1, 1)),
    ],
    ids=["2d", "3x3x2", "listed backwards"],
)
def test_other_windows_are_grouped_by_lines(geometry):
    masks = groups_of(geometry)
    assert len(masks) == 16
    assert masks != [box_mask(box) for box in CUBE_GROUPS]
    assert all(0 < mask < 2**geometry.kernel_volume for mask in masks)


def test_the_search_prints_boxes_and_what_they_do():
    command = ("-m", "scripts.tools.search_column_groups", "--max-points", 2000, "--seconds", 0.2)
    lines = run(*command, cwd=ROOT).stdout.splitlines()
    boxes = [ast.literal_eval(line.strip().rstrip(",")) for line in lines[:16]]
    assert all(0 < box_mask(box) < 2**27 - 1 for box in boxes)
    scenes = [line.split(":")[0] for line in lines[16:]]
    assert len(scenes) == 5
    assert scenes[-1].endswith("held out")
