"""The debug mode: every new tensor checks its coordinates."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tritonspconv.debug import check_coords, checks_coords

OUTSIDE = torch.tensor([[0, 1, 2, 3], [0, 4, 0, 0]], dtype=torch.int32)
FEATS = torch.ones(2, 2)
MESSAGE = r"1 of 2 coordinates lie outside the grid.*row 1: \[0, 4, 0, 0\]"


def spconv_tensor(indices=OUTSIDE):
    return spconv.SparseConvTensor(FEATS, indices, [4, 4, 4], 1)


def engine_tensor(indices=OUTSIDE):
    return ts.SparseTensor(FEATS, indices, spatial_shape=(4, 4, 4), batch_size=1)


@pytest.mark.parametrize("make", [spconv_tensor, engine_tensor])
def test_rows_outside_raise_inside_the_block_alone(make):
    make()
    with check_coords():
        make(OUTSIDE[:1].expand(2, 4))
        with pytest.raises(ValueError, match=MESSAGE):
            make()
        with check_coords(False):
            make()
    assert not checks_coords()
    make()


def test_assigned_indices_are_checked_at_the_next_layer():
    layer = spconv.SubMConv3d(2, 2, 3)
    with check_coords():
        x = spconv_tensor(OUTSIDE * 0)
        x.indices = OUTSIDE
        with pytest.raises(ValueError, match=MESSAGE):
            layer(x)
        x.spatial_shape = [5, 4, 4]
        layer(x)


@pytest.mark.parametrize(("value", "raises"), [("1", True), ("0", False), ("", False)])
def test_the_environment_asks_for_a_process(value, raises):
    code = (
        "import torch, compat.spconv.pytorch as s\n"
        "s.SparseConvTensor(torch.ones(1, 1), torch.full((1, 2), 9).int(), [4], 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {"TRITONSPCONV_CHECK_COORDS": value, "PYTHONPATH": str(Path(ts.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) == raises
    assert ("lie outside the grid" in done.stderr) == raises
