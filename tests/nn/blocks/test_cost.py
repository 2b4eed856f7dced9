"""The costs of a block: passes over the features, and nodes of the autograd graph."""

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import tritonspconv as ts
from tests.nn.blocks.published import (
    DetectorBlock,
    MinkowskiBlock,
    features,
    inputs,
    minkowski_tensor,
    settle,
    spconv_tensor,
)
from tritonspconv.ops import conv

ROWS, CHANNELS = 80, 4
# Launches on a GPU of each operation over the features; torch's batch norm takes two forward and
# two backward.
LAUNCHES = {
    "gather_gemm": 1, "batch_norm": 2, "batch_norm_grad": 2, "conv_grads": 2,
    "native_batch_norm": 2, "native_batch_norm_backward": 2,
    "relu": 1, "relu_": 1, "add": 1, "add_": 1, "threshold_backward": 1,
}  # fmt: skip
BLOCKS = {
    "detector": (lambda: DetectorBlock(4, 4, indice_key="k"), spconv_tensor),
    "minkowski": (lambda: MinkowskiBlock(4, 4), minkowski_tensor),
}


class _Passes(TorchDispatchMode):
    """Counts operations that return features; a launcher of the engine counts as one operation."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) else out
        name = func.overloadpacket.__name__
        if name in LAUNCHES and first.shape == (ROWS, CHANNELS):
            self.counts[name] += 1
        return out


@pytest.fixture
def passes(taken, monkeypatch):
    counter = _Passes()

    def counted(name, function):
        def call(*args, **kwargs):
            counter.counts[name] += 1
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call

    for name in ("gather_gemm", "batch_norm", "batch_norm_grad", "conv_grads"):
        monkeypatch.setattr(conv, name, counted(name, getattr(conv, name)))
    return counter


def launches(counter) -> int:
    return sum(LAUNCHES[name] * count for name, count in counter.counts.items())


def nodes(out) -> int:
    """Return the number of nodes behind ``out``, without those that accumulate gradients."""
    seen, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if (
            node is not None
            and node not in seen
            and node.name() != "torch::autograd::AccumulateGrad"
        ):
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return len(seen)


@pytest.mark.parametrize("name", BLOCKS)
def test_inference_is_one_launch_a_convolution(passes, name):
    make, tensor = BLOCKS[name]
    module, counted = settle(make()).eval(), []
    for each in (copy.deepcopy(module), ts.optimize(module)):
        passes.counts.clear()
        with torch.no_grad(), passes:
            each(tensor(*inputs()))
        counted.append(launches(passes))
    # Two convolutions, two norms of two launches each, two ReLUs and an addition.
    assert counted == [9, 2]


@pytest.mark.parametrize("name", BLOCKS)
def test_training_is_one_node_a_convolution(passes, name):
    make, tensor = BLOCKS[name]
    module, counted, graphs = settle(make()).train(), [], []
    for each in (copy.deepcopy(module), ts.optimize(module)):
        passes.counts.clear()
        feats, coords = inputs()
        feats.requires_grad_()
        with passes:
            out = features(each(tensor(feats, coords)))
            graphs.append(nodes(out))
            out.backward(torch.ones_like(out))
        counted.append(launches(passes))
    forward, backward = 2 * (1 + 2), 2 * (2 + 2)
    # The input has two paths through the block, so its two gradients are added.
    assert counted[1] == forward + backward + 1
    assert counted[0] == counted[1] + 2 * 2 + 1
    # MinkowskiEngine's tensor copies the features from which it is made.
    assert graphs == ([8, 3] if name == "minkowski" else [7, 2])
