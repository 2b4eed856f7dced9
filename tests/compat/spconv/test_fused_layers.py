"""Convolutions that take up the batch norm and the ReLU behind them."""

import copy
import pickle

import pytest
import torch
from torch import nn

import compat.spconv.pytorch as spconv
from compat.spconv import constants
from compat.spconv.core import Activation
from compat.spconv.pytorch import SparseConvTensor
from compat.spconv.pytorch.conv import SparseConvolution
from tests._fused import keeps_bits, record_fused, settle
from tritonspconv.kernels import has_numba
from tritonspconv.nn.chain import fuses_on, trains_on

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def fused(monkeypatch) -> list[tuple[bool, bool]]:
    return record_fused(monkeypatch, SparseConvolution)


def chain(device="cpu", *, bias=False, relu=True, norm=None, conv=None) -> spconv.SparseSequential:
    children = [spconv.SubMConv3d(4, 6, 3, bias=bias) if conv is None else conv]
    children.append(settle(nn.BatchNorm1d(6, eps=1e-3)) if norm is None else norm)
    children += [nn.ReLU()] if relu else []
    return spconv.SparseSequential(*children).to(device)


def module_by_module(net: spconv.SparseSequential, x: SparseConvTensor) -> SparseConvTensor:
    """Run the same container with fusing off."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, spconv.SparseSequential):
            module.fuse_layers = False
    return net(x)


@torch.no_grad()
def check(net: spconv.SparseSequential, x: SparseConvTensor) -> None:
    """Check that features, sites and keys are the same as module by module."""
    tolerance = 1e-12 if x.features.dtype == torch.float64 else 2e-5
    expected, y = module_by_module(net, x), net(x)
    assert y.features.dtype == expected.features.dtype
    torch.testing.assert_close(y.features, expected.features, rtol=tolerance, atol=tolerance)
    assert torch.equal(y.indices, expected.indices)
    assert y.spatial_shape == expected.spatial_shape
    assert y.indice_dict.keys() == expected.indice_dict.keys()


KINDS = {
    "submanifold": lambda **how: [spconv.SubMConv3d(4, 6, 3, indice_key="k", **how)],
    "strided": lambda **how: [spconv.SparseConv3d(4, 6, 3, 2, 1, indice_key="k", **how)],
    "transposed": lambda **how: [spconv.SparseConvTranspose3d(4, 6, 2, 2, **how)],
    "inverse": lambda **how: [
        spconv.SparseConv3d(4, 5, 3, 2, 1, indice_key="k"),
        spconv.SparseInverseConv3d(5, 6, 3, indice_key="k", **how),
    ],
    "pointwise": lambda **how: [spconv.SubMConv3d(4, 6, 1, **how)],
    "strided pointwise": lambda **how: [spconv.SparseConv3d(4, 6, 1, 2, **how)],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("repeated", [False, True], ids=["distinct", "repeated"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_what_its_modules_are(make, device, fused, kind, bias, repeated, dtype):
    x = make(dtype=dtype)
    if repeated:
        x.indices[1::7] = x.indices[0::7][: len(x.indices[1::7])]
    for rest in (
        [settle(nn.BatchNorm1d(6, eps=1e-3)), nn.ReLU()],
        [settle(nn.BatchNorm1d(6, affine=False))],
        [settle(spconv.SparseBatchNorm(6)), spconv.SparseReLU(inplace=True), nn.ReLU()],
        [settle(spconv.SparseSyncBatchNorm(6))],
        [settle(nn.SyncBatchNorm(6)), nn.ReLU()],
        [nn.ReLU(inplace=True), settle(nn.BatchNorm1d(6))],
    ):
        check(spconv.SparseSequential(*KINDS[kind](bias=bias), *rest).to(device, dtype), x)
    taken = [(True, True), (True, False), (True, True), (True, False), (True, True), (False, True)]
    assert fused == taken


def test_whole_networks(make, device, fused):
    def block(conv):
        norm = settle(nn.BatchNorm1d(conv.out_channels, eps=1e-3))
        return spconv.SparseSequential(conv, norm, nn.ReLU())

    net = spconv.SparseSequential(
        block(spconv.SubMConv3d(4, 8, 3, bias=False, indice_key="a")),
        block(spconv.SubMConv3d(8, 8, 3, indice_key="a")),
        spconv.SparseSequential(
            block(spconv.SparseConv3d(8, 16, 3, 2, 1, bias=False, indice_key="b")),
            spconv.SparseMaxPool3d(2),
            nn.GELU(),
            block(spconv.SubMConv3d(16, 16, 3)),
        ),
        spconv.SubMConv3d(16, 4, 3),
    ).to(device)
    check(net, make())
    assert fused == [(True, True)] * 4


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(make, device, rows):
    check(chain(device), make(n=rows))


def test_kernels_fuse_evaluation_and_a_cpu_keeps_its_bits(make, device, monkeypatch):
    """Layers fuse where the package fuses them; the fixture of this file fuses everywhere."""
    monkeypatch.undo()
    place = torch.empty(0, device=device).device
    assert trains_on(place) == (place.type == "cuda")
    assert fuses_on(place) == (place.type == "cuda" or has_numba(place))
    net, x = chain(device), make()
    with torch.no_grad():
        y = net(x).features
        if keeps_bits(place):
            assert torch.equal(y, module_by_module(net, x).features)
    check(net, x)


def trained(net: nn.Module, x: SparseConvTensor, *, fuse: bool, dtype=None) -> list[torch.Tensor]:
    """Return output, gradients and buffers of one training step of a copy of the network."""
    net, feats = copy.deepcopy(net).train(), x.features.detach().clone().requires_grad_()
    net.fuse_layers = fuse
    with torch.autocast(feats.device.type, dtype, enabled=dtype is not None):
        out = net(x.replace_feature(feats)).features
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    (out.float() * weights).sum().backward()
    grads = [parameter.grad for parameter in net.parameters()]
    return [out.detach(), feats.grad, *grads, *net.buffers()]


def same(got: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a, b = a.double(), b.double()
        assert (a - b).norm() <= tolerance * b.norm() + tolerance**2


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(None, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)], ids=str
)
@pytest.mark.parametrize("kind", ["submanifold", "strided", "pointwise"])
def test_a_training_step_is_that_of_the_modules(make, device, fused, kind, dtype, tolerance):
    x = make()
    for rest in (
        [nn.BatchNorm1d(6, eps=1e-3, momentum=0.01), nn.ReLU()],
        [nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 3)],
        [spconv.SparseBatchNorm(6, affine=False), spconv.SparseReLU()],
        [nn.BatchNorm1d(6)],
    ):
        # The gradient of a bias in front of a norm is zero up to rounding.
        net = spconv.SparseSequential(*KINDS[kind](bias=False), *rest).to(device)
        same(*(trained(net, x, fuse=fuse, dtype=dtype) for fuse in (True, False)), tolerance)
    assert fused == [(True, True)] * 3 + [(True, False)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(None, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)], ids=str
)
def test_norms_without_a_convolution_train_in_one_node(make, device, fused, dtype, tolerance):
    x = make()
    for rest, expected in (
        ([nn.BatchNorm1d(4), nn.ReLU()], "_TrainNormBackward"),
        ([spconv.SparseBatchNorm(4, momentum=0.01), nn.ReLU(inplace=True)], "_TrainNormBackward"),
        ([nn.BatchNorm1d(4)], "_TrainNormBackward"),
        ([nn.BatchNorm1d(4, momentum=None), nn.ReLU()], "ReluBackward0"),
        ([nn.BatchNorm1d(4, track_running_stats=False)], "NativeBatchNormBackward0"),
    ):
        net = spconv.SparseSequential(*rest).to(device)
        assert net(x).features.grad_fn.name() == expected
        same(*(trained(net, x, fuse=fuse, dtype=dtype) for fuse in (True, False)), tolerance)
        with torch.no_grad():
            check(net.eval(), x)
    assert not fused


def test_a_bias_before_a_norm_trains(make, device, fused):
    """The gradient of the bias is zero up to rounding, and the bias moves the running mean."""
    net = chain(device, bias=True, norm=nn.BatchNorm1d(6, momentum=1.0))
    got, expected = (trained(net, make(), fuse=fuse) for fuse in (True, False))
    assert fused == [(True, True)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_training_norms_of_parameters_that_do_not_learn(make, device, fused):
    net, x = chain(device, norm=nn.BatchNorm1d(6)), make()
    net[1].requires_grad_(False)
    net(x).features.sum().backward()
    assert net[0].weight.grad is not None
    assert net[1].weight.grad is None
    frozen = chain(device, norm=nn.BatchNorm1d(6)).requires_grad_(False)
    assert not frozen(x.replace_feature(x.features.detach())).features.requires_grad
    assert fused == [(True, True)] * 2


def test_a_graph_is_differentiated_again(make, device, fused):
    """The backward pass does not change the tensors that it needs."""
    net, x = chain(device, norm=nn.BatchNorm1d(6)), make()
    out = net(x).features.square().sum()
    first = torch.autograd.grad(out, list(net.parameters()), retain_graph=True)
    second = torch.autograd.grad(out, list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert fused == [(True, True)]


def test_a_checkpointed_step_is_the_step(make, device, fused):
    from torch.utils.checkpoint import checkpoint

    net, x = chain(device, norm=nn.BatchNorm1d(6)), make()
    grads = []
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=False)):
        net.zero_grad()
        run(x).features.square().sum().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    # The checkpoint runs the forward pass twice; its statistics then move twice, as in torch.
    assert int(net[1].num_batches_tracked) == len(fused) == 3


def test_what_torch_trains_itself(make, device, fused):
    x, hooked = make(), nn.BatchNorm1d(6)
    hooked.register_forward_hook(lambda *args: None)
    for norm in (
        nn.BatchNorm1d(6, momentum=None),
        nn.BatchNorm1d(6, track_running_stats=False),
        hooked,
    ):
        net = chain(device, norm=norm)
        for got, expected in zip(
            *(trained(net, x, fuse=fuse) for fuse in (True, False)), strict=True
        ):
            assert torch.equal(got, expected)
    with pytest.raises(RuntimeError, match="should contain 6 elements not 5"):
        trained(chain(device, norm=nn.BatchNorm1d(5)), x, fuse=True)
    assert not fused


def test_torch_trains_vectors_with_gaps(make, device, fused):
    net = chain(device, norm=nn.BatchNorm1d(6))
    net[1].weight = nn.Parameter(torch.rand(12, device=device)[::2])
    net(make()).features.sum().backward()
    assert net[1].weight.grad is not None
    assert not fused


def test_rows_and_dtypes_that_torch_trains_itself(make, device, fused):
    net = chain(device, norm=nn.BatchNorm1d(6)).double()
    x = make(dtype=torch.float64)
    same(*(trained(net, x, fuse=fuse) for fuse in (True, False)), 1e-12)
    assert not fused
    # The number of rows is known when the convolution runs.
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        trained(chain(device, norm=nn.BatchNorm1d(6)), make(n=1), fuse=True)
    assert fused == [(True, True)]


def test_gradients_are_those_of_the_modules(make, device, fused):
    net, x = chain(device), make(dtype=torch.float64)
    net.double()
    net(x).features.square().sum().backward()
    assert not fused
    ours = [x.features.grad, *(parameter.grad for parameter in net.parameters())]
    x.features.grad = None
    net.zero_grad()
    features = net[0](x).features
    net[2](net[1](features)).square().sum().backward()
    for a, b in zip(ours, [x.features.grad, *(p.grad for p in net.parameters())], strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_norms_by_the_batch(make, device, fused):
    x = make()
    training = chain(device)
    training[1].train()
    before = training[1].running_mean.clone()
    training(x)
    assert not torch.equal(training[1].running_mean, before)
    assert fused.pop() == (True, True)
    untracked = nn.BatchNorm1d(6, track_running_stats=False).eval()
    check(chain(device, norm=untracked), x)
    assert not fused
    training[1].eval()
    check(training, x)
    training[0].train()
    check(training, x)
    assert fused == [(True, True)] * 2


@pytest.mark.parametrize(
    ("watched", "left"), [(0, []), (1, []), (2, [(True, False)])], ids=["conv", "norm", "relu"]
)
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
@pytest.mark.filterwarnings("ignore:For backward hooks to be called:UserWarning")
def test_hooks_fire(make, device, fused, watched, left, kind):
    net, calls = chain(device), []
    register = {
        "forward": net[watched].register_forward_hook,
        "pre": net[watched].register_forward_pre_hook,
        "backward": net[watched].register_full_backward_hook,
    }[kind]
    handle = register(lambda *args: calls.append(None))
    with torch.no_grad():
        net(make())
    assert fused == left
    assert len(calls) == (kind != "backward")
    handle.remove()
    check(net, make())
    assert fused == [*left, (True, True)]


def test_global_hooks_fire(make, device, fused):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(type(module).__name__)
    )
    with torch.no_grad(), handle:
        chain(device)(make())
    assert seen == ["SubMConv3d", "BatchNorm1d", "ReLU", "SparseSequential"]
    assert not fused


@torch.no_grad()
def test_code_of_users_runs(make, device, fused, monkeypatch):
    class Conv(spconv.SubMConv3d):
        def forward(self, input):
            return super().forward(input).replace_feature(torch.ones(40, 6, device=device))

    class Norm(nn.BatchNorm1d):
        def forward(self, input):
            return super().forward(input) + 1

    class Called(spconv.SubMConv3d):
        def __call__(self, input):
            return super().__call__(input)

    x = make()
    for net in (
        chain(device, conv=Conv(4, 6, 3)),
        chain(device, norm=Norm(6).eval()),
        chain(device, conv=Called(4, 6, 3)),
    ):
        check(net, x)
    net = chain(device)
    for child in net:
        child.forward = child.forward  # as accelerate and others wrap it
        check(net, x)
        del child.forward
    assert fused == [(True, False)]
    for name in ("forward", "__call__"):
        with monkeypatch.context() as patch:
            patch.setattr(nn.BatchNorm1d, name, lambda self, x: x + 1)
            check(net, x)
        with monkeypatch.context() as patch:
            patch.setattr(nn.ReLU, name, lambda self, x: x + 1)
            check(net, x)
    assert fused == [(True, False)] * 3


@torch.no_grad()
def test_convolutions_of_users_run(make, device, fused, monkeypatch):
    """``_conv_forward`` is overridden, patched on a layer, and patched on the base class."""

    def ones(self, training, input, *args, **kwargs):
        return input.replace_feature(torch.ones(40, 6, device=device))

    x = make()
    net = chain(device, conv=type("Conv", (spconv.SubMConv3d,), {"_conv_forward": ones})(4, 6, 3))
    check(net, x)
    net = chain(device)
    net[0]._conv_forward = ones.__get__(net[0])
    check(net, x)
    del net[0]._conv_forward
    with monkeypatch.context() as patch:
        patch.setattr(SparseConvolution, "_conv_forward", ones)
        check(net, x)
    assert not fused
    check(net, x)
    assert fused == [(True, True)]


@torch.no_grad()
def test_classes_of_users_that_only_build_are_fused(make, device, fused):
    class Conv(spconv.SubMConv3d):
        def __init__(self):
            super().__init__(4, 6, 3, bias=False)

    check(chain(device, conv=Conv()), make())
    assert fused == [(True, True)]


@torch.no_grad()
def test_modules_may_change_between_calls(make, device, fused):
    net, x = chain(device), make()
    check(net, x)
    net[1].running_mean.add_(1)
    net[1].eps = 0.1
    check(net, x)
    net._modules["1"] = settle(nn.BatchNorm1d(6)).to(device)
    check(net, x)
    net.add(nn.Linear(6, 3).to(device))
    check(net, x)
    assert fused == [(True, True)] * 4
    net._modules["1"] = nn.LayerNorm(6).to(device)
    check(net, x)
    net._modules["2"] = nn.GELU()
    check(net, x)
    assert len(fused) == 4
    # Sharded training keeps parameters as plain attributes.
    net = chain(device)
    weight = net[1].weight.data
    del net[1].weight
    net[1].weight = weight
    expected = net[2](net[1](net[0](x).features))
    assert torch.equal(net(x).features, expected)


@torch.no_grad()
def test_layers_with_an_activation_keep_their_order(make, device, fused):
    for act_type in (Activation.ReLU, Activation.LeakyReLU, Activation.Sigmoid):
        conv = SparseConvolution(3, 4, 6, 3, subm=True, act_type=act_type, act_alpha=0.1)
        check(chain(device, conv=conv), make())
    assert not fused


@torch.no_grad()
def test_layers_count_voxels_and_add_tensors(make, device, fused):
    x = make()
    conv = spconv.SparseConv3d(4, 6, 3, 2, 1, record_voxel_count=True)
    net = chain(device, conv=conv)
    y = net(x)
    assert conv.get_max_num_voxels() == len(y.features)
    assert fused == [(True, True)]
    added = conv(x, add_input=y)
    torch.testing.assert_close(added.features, conv(x).features + y.features)


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", ["submanifold", "strided", "pointwise"])
def test_autocast_gives_its_own_dtype_nearer_to_float32(make, device, fused, kind, dtype):
    (conv,) = KINDS[kind](bias=True)
    # The cast does not change these operands, so differences come from rounding between the
    # modules.
    conv.to(dtype).float()
    net, x = chain(device, conv=conv), make(dtype=dtype)
    # These sums are large compared with the norm's result.
    net[0].bias.add_(8)
    net[1].running_mean.add_(8)
    exact = net(x.replace_feature(x.features.float())).features
    with torch.autocast(device.type, dtype):
        expected, y = module_by_module(net, x), net(x)
    assert y.features.dtype == expected.features.dtype == dtype
    error, error_of_modules = ((z.features.float() - exact).norm() for z in (y, expected))
    if kind == "pointwise":
        assert torch.equal(y.features, expected.features)
    else:
        assert error < 0.5 * error_of_modules
    assert fused == [(True, True)] * 2


@torch.no_grad()
def test_autocast_leaves_float64_alone(make, device):
    net, x = chain(device).double(), make(dtype=torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        check(net, x)


@torch.no_grad()
@pytest.mark.parametrize("held", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_dtypes_that_torch_refuses_are_refused(make, device, dtype, held):
    """The norm has another dtype: it accepts and returns the same dtypes as torch's batch norm."""
    net, x = chain(device), make(dtype=dtype)
    net[0].to(dtype)
    net[1].to(held)
    try:
        expected = module_by_module(net, x)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            net(x)
    else:
        y = net(x)
        assert y.features.dtype == expected.features.dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            y.features.double(), expected.features.double(), rtol=20 * eps, atol=20 * eps
        )


