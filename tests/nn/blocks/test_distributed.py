"""An optimised model in DistributedDataParallel trains like the model itself."""

import copy

import pytest
import torch
from torch import distributed

import tritonspconv as ts
from tests.nn.blocks.conftest import Taken
from tests.nn.blocks.published import DetectorBlock, inputs, settle, spconv_tensor

pytestmark = pytest.mark.skipif(
    not distributed.is_gloo_available(), reason="torch is built without gloo"
)


@pytest.fixture
def process_group(tmp_path):
    """A process group of one process."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["optimised first", "wrapped first"])
def test_gradients_are_those_of_the_model(process_group, taken, order):
    module = settle(DetectorBlock(4, 4)).train()
    results = []
    for optimised in (False, True):
        model = copy.deepcopy(module)
        if optimised and order == "optimised first":
            ts.optimize(model)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        if optimised and order == "wrapped first":
            ts.optimize(parallel)
        out = parallel(spconv_tensor(*inputs())).features
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out, *(parameter.grad for parameter in model.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert taken == [Taken("TrainingNorm", False, True), Taken("TrainingNorm", True, True)]
