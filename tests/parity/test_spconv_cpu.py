"""Live parity of ``compat.spconv`` with spconv on the CPU: its Native algorithm, one thread.

At two threads spconv's own forward is wrong now and then (a race in its scatter-add);
``conftest.py`` sets one. Rows are compared in canonical order: by batch, then coordinates.
"""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from scripts.networks import second_encoder, sparse_unet
from tritonspconv.testing import assert_close, random_sites

pytest.importorskip("spconv", reason="the original, spconv 2.3.8, is not installed")

import spconv.pytorch as theirs
import spconv.pytorch.ops

import compat.spconv.pytorch as ours

pytestmark = [
    pytest.mark.parity,
    # The original may count on what it happens to get.
    pytest.mark.real_empty,
    # Its dense() indexes by a list.
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
]

NATIVE = {"algo": theirs.ConvAlgo.Native}
OUR_NATIVE = {"algo": ours.ConvAlgo.Native}
SHAPES = {1: [40], 2: [13, 11], 3: [9, 8, 10], 4: [6, 5, 6, 7]}


@pytest.fixture(autouse=True)
def _original_on_a_cpu(monkeypatch):
    """Its backward asks for a CUDA stream, also where it needs none."""
    assert torch.get_num_threads() == 1
    monkeypatch.setattr(spconv.pytorch.ops, "get_current_stream", lambda: 0)


def sites(ndim: int, n: int = 60) -> Tensor:
    n = min(n, math.prod(SHAPES[ndim]))
    return random_sites(n, ndim, extent=SHAPES[ndim]).coords


def layer_pair(kind: str, ndim: int, *args, **options) -> tuple[nn.Module, nn.Module]:
    """The same layer of both libraries, in float64, with the original's parameters."""
    name = f"{kind}{ndim}d"
    original = getattr(theirs, name)(*args, **options, **NATIVE).double()
    layer = getattr(ours, name)(*args, **options, **OUR_NATIVE).double()
    layer.load_state_dict(original.state_dict())
    return layer, original


def canonical(tensor) -> Tensor:
    """Row numbers in the order of batch and coordinates."""
    rows = tensor.indices.tolist()
    return torch.tensor(sorted(range(len(rows)), key=rows.__getitem__), dtype=torch.int64)


