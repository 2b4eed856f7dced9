"""spconv's own Python code runs on the adapter's names, and so do copies of it in exporters.

Exporters and forks copy ``_conv_forward``, the pools' ``forward`` and other methods, and change a
line. Here each function of the installed spconv sees the adapter's module in place of its own, and
returns the same as the adapter's function.
"""

import types
import warnings

import pytest
import torch

from tritonspconv.testing import assert_close, random_sites

pytest.importorskip("spconv", reason="the original, spconv 2.3.8, is not installed")

import spconv.pytorch as theirs

import compat.spconv.pytorch as ours
from compat.spconv import ConvAlgo

pytestmark = pytest.mark.parity

SHAPE = [7, 6, 8]
ALGOS = [ConvAlgo.Native, ConvAlgo.MaskImplicitGemm]


def on_the_adapter(function, module):
    """Return the original's function, with ``module``'s names in place of spconv's."""
    found = dict(function.__globals__)
    for name, value in function.__globals__.items():
        source = getattr(
            value, "__name__" if isinstance(value, types.ModuleType) else "__module__", ""
        )
        if str(source).partition(".")[0] in ("spconv", "cumm", ""):
            found[name] = getattr(module, name, value)
    moved = types.FunctionType(
        function.__code__, found, function.__name__, function.__defaults__, function.__closure__
    )
    moved.__kwdefaults__ = function.__kwdefaults__
    return moved


def tensor(channels=4, seed=0):
    torch.manual_seed(seed)
    coords = random_sites(60, 3, extent=tuple(SHAPE)).coords
    feats = torch.randn(len(coords), channels, dtype=torch.float64, requires_grad=True)
    return ours.SparseConvTensor(feats, coords, SHAPE, 2)


def results(net, x):
    y = net(x)
    grads = torch.autograd.grad(y.features.square().sum(), [x.features, *net.parameters()])
    return [y.features, *grads], y


def compare(make, *patches):
    """Run a network unchanged, and with the original's functions in the adapter's classes."""
    net = make().double()
    expected, y = results(net, tensor())
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, function in patches:
            patch.setattr(owner, name, function)
        got, z = results(net, tensor())
    for mine, own in zip(got, expected, strict=True):
        assert_close(mine, own)
    assert torch.equal(z.indices, y.indices)
    assert z.spatial_shape == y.spatial_shape
    assert z.indice_dict.keys() == y.indice_dict.keys()


CONV_FORWARD = (
    ours.conv.SparseConvolutionBase,
    "_conv_forward",
    on_the_adapter(theirs.conv.SparseConvolutionBase._conv_forward, ours.conv),
)
CHECKS = [
    (
        ours.conv.SparseConvolutionBase,
        name,
        on_the_adapter(getattr(theirs.conv.SparseConvolutionBase, name), ours.conv),
    )
    for name in ("_check_subm_reuse_valid", "_check_inverse_reuse_valid")
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("algo", ALGOS)
def test_convolutions(algo, training):
    def make():
        torch.manual_seed(1)
        return ours.SparseSequential(
            ours.SubMConv3d(4, 4, 3, indice_key="s", algo=algo),
            ours.SubMConv3d(4, 4, 3, indice_key="s", algo=algo),
            ours.SubMConv3d(4, 4, 1, algo=algo),
            ours.SparseConv3d(4, 6, 3, 2, 1, indice_key="d", algo=algo),
            ours.SubMConv3d(6, 6, 3, algo=algo),
            ours.SparseInverseConv3d(6, 4, 3, indice_key="d", algo=algo),
            ours.SparseConvTranspose3d(4, 4, 2, 2, algo=algo),
        ).train(training)

    compare(make, CONV_FORWARD, *CHECKS)


@pytest.mark.parametrize("algo", ALGOS)
def test_pools(algo):
    def make():
        torch.manual_seed(1)
        return ours.SparseSequential(
            ours.SubMConv3d(4, 4, 3, algo=algo),
            ours.SparseMaxPool3d(3, 2, 1, indice_key="p", algo=algo),
            ours.SubMConv3d(4, 4, 3, algo=algo),
            ours.SparseInverseConv3d(4, 4, 3, indice_key="p", algo=algo),
        )

    forward = on_the_adapter(theirs.pool.SparseMaxPool.forward, ours.pool)
    compare(make, (ours.pool.SparseMaxPool, "forward", forward))


def test_average_pools():
    forward = on_the_adapter(theirs.pool.SparseAvgPool.forward, ours.pool)
    compare(
        lambda: ours.SparseSequential(
            ours.SubMConv3d(4, 4, 3), ours.SparseAvgPool3d(3, 2, 1, indice_key="p")
        ),
        (ours.pool.SparseAvgPool, "forward", forward),
    )


@pytest.mark.parametrize("kind", ["JoinTable", "AddTable", "ConcatTable"])
def test_tables(kind):
    table, original = getattr(ours.tables, kind), getattr(theirs.tables, kind)

    def make():
        torch.manual_seed(1)
        branches = ours.ConcatTable().add(ours.SubMConv3d(4, 4, 3)).add(ours.SubMConv3d(4, 4, 1))
        join = ours.JoinTable() if kind == "ConcatTable" else table()
        return ours.SparseSequential(branches, join)

    compare(make, (table, "forward", on_the_adapter(original.forward, ours.tables)))


@pytest.mark.parametrize("name", ["sparse_add", "sparse_add_hash_based"])
def test_sums(name):
    xs = [tensor(seed=seed) for seed in range(3)]
    own = getattr(ours.functional, name)(*xs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moved = on_the_adapter(getattr(theirs.functional, name), ours.functional)(*xs)
    assert_close(moved.dense(), own.dense())


def test_tensors():
    methods = "shadow_copy replace_feature minus dequantize find_indice_pair dense __add__ __radd__"
    x = ours.SubMConv3d(4, 4, 3, indice_key="k").double()(tensor())
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [(x + x).minus().dense(), x.shadow_copy().dense(channels_first=False)]
        for name in methods.split():
            function = on_the_adapter(vars(theirs.SparseConvTensor)[name], ours.core)
            patch.setattr(ours.SparseConvTensor, name, function)
        got = [(x + x).minus().dense(), x.shadow_copy().dense(channels_first=False)]
        layer = ours.SubMConv3d(4, 4, 3, indice_key="k").double()
        assert layer(x).indices is x.indices
        assert layer(x).find_indice_pair("k") is x.find_indice_pair("k")
    for mine, own in zip(got, expected, strict=True):
        assert_close(mine, own)
