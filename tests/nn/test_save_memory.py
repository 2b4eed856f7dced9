"""`save_memory`: the same bits in less memory."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.profiler import ProfilerActivity, profile

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tests._back_end import interpreted_only
from tritonspconv.models.lidar import second_encoder, sparse_unet
from tritonspconv.models.minkowski import mink_unet
from tritonspconv.nn.memory.choose import choose_segments
from tritonspconv.nn.memory.measure import Call, Measured
from tritonspconv.nn.memory.segment import Segment
from tritonspconv.testing import surface_sites

SITES = surface_sites(12)
FEATS = torch.randn(SITES.num_rows, 4, generator=torch.Generator().manual_seed(0))
SHAPE = [32, 32, 32]


def spconv_tensor() -> spconv.SparseConvTensor:
    return spconv.SparseConvTensor(FEATS, SITES.coords, SHAPE, 1)


def engine_tensor() -> ts.SparseTensor:
    return ts.SparseTensor(FEATS, SITES.coords, spatial_shape=tuple(SHAPE), batch_size=1)


def minkowski_tensor() -> ME.SparseTensor:
    return ME.SparseTensor(FEATS, SITES.coords)


class EngineBlock(nn.Module):
    """A residual block by hand."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ts.nn.SubMConv3d(channels, channels, 3, bias=False)
        self.norm1 = nn.BatchNorm1d(channels)
        self.conv2 = ts.nn.SubMConv3d(channels, channels, 3, bias=False)
        self.norm2 = nn.BatchNorm1d(channels)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: ts.SparseTensor) -> ts.SparseTensor:
        y = self.conv1(x)
        y = self.conv2(y.replace(torch.relu(self.norm1(y.feats))))
        return y.replace(self.drop(torch.relu(self.norm2(y.feats) + x.feats)))


def engine_network(blocks: int = 6) -> nn.Module:
    return nn.Sequential(*(EngineBlock(4) for _ in range(blocks)))