def run(library, module: nn.Module, coords: Tensor, feats: Tensor, shape: list[int], seed: int):
    """Coordinates, output, input gradient and parameter gradients, rows in canonical order."""
    module = copy.deepcopy(module).to(feats.dtype)
    feats = feats.clone().requires_grad_()
    out = module(library.SparseConvTensor(feats, coords.clone(), shape, 2))
    order = canonical(out)
    grad = torch.randn(
        out.features.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    out.features[order].backward(grad.to(feats.dtype))
    named = {
        "coords": out.indices[order],
        "out": out.features[order].detach(),
        "dinput": feats.grad,
    }
    named |= {f"d{name}": p.grad for name, p in module.named_parameters()}
    return named, list(out.spatial_shape)


def check(layer: nn.Module, original: nn.Module, ndim: int, c_in: int, shape=None, coords=None):
    """Equal in float64; in float32 no further from the float64 truth than the rule allows."""
    shape = shape or SHAPES[ndim]
    coords = sites(ndim) if coords is None else coords
    feats = torch.randn(len(coords), c_in, dtype=torch.float64)
    seed = int(torch.randint(2**31, ()))
    truth, their_shape = run(theirs, original, coords, feats, shape, seed)
    plain, _ = run(theirs, original, coords, feats.float(), shape, seed)
    double, our_shape = run(ours, layer, coords, feats, shape, seed)
    single, _ = run(ours, layer, coords, feats.float(), shape, seed)

    assert our_shape == their_shape
    assert double.keys() == truth.keys()
    for found in (double, single):
        assert torch.equal(found.pop("coords"), truth["coords"])
    for name, value in double.items():
        torch.testing.assert_close(value, truth[name], msg=lambda m, n=name: f"{n}: {m}")
        assert_close(single[name], truth[name], torch.float32, eager=plain[name], name=name)


def windows(ndim: int, kernel_sizes, strides, paddings, dilations):
    """Every combination that leaves an output and that the layers accept."""
    for k, s, p, d in itertools.product(kernel_sizes, strides, paddings, dilations):
        if k == 1 and (d > 1 or p > 0):
            continue
        if min((n + 2 * p - d * (k - 1) - 1) // s + 1 for n in SHAPES[ndim]) < 1:
            continue
        yield pytest.param(ndim, k, s, p, d, id=f"{ndim}d-k{k}-s{s}-p{p}-d{d}")


def chain(library, ndim: int, *layers) -> nn.Module:
    algo = NATIVE if library is theirs else OUR_NATIVE
    made = [getattr(library, f"{kind}{ndim}d")(*args, **how, **algo) for kind, args, how in layers]
    return library.SparseSequential(*made).double()


def check_chain(ndim: int, *layers, c_in: int = 3, **how) -> None:
    original, module = (chain(library, ndim, *layers) for library in (theirs, ours))
    module.load_state_dict(original.state_dict())
    check(module, original, ndim, c_in, **how)


DOWN = ("SparseConv", (3, 4, 3, 2, 1), {"indice_key": "down"})
UP = ("SparseConvTranspose", (3, 4, 2, 2), {"indice_key": "down"})
POOL = ("SparseMaxPool", (3, 2, 1), {"indice_key": "down"})


@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
def test_inverse(ndim):
    check_chain(ndim, DOWN, ("SparseInverseConv", (4, 5, 3, "down"), {}))


def test_inverse_between_submanifold_layers():
    check_chain(
        3,
        ("SubMConv", (3, 3, 3), {"indice_key": "fine"}),
        DOWN,
        ("SubMConv", (4, 4, 3), {"indice_key": "coarse"}),
        ("SubMConv", (4, 4, 3), {"indice_key": "coarse"}),
        ("SparseInverseConv", (4, 5, 3, "down"), {}),
        ("SubMConv", (5, 2, 3), {"indice_key": "fine"}),
    )


def test_inverse_of_a_transposed_layer():
    check_chain(2, UP, ("SparseInverseConv", (4, 5, 2, "down"), {}), coords=sites(2, 25))


def test_inverse_of_a_pool():
    check_chain(3, POOL, ("SparseInverseConv", (3, 5, 3, "down"), {}))


@pytest.mark.parametrize(
    ("ndim", "k", "s", "p", "d"),
    [
        *windows(1, [2, 3], [1, 2], [0, 1], [1, 2]),
        *windows(2, [2, 3], [2, 3], [0, 1], [1]),
        *windows(3, [2, 3], [1, 2], [0, 1], [1, 2]),
        *windows(4, [2], [2], [0], [1]),
    ],
)
def test_max_pool(ndim, k, s, p, d):
    """With its floor at zero."""
    check_chain(ndim, ("SparseMaxPool", (k, s, p, d), {}))


def test_max_pool_gives_every_tied_input_the_gradient():
    coords = sites(3)
    feats = torch.randint(-1, 3, (len(coords), 4)).double()
    results = []
    for library in (theirs, ours):
        pool = chain(library, 3, ("SparseMaxPool", (3, 2, 1), {}))
        results.append(run(library, pool, coords, feats, SHAPES[3], 7)[0])
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=lambda m, n=name: f"{n}: {m}")


def test_dense():
    coords = sites(3)
    feats = torch.randn(len(coords), 4)
    for channels_first in (True, False):
        dense = [
            library.SparseConvTensor(feats, coords, SHAPES[3], 2).dense(channels_first)
            for library in (theirs, ours)
        ]
        assert torch.equal(*dense)


def test_submanifold_layers_keep_the_rows():
    """And the storage of the coordinates: what a caller edits in place, later layers see."""
    coords = sites(3)
    feats = torch.randn(len(coords), 3, dtype=torch.float64)
    layer, original = layer_pair("SubMConv", 3, 3, 5, 3)
    outs = [
        module(library.SparseConvTensor(feats, coords, SHAPES[3], 2))
        for library, module in ((ours, layer), (theirs, original))
    ]
    assert all(out.indices.data_ptr() == coords.data_ptr() for out in outs)
    torch.testing.assert_close(outs[0].features, outs[1].features)


@pytest.mark.parametrize(
    ("kind", "args", "options"),
    [
        ("SubMConv", (3, 5, 3), {}),
        ("SubMConv", (3, 5, (1, 3, 5)), {"bias": False}),
        ("SubMConv", (3, 5, 1), {}),
        ("SparseConv", (3, 5, 2, 2), {"record_voxel_count": True}),
        ("SparseConvTranspose", (3, 5, 2, 2), {}),
        ("SparseInverseConv", (3, 5, 3, "key"), {}),
    ],
)
def test_state_dicts_go_both_ways(kind, args, options):
    name = f"{kind}3d"
    layer, original = (
        getattr(ours, name)(*args, **options),
        getattr(theirs, name)(*args, **options, **NATIVE),
    )
    assert layer.weight.shape == original.weight.shape
    for source, target in ((layer, original), (original, layer)):
        state = {k: torch.rand_like(v.float()).to(v.dtype) for k, v in source.state_dict().items()}
        target.load_state_dict(state, strict=True)
        assert target.state_dict().keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(target.state_dict()[key], value)


def test_fresh_parameters_have_the_same_spread():
    layer, original = (library.SubMConv3d(16, 32, 3) for library in (ours, theirs))
    for mine, other in zip(layer.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(mine.abs().max(), other.abs().max(), rtol=0.1, atol=0)
        torch.testing.assert_close(mine.std(), other.std(), rtol=0.3, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda lib, algo: lib.SparseConv3d(3, 4, 1, padding=1, **algo), "padding"),
        (lambda lib, algo: lib.SubMConv3d(3, 4, 3, groups=2, **algo), "groups"),
        (lambda lib, algo: lib.SubMConv3d(3, 4, [3, 3], **algo), "3"),
    ],
    ids=["padded-1x1", "groups", "length"],
)
def test_both_refuse(make, message):
    with pytest.raises(AssertionError):
        make(theirs, NATIVE)
    with pytest.raises(AssertionError, match=message):
        make(ours, OUR_NATIVE)


