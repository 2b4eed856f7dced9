"""Hand-written blocks give the same results after ``optimize``, in evaluation and in training."""

import copy
import pickle
import traceback

import pytest
import torch
from torch import nn

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tests.nn.blocks.conftest import Taken
from tests.nn.blocks.published import (
    NETWORKS,
    DetectorBlock,
    EngineBlock,
    MinkowskiBlock,
    WrappedBlock,
    engine_tensor,
    features,
    inputs,
    minkowski_tensor,
    settle,
    spconv_tensor,
)
from tritonspconv import nn as tsnn
from tritonspconv.testing.tolerance import assert_close

# Two cases run in every test: an adapter that adds features, and one that adds sparse tensors.
BLOCKS = {
    "detector": (lambda: DetectorBlock(4, 4, indice_key="k"), spconv_tensor),
    "minkowski": (lambda: MinkowskiBlock(4, 4), minkowski_tensor),
}
WHOLE = Taken("ChannelNorm", True, True)
FIRST = Taken("ChannelNorm", False, True)
WHOLE_TRAINED = Taken("TrainingNorm", True, True)
FIRST_TRAINED = Taken("TrainingNorm", False, True)


@pytest.fixture(params=BLOCKS)
def block(request):
    make, tensor = BLOCKS[request.param]
    return settle(make()), lambda *args, **how: tensor(*inputs(*args, **how))


def same(module, x):
    """Optimise a copy of ``module``; check that it is as near to float64 as ``module``."""
    with torch.no_grad():
        reference = features(copy.deepcopy(module).double()(x(dtype=torch.float64)))
        eager = features(copy.deepcopy(module)(x()))
        got = features(ts.optimize(copy.deepcopy(module))(x()))
    assert got.dtype == eager.dtype
    assert_close(got, reference, eager=eager)


def spconv_input(*args, **how):
    return spconv_tensor(*inputs(*args, **how))


def engine_input(*args, **how):
    return engine_tensor(*inputs(*args, **how))


def minkowski_input(*args, **how):
    return minkowski_tensor(*inputs(*args, **how))


# Results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_infer_the_same(device, taken, name, dtype):
    make, tensor, chains, _ = NETWORKS[name]
    net = settle(make()).to(device, dtype).eval()
    exact = copy.deepcopy(net).double()
    with torch.no_grad():
        eager = features(net(tensor(*inputs(dtype=dtype, device=device))))
        reference = features(exact(tensor(*inputs(dtype=torch.float64, device=device))))
        taken.clear()
        assert ts.optimize(net) is net
        out = features(net(tensor(*inputs(dtype=dtype, device=device))))
    assert len(taken) >= chains
    assert all(each.norm == "ChannelNorm" or each.add for each in taken)
    assert out.dtype == dtype
    assert_close(out, reference, eager=eager)


def step_of(net, tensor, dtype, device, order=None, seed=0):
    """Return output, gradients and buffers of a training step of a copy of ``net``.

    ``order`` is the order of the network's input rows; results are in the original order.
    """
    net = copy.deepcopy(net).to(device, dtype).train()
    feats, coords = inputs(dtype=dtype, device=device, seed=seed)
    feats.requires_grad_()
    order = slice(None) if order is None else order.to(device)
    result = features(net(tensor(feats[order], coords[order])))
    out = torch.empty_like(result)
    out[order] = result
    # Weights are shuffled: with ascending weights, partial sums and errors are far larger than the
    # sum.
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(device)
    (out.double() * weights).sum().backward()
    named = {name: parameter.grad for name, parameter in net.named_parameters()}
    named.update(net.named_buffers())
    return {"out": out, "input": feats.grad, **named}