@torch.no_grad()
def test_norms_of_other_channels_raise_as_torch_does(make, device):
    with pytest.raises(RuntimeError, match="should contain 6 elements not 5"):
        chain(device, norm=nn.BatchNorm1d(5).eval())(make())


@torch.no_grad()
def test_plain_tensors_pass(device, fused):
    net = spconv.SparseSequential(nn.Linear(4, 6), settle(nn.BatchNorm1d(6)), nn.ReLU()).to(device)
    x = torch.randn(5, 4, device=device)
    assert torch.equal(net(x), net[2](net[1](net[0](x))))
    with pytest.raises(TypeError, match="takes a SparseConvTensor"):
        chain(device)(x)
    assert not fused


@torch.no_grad()
def test_it_can_be_switched_off(make, device, fused, monkeypatch):
    net, x = chain(device), make()
    net.fuse_layers = False
    net(x)
    net.fuse_layers = True
    monkeypatch.setattr(spconv.SparseSequential, "fuse_layers", False)
    chain(device)(x)
    assert not fused
    net(x)
    assert fused == [(True, True)]


@torch.no_grad()
def test_traced_modules_run_one_by_one(make, device, fused, monkeypatch):
    net, x = chain(device), make()
    call = nn.Module.__call__
    for owner, name, value in (
        (torch.jit, "is_tracing", lambda: True),
        (torch.compiler, "is_compiling", lambda: True),
        (constants, "SPCONV_FX_TRACE_MODE", True),
        # torch.fx replaces the call in this way while it traces.
        (nn.Module, "__call__", lambda self, *args: call(self, *args)),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, value)
            net(x)
        assert not fused, name


@torch.no_grad()
def test_copies_and_state_dicts_are_as_before(make, device, fused):
    net, x = chain(device), make()
    before = list(net.state_dict()), set(vars(net))
    y = net(x).features
    assert (list(net.state_dict()), set(vars(net))) == before
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(copied(x).features, y)
    assert fused == [(True, True)] * 3


def test_inference_mode(make, device, fused):
    net, x = chain(device), make()
    with torch.inference_mode():
        y = net(x)
    assert fused == [(True, True)]
    with torch.no_grad():
        torch.testing.assert_close(y.features, module_by_module(net, x).features)
