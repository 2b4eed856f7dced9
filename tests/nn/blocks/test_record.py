"""Code that a recording would get wrong runs unchanged."""

import contextlib
import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tests.nn.blocks.published import inputs, settle, spconv_tensor

OTHER = nn.BatchNorm1d(4).eval()
CONSTANT = torch.ones(4)


class Block(spconv.SparseModule):
    """A convolution, a norm, and the code that a test adds."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = spconv.SubMConv3d(4, 4, 3), nn.BatchNorm1d(4), nn.ReLU()
        self.calls, self.setting = 0, {"on": True}
        self.constant = torch.ones(4)
        self.stranger = object()
        self.register_buffer("offset", torch.ones(4))

    def run(self, x):
        out = self.conv(x)
        return out.replace_feature(self.bn(out.features))


def decides_by_values(self, x):
    out = self.run(x)
    return out if out.features.max() > 0 else x


def decides_by_a_buffer(self, x):
    return self.run(x) if self.offset.sum() > 0 else x


def decides_by_rows(self, x):
    return x if len(x.features) == 0 else self.run(x)


def decides_by_shape(self, x):
    return x if x.features.shape[0] == 0 else self.run(x)


def counts_calls(self, x):
    self.calls += 1
    return self.run(x)


def sets_features(self, x):
    out = self.run(x)
    out._features = out.features * 2
    return out


def changes_in_place(self, x):
    out = self.run(x)
    out.features.mul_(2)
    feats = out.features
    feats *= 2
    return out


def writes_rows(self, x):
    out = self.run(x)
    out.features[0] = 0
    return out


def turns_gradients_off(self, x):
    with torch.no_grad():
        return self.run(x)


@torch.no_grad()
def is_decorated(self, x):
    return self.run(x)


def turns_autocast_off(self, x):
    with torch.autocast("cuda", enabled=False):
        return self.run(x)


def checkpoints(self, x):
    return checkpoint(self.run, x, use_reentrant=False)


def checkpoints_reentrantly(self, x):
    feats = checkpoint(lambda feats: self.run(x).features, x.features, use_reentrant=True)
    return x.replace_feature(feats)


def draws_from_torch(self, x):
    return self.run(x) if torch.rand(()) >= 0 else x


def draws_from_python(self, x):
    return self.run(x) if random.random() >= 0 else x


def draws_from_numpy(self, x):
    return self.run(x) if np.random.rand() >= 0 else x  # noqa: NPY002 - the global generator


def uses_a_constant(self, x):
    out = self.run(x)
    return out.replace_feature(out.features + CONSTANT)


def uses_an_attribute(self, x):
    out = self.run(x)
    return out.replace_feature(out.features + self.constant)


def reads_an_object(self, x):
    return self.run(x) if self.stranger is not None else x


def calls_a_stranger(self, x):
    out = self.run(x)
    return out.replace_feature(OTHER(out.features))


def swallows_errors(self, x):
    try:
        if x.features.sum() > 0:
            pass
    except Exception:
        return x
    return self.run(x)


def asks_for_an_attribute(self, x):
    return self.run(x) if hasattr(x, "some_attribute") else x


def asks_a_result(self, x):
    out = self.relu(self.run(x).features.mean())
    return self.run(x) if hasattr(out, "features") else x


def takes_anything(self, *args):
    return self.run(args[0])


def asks_for_the_type_of_features(self, x):
    return self.run(x) if isinstance(x.features, torch.Tensor) else x


CASES = {
    decides_by_values: "decides by a value",
    decides_by_a_buffer: "decides by a value",
    decides_by_rows: "needs the number of rows",
    decides_by_shape: "decides by a value",
    counts_calls: "sets the attribute 'calls'",
    sets_features: "sets the attribute '_features'",
    changes_in_place: "changes a tensor in place",
    writes_rows: "writes into a tensor",
    turns_gradients_off: "enters the context no_grad",
    is_decorated: "enters the context no_grad",
    turns_autocast_off: "enters the context autocast",
    # torch 2.11 makes a tensor before it enters the context.
    checkpoints: "enters the context _checkpoint_hook|calls empty on tensors of its own",
    checkpoints_reentrantly: "asks for the type of",
    draws_from_torch: "calls rand on tensors of its own",
    draws_from_python: "draws random numbers",
    draws_from_numpy: "draws random numbers",
    uses_a_constant: "uses a tensor that is no parameter",
    uses_an_attribute: "reads 'constant', a Tensor",
    reads_an_object: "reads 'stranger', a object",
    calls_a_stranger: "calls a BatchNorm1d that is no child",
    swallows_errors: "decides by a value",
    asks_for_an_attribute: "reads the attribute 'some_attribute'",
    asks_a_result: "asks whether a value has an attribute",
    takes_anything: r"takes the arguments \*args",
    asks_for_the_type_of_features: "asks for the type of",
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("forward", CASES, ids=lambda forward: forward.__name__)
def test_code_that_a_graph_does_not_keep_is_left(forward):
    kind = type("Case", (Block,), {"forward": forward})
    module = settle(kind()).eval()
    (block,) = ts.optimization_report(module).blocks
    assert block.reason is not None
    assert re.search(CASES[forward], block.reason)
    # The recording restores everything that it replaces, and the module runs.
    assert type(ts.optimize(module)) is kind
    assert module.calls == 0
    with contextlib.suppress(RuntimeError):
        module(spconv_tensor(*inputs()))
    module.calls = 5
    assert "__getattribute__" not in vars(nn.Module)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not torch.is_grad_enabled()


def reads_settings(self, x):
    return self.run(x) if self.setting["on"] else x


def uses_a_buffer(self, x):
    out = self.run(x)
    return out.replace_feature(out.features + self.offset)


def unpacks_a_dict(self, batch):
    out = self.run(batch["x"])
    batch.update({"features": out.features, "x": out})
    return batch["x"]


def asks_for_the_type(self, x):
    assert isinstance(x, spconv.SparseConvTensor)
    assert hasattr(x, "replace_feature")
    return self.run(x)


@pytest.mark.parametrize(
    "forward", [reads_settings, uses_a_buffer, unpacks_a_dict, asks_for_the_type],
    ids=lambda forward: forward.__name__,
)  # fmt: skip
def test_code_that_a_graph_keeps_is_optimised(forward):
    module = settle(type("Case", (Block,), {"forward": forward})()).eval()
    results = []
    for each in (module, ts.optimize(module)):
        x = spconv_tensor(*inputs())
        with torch.no_grad():
            results.append(each({"x": x} if forward is unpacks_a_dict else x).features)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    (block,) = ts.optimization_report(module).blocks
    assert block.chains == ("conv, bn, + offset" if forward is uses_a_buffer else "conv, bn",)


def test_settings_are_compared_with_what_they_were():
    module = settle(type("Case", (Block,), {"forward": reads_settings})()).eval()
    x = spconv_tensor(*inputs())
    ts.optimize(module)
    assert module(x) is not x
    module.setting["on"] = False
    assert module(x) is x