def eager_steps(net, tensor, device, seed=0):
    """Return steps of ``net`` in float32, each with its rows in another order.

    The error of one step is a single sample. A batch norm's weight has eight numbers, so another
    order of summation often has more than twice the largest error of this order.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [None, *(torch.randperm(80, generator=generator) for _ in range(7))]
    return [step_of(net, tensor, torch.float32, device, order, seed) for order in orders]


def farthest(steps, name, reference):
    """Return the tensor ``name`` of the step in which it is farthest from ``reference``."""
    return max((step[name] for step in steps), key=lambda x: (x - reference).abs().max())


def compare(got, eager, reference):
    """Compare a step with the float64 step; its error may be twice that of steps in ``eager``."""
    assert got.keys() == reference.keys()
    for name, value in reference.items():
        assert all(got[name].dtype == step[name].dtype for step in eager)
        if not value.is_floating_point():
            assert torch.equal(got[name], value)
            continue
        if value.abs().max() < 1e-9:
            # The gradient of a bias in front of a batch norm of training is rounding alone.
            assert got[name].abs().max() < 1e-3, name
            continue
        assert_close(got[name], value, eager=farthest(eager, name, value), name=name)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_train_the_same(device, taken, name):
    make, tensor, _, chains = NETWORKS[name]
    net = settle(make())
    reference = step_of(net, tensor, torch.float64, device)
    eager = eager_steps(net, tensor, device)
    taken.clear()
    got = step_of(ts.optimize(net), tensor, torch.float32, device)
    assert len(taken) >= chains
    assert all(each.norm == "TrainingNorm" for each in taken)
    compare(got, eager, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_autocast_gives_the_same_dtypes(device, taken, block, dtype, mode):
    module, x = block
    module = module.to(device).train(mode == "training")
    results = []
    for net in (copy.deepcopy(module), ts.optimize(module)):
        with torch.autocast(device.type, dtype), torch.set_grad_enabled(mode == "training"):
            results.append(features(net(x(device=device))))
    assert results[0].dtype == results[1].dtype
    error = (results[0].float() - results[1].float()).norm() / results[0].float().norm()
    assert error < 8 * torch.finfo(dtype).eps
    assert len(taken) == 2


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_rows(taken, block, rows):
    module, x = block
    same(module.eval(), lambda **how: x(rows, **how))
    if rows == 2:
        same(module.train(), lambda **how: x(rows, **how))


def test_a_batch_of_one_row_is_refused_as_before(taken, block):
    module, x = block
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ts.optimize(module.train())(x(1))


# The model stays the model


def test_a_model_keeps_its_object_names_and_tensors(block):
    module, _ = block
    kind, before = type(module), dict(module.state_dict(keep_vars=True))
    assert ts.optimize(module) is module
    assert isinstance(module, kind)
    assert type(module).__name__ == kind.__name__
    after = module.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    assert all(after[name] is value for name, value in before.items())
    assert ts.unoptimize(module) is module
    assert type(module) is kind
    assert not [name for name in vars(module) if "fusion" in name]


def test_an_optimiser_made_before_steps_the_model(taken, block):
    module, x = block
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    before = copy.deepcopy(module.state_dict())
    features(ts.optimize(module.train())(x())).square().sum().backward()
    optimiser.step()
    assert not torch.equal(module.conv1.state_dict()[next(iter(module.conv1.state_dict()))],
                           before["conv1." + next(iter(module.conv1.state_dict()))])  # fmt: skip
    assert len(taken) == 2


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_copies_are_optimised_and_run_their_own_modules(taken, block, copied):
    module, x = block
    other = copied(ts.optimize(module.eval()))
    if copied is copy.copy:
        # Replicas are made as torch.nn.DataParallel makes them.
        other._modules = copy.deepcopy(module._modules)
    for layer in (other.conv1, other.conv2):
        for parameter in layer.parameters():
            parameter.data.zero_()
    with torch.no_grad():
        expected = features(ts.unoptimize(copy.deepcopy(other))(x()))
        taken.clear()
        torch.testing.assert_close(features(other(x())), expected)
        assert taken == [FIRST, WHOLE]
        assert not torch.equal(features(module(x())), expected)


def test_a_saved_model_loads_as_an_optimised_one(taken, block, tmp_path):
    module, x = block
    torch.save(ts.optimize(module.eval()), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(features(loaded(x())), features(module(x())))
    assert taken == [FIRST, WHOLE] * 2


def test_optimising_twice_is_optimising_once(taken, block):
    module, x = block
    ts.optimize(ts.optimize(module.eval()))
    same(module, x)
    assert type(ts.unoptimize(module)).__bases__ != (type(module),)


# What is fused is decided at every call


def test_modes_are_those_of_the_call(taken, block):
    module, x = block
    ts.optimize(module.train())
    features(module(x()))
    assert taken == [FIRST_TRAINED, WHOLE_TRAINED]
    with torch.no_grad():
        module.eval()(x())
        assert taken[2:] == [FIRST, WHOLE]
        module.train()(x())
    assert taken[4:] == [FIRST_TRAINED, WHOLE_TRAINED]


def norms(module):
    return [each for each in module.modules() if isinstance(each, nn.BatchNorm1d)]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda module: [norm.eval() for norm in norms(module)], id="frozen norms"),
        pytest.param(
            lambda module: [setattr(norm, "momentum", None) for norm in norms(module)],
            id="cumulative average",
        ),
        pytest.param(
            lambda module: [norm.__init__(4, track_running_stats=False) for norm in norms(module)],
            id="no running statistics",
        ),
        pytest.param(
            lambda module: [norm.register_forward_hook(lambda *_: None) for norm in norms(module)],
            id="hooks",
        ),
    ],
)
def test_norms_that_torch_trains(taken, block, change):
    module, x = block
    change(module.train())
    results = []
    for net in (copy.deepcopy(module), ts.optimize(module)):
        out = features(net(x()))
        out.square().sum().backward()
        results.append([out, *(parameter.grad for parameter in net.parameters()), *net.buffers()])
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got, expected)
    assert not taken


def test_synchronised_norms_are_fused_in_evaluation_alone(taken):
    module = settle(DetectorBlock(4, 4, norm=nn.SyncBatchNorm))
    same(module.eval(), spconv_input)
    assert taken == [FIRST, WHOLE]
    # Without a process group, torch's SyncBatchNorm runs on a CPU too.
    expected = copy.deepcopy(module.train())(spconv_input()).features
    assert torch.equal(ts.optimize(module)(spconv_input()).features, expected)
    assert taken == [FIRST, WHOLE]


def test_frozen_parameters_get_no_gradient(taken, block):
    module, x = block
    ts.optimize(module.train())
    module.conv1.requires_grad_(False)
    norms(module)[1].requires_grad_(False)
    features(module(x())).sum().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all((grad is None) == (not module.get_parameter(name).requires_grad)
               for name, grad in grads.items())  # fmt: skip
    assert taken == [FIRST_TRAINED, WHOLE_TRAINED]


@torch.no_grad()
@pytest.mark.parametrize("place", ["conv2", "norm", "relu"])
def test_hooks_fire(taken, block, place):
    module, x = block
    module = ts.optimize(module.eval())
    watched = norms(module)[1] if place == "norm" else getattr(module, place)
    calls = []
    with watched.register_forward_hook(lambda *args: calls.append(None)):
        out = features(module(x()))
    assert len(calls) == (2 if place == "relu" else 1)
    assert len(taken) < 2 or not all(each.relu for each in taken)
    torch.testing.assert_close(out, features(module(x())))


@torch.no_grad()
def test_modules_may_be_patched_and_replaced(taken, block):
    module, x = block
    module = ts.optimize(module.eval())
    module.conv1.forward = module.conv1.forward
    same(module, x)
    del module.conv1.forward
    taken.clear()
    module.relu = (ME.MinkowskiGELU if isinstance(module, MinkowskiBlock) else nn.GELU)()
    same(module, x)
    # The copy that `same` optimises has no ReLU; the module itself decides at the call.
    expected = features(ts.unoptimize(copy.deepcopy(module))(x()))
    taken.clear()
    torch.testing.assert_close(features(module(x())), expected)
    assert [each.relu for each in taken] == [False, False]


@torch.no_grad()
def test_a_parametrised_weight_is_fused_as_it_is(taken):
    module = settle(DetectorBlock(4, 4)).eval()
    nn.utils.parametrizations.weight_norm(module.conv1, "weight")
    same(module, spconv_input)
    assert taken == [FIRST, WHOLE]


@torch.no_grad()
def test_a_layer_used_twice_is_fused_at_both_uses(taken):
    class Twice(spconv.SparseModule):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.relu = spconv.SubMConv3d(4, 4, 3), nn.BatchNorm1d(4), nn.ReLU()

        def forward(self, x):
            for _ in range(2):
                x = self.conv(x)
                x = x.replace_feature(self.relu(self.bn(x.features)))
            return x

    same(settle(Twice()).eval(), spconv_input)
    assert taken == [FIRST, FIRST]


def test_classes_of_users_run_their_code(taken):
    class Norm(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) + 1

    same(settle(DetectorBlock(4, 4, norm=Norm)).eval(), spconv_input)
    assert not taken


@torch.no_grad()
def test_watched_and_traced_modules_run_one_by_one(taken, block, monkeypatch):
    module, x = block
    ts.optimize(module.eval())
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        module(x())
    with nn.modules.module.register_module_forward_hook(lambda *args: None):
        module(x())
    assert not taken


# Residuals


@torch.no_grad()
def test_residuals_that_do_not_fit_are_added_by_torch(taken):
    class Block(DetectorBlock):
        def forward(self, x, other):
            out = self.conv1(x)
            out = out.replace_feature(self.bn1(out.features))
            return out.replace_feature(self.relu(out.features + other))

    block = settle(Block(4, 4)).eval()
    fused = ts.optimize(copy.deepcopy(block))
    feats, coords = inputs()
    for other in (torch.randn(80, 1), torch.randn(4), torch.randn(80, 4).double(), 2.0):
        expected = block(spconv_tensor(feats, coords), other).features
        out = fused(spconv_tensor(feats, coords), other).features
        assert out.dtype == expected.dtype
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert len(taken) == 4


@torch.no_grad()
def test_an_addition_in_place_keeps_the_dtype(taken):
    block = settle(MinkowskiBlock(4, 4)).eval()
    block.downsample = ME.MinkowskiConvolution(4, 4, 1, dimension=3).double()
    results = []
    for module in (copy.deepcopy(block), ts.optimize(block)):
        results.append(module(minkowski_input()).F)
    assert results[0].dtype == results[1].dtype == torch.float32
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert taken == [FIRST, Taken("ChannelNorm", False, False)]


@torch.no_grad()
def test_residuals_at_other_coordinates_are_united(taken):
    class Block(MinkowskiBlock):
        def __init__(self):
            super().__init__(4, 4)
            self.conv2 = ME.MinkowskiConvolution(4, 4, 2, stride=2, dimension=3)

        def forward(self, x, other):
            out = self.norm2(self.conv2(x)) + other
            return self.relu(out)

    block = settle(Block()).eval()
    fused = ts.optimize(copy.deepcopy(block))
    results = []
    for module in (block, fused):
        x = minkowski_tensor(*inputs())
        other = ME.SparseTensor(
            torch.randn(30, 4, generator=torch.Generator().manual_seed(3)), 2 * inputs(30)[1],
            tensor_stride=2, coordinate_manager=x.coordinate_manager,
        )  # fmt: skip
        results.append(module(x, other))
    torch.testing.assert_close(results[1].F, results[0].F, rtol=1e-5, atol=1e-5)
    assert torch.equal(results[1].C, results[0].C)
    assert taken == [Taken("ChannelNorm", False, False)]


@torch.no_grad()
def test_what_the_code_changes_meanwhile_stays_in_order(taken):
    class Block(spconv.SparseModule):
        """A block that changes the input of a convolution in place, after the convolution."""

        def __init__(self):
            super().__init__()
            self.conv, self.bn = spconv.SubMConv3d(4, 4, 3), nn.BatchNorm1d(4)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            out = self.conv(x)
            out = out.replace_feature(self.bn(out.features))
            identity = self.relu(x.features)
            return out.replace_feature(out.features + identity)

    same(settle(Block()).eval(), spconv_input)
    assert taken == [Taken("ChannelNorm", False, False)]


@torch.no_grad()
def test_an_inverse_layer_finds_the_map_of_a_layer_before_it(taken):
    class Block(spconv.SparseModule):
        def __init__(self):
            super().__init__()
            self.first = spconv.SubMConv3d(4, 4, 3)
            self.down = spconv.SparseConv3d(4, 4, 2, 2, indice_key="d")
            self.bn, self.bn2 = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
            self.up = spconv.SparseInverseConv3d(4, 4, 2, indice_key="d")

        def forward(self, x):
            y = self.first(x)
            y = y.replace_feature(self.bn(y.features))
            z = self.up(self.down(x))
            return y.replace_feature(torch.relu(y.features + z.features))

    same(settle(Block()).eval(), spconv_input)
    assert taken == [Taken("ChannelNorm", False, False)]


# Guards


@torch.no_grad()
def test_attributes_that_the_code_reads_are_guarded(taken):
    class Block(DetectorBlock):
        scale = 1

        def forward(self, x):
            out = self.conv1(x)
            out = out.replace_feature(self.bn1(out.features))
            if self.scale != 1:
                out = out.replace_feature(out.features * self.scale)
            return out

    module = ts.optimize(settle(Block(4, 4)).eval())
    x = spconv_tensor(*inputs())
    once = module(x).features
    assert len(taken) == 1
    module.scale = 3
    torch.testing.assert_close(module(x).features, 3 * once)
    assert len(taken) == 1


@torch.no_grad()
def test_children_that_come_later_are_guarded(taken):
    module = ts.optimize(settle(DetectorBlock(4, 4)).eval())
    x = spconv_tensor(*inputs())
    module.downsample = spconv.SubMConv3d(4, 4, 3)
    expected = ts.unoptimize(copy.deepcopy(module))(x).features
    taken.clear()
    assert torch.equal(module(x).features, expected)
    assert not taken


def test_code_that_reads_the_mode_is_recorded_in_both(taken):
    class Block(DetectorBlock):
        def forward(self, x):
            out = self.conv1(x)
            out = out.replace_feature(self.bn1(out.features))
            if self.training:
                return out.replace_feature(2 * out.features)
            return out.replace_feature(self.relu(out.features))

    module = settle(Block(4, 4)).train()
    x = spconv_input
    same(module, x)
    same(module.eval(), x)
    assert taken == [Taken("TrainingNorm", False, False), FIRST]


@torch.no_grad()
def test_lists_of_modules_are_guarded(taken):
    class Block(spconv.SparseModule):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([spconv.SubMConv3d(4, 4, 3)])
            self.norms = nn.ModuleList([nn.BatchNorm1d(4)])

        def forward(self, x):
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = conv(x)
                x = x.replace_feature(norm(x.features))
            return x

    module = ts.optimize(settle(Block()).eval())
    x = spconv_tensor(*inputs())
    module(x)
    assert len(taken) == 1
    module.convs.append(spconv.SubMConv3d(4, 4, 3))
    module.norms.append(nn.BatchNorm1d(4).eval())
    expected = ts.unoptimize(copy.deepcopy(module))(x).features
    taken.clear()
    assert torch.equal(module(x).features, expected)
    assert not taken


@torch.no_grad()
def test_other_arguments_run_the_code(taken):
    class Block(DetectorBlock):
        def forward(self, x, double=False):
            assert isinstance(x, spconv.SparseConvTensor)
            out = self.conv1(x)
            out = out.replace_feature(self.bn1(out.features))
            return out.replace_feature(2 * out.features) if double else out

    module, x = settle(Block(4, 4)).eval(), spconv_tensor(*inputs())
    ts.optimize(module)
    once = module(x).features
    assert len(taken) == 1
    torch.testing.assert_close(module(x, True).features, 2 * once)
    torch.testing.assert_close(module(x, double=True).features, 2 * once)
    with pytest.raises(AssertionError):
        module(x.features)
    assert len(taken) == 1


# Containers and reports


def test_a_container_is_looked_into_only_if_that_fuses_more(taken):
    """The module's own hooks still fire afterwards."""
    module = settle(WrappedBlock(4)).eval()
    (block,) = ts.optimization_report(module).blocks
    assert block.chains == ("net.0, net.1, net.2", "net.3, net.4, + x, relu")
    same(module, spconv_input)
    assert taken == [FIRST, WHOLE]
    calls = []
    ts.optimize(module)
    module.net.register_forward_hook(lambda *args: calls.append(None))
    same(module, spconv_input)
    assert len(calls) == 3
    module.net.add(nn.BatchNorm1d(4).eval())
    expected = ts.unoptimize(copy.deepcopy(module))(spconv_input()).features
    torch.testing.assert_close(module(spconv_input()).features, expected)
    for container in (WrappedBlock(4), WrappedBlock(4)):
        container.net.fuse_layers = False
        assert ts.optimization_report(container).blocks == ()
    hooked = WrappedBlock(4)
    hooked.net.register_forward_hook(lambda *args: None)
    assert ts.optimization_report(hooked).blocks == ()


