"""The examples in docstrings run and print the shown results."""

import doctest
import importlib

import pytest
import torch

import tritonspconv

# Every module with an example; add a new module here.
MODULES = [
    "tritonspconv.geometry",
    "tritonspconv.kernel_map.build",
    "tritonspconv.nn.container",
    "tritonspconv.nn.conv",
    "tritonspconv.nn.fuse",
    "tritonspconv.nn.norm",
    "tritonspconv.nn.pool",
    "tritonspconv.ops.voxelize",
    "tritonspconv.points.grids",
    "tritonspconv.points.table",
    "tritonspconv.sparse_tensor",
    "tritonspconv.testing.lidar",
    "tritonspconv.testing.rooms",
    "tritonspconv.training.boxes",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str):
    module = importlib.import_module(name)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    names = {"torch": torch, "ts": tritonspconv}
    result = doctest.testmod(module, optionflags=options, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0