# Networks: the coordinates are clustered, so that deep layers still have neighbours.


def cluttered(shape: list[int], n: int) -> tuple[Tensor, Tensor]:
    extent = torch.tensor(shape)
    centres = torch.rand(6, 3) * extent
    points = centres[torch.randint(6, (4 * n,))] + 2.5 * torch.randn(4 * n, 3)
    inside = ((points >= 0) & (points < extent)).all(1)
    batch = torch.randint(2, (int(inside.sum()), 1))
    coords = torch.cat([batch, points[inside].long()], 1).int().unique(dim=0)
    coords = coords[torch.randperm(len(coords))[:n]]
    return coords, torch.randn(len(coords), 4, dtype=torch.float64)


def train(library, network: nn.Module, shape: list[int], data, steps: int = 4):
    """Losses of a few steps of SGD towards a fixed linear target, and the last state."""
    network = copy.deepcopy(network).train()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    coords, feats = data
    losses = []
    for _ in range(steps):
        out, _ = network(library.SparseConvTensor(feats, coords, shape, 2))
        rows = out.features[canonical(out)]
        pattern = torch.linspace(-1, 1, rows.numel(), dtype=rows.dtype).reshape(rows.shape)
        loss = nn.functional.mse_loss(rows, pattern.sin())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses), network.state_dict()


@pytest.mark.parametrize(
    ("builder", "shape", "n"),
    [
        pytest.param(second_encoder, [41, 48, 40], 500, id="second"),
        pytest.param(sparse_unet, [32, 32, 32], 250, id="unet"),
    ],
)
def test_training_gives_the_same_losses(builder, shape, n):
    original = builder(theirs, **NATIVE).double()
    network = builder(ours, **OUR_NATIVE).double()
    network.load_state_dict(original.state_dict())
    data = cluttered(shape, n)
    expected, their_state = train(theirs, original, shape, data)
    losses, our_state = train(ours, network, shape, data)
    assert expected[-1] < expected[0]
    torch.testing.assert_close(losses, expected)
    for key, value in their_state.items():
        torch.testing.assert_close(our_state[key], value, rtol=1e-6, atol=1e-9, msg=key)