def test_nested_and_foreign_containers_are_looked_into(taken):
    def nested(*modules):
        return spconv.SparseSequential(
            spconv.SparseSequential(*modules[:3]), spconv.SparseSequential(*modules[3:])
        )

    class Engine(tsnn.SparseModule):
        def __init__(self):
            super().__init__()
            self.net = tsnn.Sequential(tsnn.SubMConv3d(4, 4, 3), tsnn.BatchNorm(4))

        def forward(self, x):
            out = self.net(x)
            return out.replace(torch.relu(out.feats + x.feats))

    same(settle(WrappedBlock(4, nested)).eval(), spconv_input)
    same(settle(Engine()).eval(), engine_input)
    assert taken == [FIRST, WHOLE, WHOLE]


def test_features_that_go_into_another_tensor_are_no_chain():
    class Block(DetectorBlock):
        def forward(self, x):
            return x.replace_feature(torch.relu(self.bn1(self.conv1(x).features)))

    (block,) = ts.optimization_report(Block(4, 4)).blocks
    assert block.reason == "no convolution is followed by a norm, an addition or a ReLU"


@torch.no_grad()
def test_a_relu_of_anything_but_the_features_is_no_stage():
    class OfIndices(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = spconv.SubMConv3d(4, 4, 3), nn.ReLU()

        def forward(self, x):
            out = self.conv(x)
            return out.replace_feature(self.relu(out.indices))

    module, x = OfIndices(), spconv_input()
    with torch.no_grad():
        assert torch.equal(ts.optimize(module)(x).features, x.indices)


def test_a_torch_sequential_is_fused(taken):
    net = nn.Sequential(
        ME.MinkowskiConvolution(4, 6, 3, dimension=3), ME.MinkowskiBatchNorm(6), ME.MinkowskiReLU()
    )
    same(settle(net).eval(), minkowski_input)
    assert taken == [FIRST]
    optimised = ts.optimize(net)
    optimised.append(ME.MinkowskiTanh())
    assert features(optimised(minkowski_tensor(*inputs()))).abs().max() < 1
    assert taken == [FIRST]


def test_folding_sees_an_optimised_container():
    net = nn.Sequential(
        ME.MinkowskiConvolution(4, 6, 3, dimension=3), ME.MinkowskiBatchNorm(6), ME.MinkowskiReLU()
    )
    net = ts.optimize(settle(net).eval())
    x = minkowski_tensor(*inputs())
    with torch.no_grad():
        folded = ts.fuse(net)
        torch.testing.assert_close(folded(x).F, net(x).F, rtol=1e-5, atol=1e-5)
    assert len(folded) == 1


def test_a_report_names_chains_and_reasons():
    class Odd(DetectorBlock):
        def forward(self, x):
            if x.features.sum() > 0:
                return self.conv1(x)
            return x

    net = spconv.SparseSequential(DetectorBlock(4, 4), Odd(4, 4), EngineBlock(4, 4))
    net.add(spconv.SubMConv3d(4, 4, 3))
    kinds = [type(module) for module in net.modules()]
    report = ts.optimization_report(net)
    assert str(report) == (
        "0 (DetectorBlock): conv1, bn1, relu; conv2, bn2, + x, relu\n"
        "1 (Odd): left: its forward decides by a value that is known only when it runs\n"
        "2 (EngineBlock): conv1, norm1, relu; conv2, norm2, + side_norm, relu; side, side_norm"
    )
    assert report.num_chains == 5
    assert [type(module) for module in net.modules()] == kinds


def test_a_model_without_chains_stays():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert ts.optimize(net) is net
    assert type(net) is nn.Sequential
    assert ts.optimization_report(net).blocks == ()


def test_classes_that_others_derive_meanwhile_are_kept(taken):
    """FSDP, for example, gives a module a class derived from its class."""
    module = ts.optimize(settle(DetectorBlock(4, 4)).eval())
    derived = type("Derived", (type(module),), {})
    module.__class__ = derived
    same(module, spconv_input)
    # The copies that are not optimised again are optimised already.
    assert taken == [FIRST, WHOLE] * 3
    assert type(ts.unoptimize(module)) is derived


def test_a_traceback_shows_the_line(taken):
    module = ts.optimize(settle(DetectorBlock(4, 4)).eval())
    module.bn2.running_mean = torch.zeros(5)
    with pytest.raises(ValueError, match=r"norm\.mean must be") as caught, torch.no_grad():
        module(spconv_input())
    assert "    fused_conv2 = " in "".join(traceback.format_exception(caught.value))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_torch_compile_runs_an_optimised_model(taken):
    torch.compiler.reset()
    module = ts.optimize(settle(DetectorBlock(4, 4)).eval())
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        for rows in (80, 60, 40):
            expected = module(spconv_input(rows)).features
            assert torch.equal(compiled(spconv_input(rows)).features, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")
def test_a_scripted_child_is_left(taken):
    module = settle(DetectorBlock(4, 4)).eval()
    module.head = torch.jit.script(nn.Linear(4, 4))
    with torch.no_grad():
        expected = module(spconv_input()).features
        got = ts.unoptimize(ts.optimize(module))(spconv_input()).features
    assert torch.equal(got, expected)


def test_patched_modules_are_left(taken):
    module = settle(DetectorBlock(4, 4)).eval()
    module.forward = lambda x: x
    assert "somebody assigned a forward" in str(ts.optimization_report(module))
    x = spconv_tensor(*inputs())
    assert ts.optimize(module)(x) is x
    assert not taken


def test_on_a_cpu_torch_trains_the_norms(monkeypatch):
    """The batch norm of a CPU is faster than the engine's."""
    module = settle(DetectorBlock(4, 4)).train()
    x = spconv_input
    with torch.no_grad():
        expected = copy.deepcopy(module)(x()).features
        assert torch.equal(ts.optimize(module)(x()).features, expected)