# A network, a tensor for it, and the features of its result.
Case = tuple[Callable[[], nn.Module], Callable[[], object], Callable[[object], Tensor]]
CASES: dict[str, Case] = {
    "SpUNet": (
        lambda: sparse_unet(spconv, channel_divisor=16), spconv_tensor, lambda y: y[0].features
    ),
    "SECOND": (
        lambda: second_encoder(spconv, channel_divisor=4), spconv_tensor, lambda y: y[0].features
    ),
    "MinkUNet": (
        lambda: mink_unet(ME, depth=18, channel_divisor=16), minkowski_tensor, lambda y: y.F
    ),
    "engine": (engine_network, engine_tensor, lambda y: y.feats),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def build(case: Case) -> nn.Module:
    torch.manual_seed(1)
    return case[0]().train()


def step(model: nn.Module, case: Case) -> list[Tensor]:
    """Return the result of a training step, its gradients, and the buffers after it."""
    torch.manual_seed(2)
    out = case[2](model(case[1]()))
    (out.float() * torch.linspace(-1, 1, out.shape[1])).square().mean().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    return [out.detach(), *grads, *(buffer.clone() for buffer in model.buffers())]


def assert_same_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def peak(run: Callable[[], object]) -> int:
    """Return the most bytes of torch's CPU allocator that a run adds."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = top = 0
    results = profiler.profiler.kineto_results
    for event in results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            top = max(top, live)
    return top


@every_case
@pytest.mark.parametrize("autocast", [False, True])
def test_same_bits(case, autocast):
    plain, saving = build(case), build(case)
    plan = ts.save_memory(saving, case[1]())
    assert plan.segments
    assert_same_bits(list(saving.state_dict().values()), list(plain.state_dict().values()))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            # Buffers are among the results: running statistics have moved once.
            assert_same_bits(step(saving, case), step(plain, case))


@interpreted_only
def test_same_bits_by_the_kernels_of_a_gpu(device):
    """Norm and ReLU belong to the convolution's node."""

    def network() -> nn.Module:
        torch.manual_seed(1)

        def level(c_in: int) -> nn.Module:
            return ts.nn.Sequential(
                ts.nn.SubMConv2d(c_in, 3, 3, bias=False), ts.nn.BatchNorm(3), ts.nn.ReLU(),
                ts.nn.SparseConv2d(3, 3, 2, 2, bias=False), ts.nn.BatchNorm(3), ts.nn.ReLU(),
            )  # fmt: skip

        return nn.Sequential(level(2), level(3), ts.nn.SubMConv2d(3, 2, 3))

    feats = torch.randn(40, 2)
    coords = ts.testing.random_sites(40, 2, extent=8).coords

    def tensor() -> ts.SparseTensor:
        return ts.SparseTensor(feats, coords, spatial_shape=(8, 8), batch_size=2)

    case: Case = network, tensor, lambda y: y.feats
    plain, saving = network(), network()
    plan = ts.save_memory(saving, tensor())
    assert "0" in plan.segments
    assert_same_bits(step(saving, case), step(plain, case))


def test_half_the_peak():
    """Gradients of parameters are allocated before, because few voxels meet many channels."""

    def measured(model: nn.Module) -> int:
        def run() -> None:
            model(spconv_tensor())[0].features.square().mean().backward()
            model.zero_grad(set_to_none=False)

        run()
        return peak(run)

    plain = sparse_unet(spconv, channel_divisor=4)
    saving = copy.deepcopy(plain)
    plan = ts.save_memory(saving, spconv_tensor())
    assert plan.planned_bytes < 0.5 * plan.plain_bytes
    difference = measured(plain) - measured(saving)
    assert difference > 0.6 * (plan.plain_bytes - plan.planned_bytes)


def test_the_bytes_of_features_are_those_of_the_page():
    """A residual block keeps four times its channels; docs/memory.md."""
    blocks, channels = 5, 4
    model = engine_network(blocks)
    for block in model:
        block.drop.p = 0.0
    plan = ts.save_memory(model, engine_tensor())
    wanted = (4 * blocks + 1) * channels * 4 * SITES.num_rows
    few = blocks * 2**11  # vectors of channels, and weights as matrices
    assert wanted <= plan.plain_bytes <= wanted + few


def test_the_plan():
    model = sparse_unet(spconv, channel_divisor=16)
    plan = ts.save_memory(model, spconv_tensor())
    # The level with most voxels is divided, and its last block runs once.
    assert {"encoders.1", "decoders.1", "decoders.3.0"} <= set(plan.segments)
    assert not {"decoders.3", "decoders.3.1", "head"} & set(plan.segments)
    assert plan.released == ("stem",)
    assert plan.refused == {}
    assert "computed again: stem, with its kernel maps\n" in str(plan)


def test_the_choice():
    """Four modules keep 10 bytes inside and 1 as their argument; the last one is not repeated."""
    saved, calls, sizes = [], [], {}
    for number in range(4):
        start = len(saved)
        saved += [10 * number, 10 * number + 1]
        sizes |= {10 * number: 1, 10 * number + 1: 10}
        calls.append(Call(f"{number}", start, len(saved), (10 * number,)))
    measured = Measured(saved, sizes, calls)
    assert choose_segments(measured, ["0", "1", "2", "3"], 0) == (["0", "1", "2"], 14)
    # For 24 of 44 bytes one more module runs once, and for 44 all of them.
    assert choose_segments(measured, ["0", "1", "2", "3"], 24 / 44) == (["1", "2"], 24)
    assert choose_segments(measured, ["0", "1", "2", "3"], 1) == ([], 44)
    # A module that holds all others saves nothing: everything would be there at once.
    calls.append(Call("all", 0, len(saved), (0,)))
    assert choose_segments(measured, ["all"], 0) == ([], 44)


def test_modules_run_again_in_the_backward_pass_only():
    model = engine_network()
    plan = ts.save_memory(model, engine_tensor())
    calls = []
    first = model.get_submodule(plan.segments[0])
    first.conv1.register_forward_hook(lambda *_: calls.append("inside"))
    first.register_forward_hook(lambda *_: calls.append("itself"))
    out = model(engine_tensor())
    assert calls == ["inside", "itself"]
    out.feats.sum().backward()
    assert calls == ["inside", "itself", "inside"]
    with torch.no_grad():
        model(engine_tensor())
    assert calls[3:] == ["inside", "itself"]


def test_maps_are_released_between_the_passes():
    model = sparse_unet(spconv, channel_divisor=16)
    plan = ts.save_memory(model, spconv_tensor())
    assert plan.released == ("stem",)
    x = spconv_tensor()
    out, _ = model(x)
    stem = out.find_indice_pair("stem").kernel_map
    shared = out.find_indice_pair("subm1").kernel_map
    assert stem.num_bytes == 0
    assert shared.num_bytes > 0
    out.features.sum().backward()
    assert stem.num_bytes > 0


def test_random_states_and_statistics_are_those_of_before():
    model = engine_network().train()
    torch.manual_seed(5)
    before = [torch.get_rng_state(), *(buffer.clone() for buffer in model.buffers())]
    ts.save_memory(model, engine_tensor())
    assert_same_bits([torch.get_rng_state(), *model.buffers()], before)


def test_undone_repeated_copied_and_saved():
    case = CASES["engine"]
    plain, saving = build(case), build(case)
    plan = ts.save_memory(saving, engine_tensor())
    assert ts.save_memory(saving, engine_tensor()).segments == plan.segments
    copied = copy.deepcopy(saving)
    file = io.BytesIO()
    torch.save(saving, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    plan.remove()
    assert not any("forward" in vars(module) for module in saving.modules())
    wanted = step(plain, case)
    for model in (copied, loaded):
        assert "forward" in vars(model.get_submodule(plan.segments[0]))
        assert_same_bits(step(model, case), wanted)


@pytest.mark.parametrize("first", [True, False])
def test_with_optimize(first):
    case = CASES["SpUNet"]
    plain, saving = build(case), build(case)
    if first:
        ts.optimize(saving)
    ts.save_memory(saving, spconv_tensor())
    if not first:
        ts.optimize(saving)
    assert_same_bits(step(saving, case), step(plain, case))


def test_gradients_of_gradients():
    """The backward pass runs a module again for each order, on copies of its buffers each time."""
    case = CASES["engine"]
    plain, saving = build(case), build(case)
    ts.save_memory(saving, engine_tensor(), share=0)

    def penalty(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(2)
        feats = FEATS.clone().requires_grad_()
        out = model(engine_tensor().replace(feats)).feats
        (grad,) = torch.autograd.grad(out.square().mean(), feats, create_graph=True)
        grad.square().sum().backward()
        return [grad.detach(), *(p.grad for p in model.parameters()), *model.buffers()]

    assert_same_bits(penalty(saving), penalty(plain))


# torch.compile reads .grad of every tensor, and hides the warning, but not as an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled():
    case = CASES["engine"]
    plain, saving = build(case), build(case)
    ts.save_memory(saving, engine_tensor())
    assert_same_bits(step(torch.compile(saving, backend="eager"), case), step(plain, case))


class Counter(EngineBlock):
    """Sets an attribute at every call."""

    calls = 0

    def forward(self, x: ts.SparseTensor) -> ts.SparseTensor:
        self.calls += 1
        return super().forward(x)


class InPlace(EngineBlock):
    """Writes to its argument."""

    def forward(self, x: ts.SparseTensor) -> ts.SparseTensor:
        x.feats.relu_()
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Counter, "its forward sets the attribute 'calls'"),
        (InPlace, "its forward changes its arguments"),
    ],
)
def test_refused_by_name(kind, reason):
    case: Case = (
        lambda: nn.Sequential(EngineBlock(4), nn.Sequential(kind(4)), *engine_network(5)),
        engine_tensor, lambda y: y.feats,
    )  # fmt: skip
    plain, saving = build(case), build(case)
    plan = ts.save_memory(saving, engine_tensor())
    # The container around the module too has the argument that is written to.
    assert plan.refused["1.0"] == reason
    assert f"left alone: 1.0: {reason}" in str(plan)
    assert plan.segments
    assert not {"1", "1.0"} & set(plan.segments)
    assert_same_bits(step(saving, case), step(plain, case))


