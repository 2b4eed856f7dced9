"""The examples in docstrings run, and say what they show."""

import doctest
import importlib

import pytest

# Every module with an example; a new one belongs here.
MODULES = [
    "tritonspconv.points.grids",
    "tritonspconv.points.table",
    "tritonspconv.sparse_tensor",
    "tritonspconv.testing.rooms",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0