def test_a_replaced_forward_is_left_alone():
    model = engine_network()
    model[0].forward = model[0].forward
    plan = ts.save_memory(model, engine_tensor())
    assert plan.refused == {"0": "its forward is replaced"}
    assert "0" not in plan.segments
    plan.remove()
    assert "forward" in vars(model[0])


def test_errors():
    with pytest.raises(ValueError, match="share must be from 0 to 1, a share of the saved bytes"):
        ts.save_memory(engine_network(), engine_tensor(), share=40)
    with pytest.raises(ValueError, match="Linear has no sparse convolution of tritonspconv"):
        ts.save_memory(nn.Linear(2, 2), torch.ones(1, 2))
    frozen = engine_network().requires_grad_(False)
    with pytest.raises(ValueError, match=r"saves nothing for a backward pass\. Pass a network"):
        ts.save_memory(frozen, engine_tensor())


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch is built without gloo")
def test_ddp(tmp_path):
    """One process: the hooks of DDP see each gradient once."""
    case = CASES["engine"]
    plain, saving = build(case), build(case)
    ts.save_memory(saving, engine_tensor())
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/g", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(saving)
        with pytest.raises(TypeError, match="wrapped in DistributedDataParallel, which expects"):
            ts.save_memory(parallel, engine_tensor())
        for _ in range(2):
            assert_same_bits(step(parallel, case), step(plain, case))
    finally:
        distributed.destroy_process_group()


def test_a_module_without_parameters_may_be_a_segment():
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    module = nn.ReLU()
    (grad,) = torch.autograd.grad(Segment(module, frozenset())(x).sum(), x)
    assert grad.tolist() == [0, 1]
