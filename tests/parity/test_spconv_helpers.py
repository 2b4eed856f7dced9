"""Helpers of ``ops``, ``functional``, ``core`` and ``utils`` take the arguments of spconv's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonspconv.testing import assert_close, random_sites

pytest.importorskip("spconv", reason="the original, spconv 2.3.8, is not installed")

import spconv.pytorch as theirs
import spconv.pytorch.functional
import spconv.pytorch.ops
import spconv.pytorch.utils

import compat.spconv.pytorch as ours

pytestmark = [
    pytest.mark.parity,
    # The original may rely on the contents of `torch.empty`.
    pytest.mark.real_empty,
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

LIBRARIES = {"spconv": theirs, "compat.spconv": ours}
KINDS = [list, tuple, np.array, torch.tensor, torch.Size]
SHAPE = [8, 7, 9]


@pytest.fixture(autouse=True)
def _no_stream(monkeypatch):
    monkeypatch.setattr(spconv.pytorch.ops, "get_current_stream", lambda: 0)


def as_ints(values):
    return [int(value) for value in values]


@st.composite
def sizes(draw):
    """Draw arguments of the size functions: one to four axes, some lists with spare entries."""
    ndim = draw(st.integers(1, 4))
    spare = draw(st.lists(st.integers(0, 2), min_size=6, max_size=6))
    ranges = [(1, 40), (1, 5), (1, 3), (-1, 3), (0, 3), (0, 2)]
    args = []
    for place, (low, high) in enumerate(ranges):
        length = ndim + (spare[place] if place else 0)
        values = draw(st.lists(st.integers(low, high), min_size=length, max_size=length))
        kinds = KINDS if low >= 0 else KINDS[:4]
        args.append(draw(st.sampled_from(kinds))(values))
    return args


@given(args=sizes(), whole=st.booleans())
@settings(max_examples=200, deadline=None)
def test_output_sizes(args, whole):
    if whole and isinstance(args[1], list):
        args[1] = [-1] * len(args[1])
    expected = theirs.ops.get_conv_output_size(*args[:5])
    assert as_ints(ours.ops.get_conv_output_size(*args[:5])) == as_ints(expected)
    if whole and isinstance(args[1], list):
        for sp in LIBRARIES.values():
            with pytest.raises(ValueError, match=r"kernel_size"):
                sp.ops.get_deconv_output_size(*args)
        return
    expected = theirs.ops.get_deconv_output_size(*args)
    assert as_ints(ours.ops.get_deconv_output_size(*args)) == as_ints(expected)


def test_two_sizes_of_a_three_dimensional_window():
    """NVIDIA's exporter of CenterPoint calls it so; ``input_size`` gives the number of axes."""
    args = [100, 16], [3] * 3, [1] * 3, [1] * 3, [1] * 3
    for sp in LIBRARIES.values():
        assert sp.ops.get_conv_output_size(*args) == [100, 16]
    with pytest.raises(
        ValueError, match=r"stride must have an entry for each of 2 axes; got \[1\]"
    ):
        ours.ops.get_conv_output_size([100, 16], [3] * 2, [1], [1] * 2, [1] * 2)
    with pytest.raises(ValueError, match=r"stride must not be 0; got \[1, 0\]"):
        ours.ops.get_conv_output_size([100, 16], [3] * 2, [1, 0], [1] * 2, [1] * 2)


# Arguments of get_indice_pairs that spconv takes in place of lists of ints.
VARIANTS = {
    "tuples": {"spatial_shape": tuple(SHAPE), "ksize": (3, 3, 3), "padding": (1, 1, 1)},
    "arrays": {"spatial_shape": np.array(SHAPE), "ksize": np.array([3, 1, 3])},
    "array batch size": {"batch_size": np.int64(2)},
    "tensor batch size": {"batch_size": torch.tensor(2)},
    "fewer samples": {"batch_size": 1},
    "no output padding": {"out_padding": []},
    "bounded": {"num_out_act_bound": 3},
    "even window": {"ksize": [2, 2, 2]},
    "dilated": {"dilation": [2, 1, 2]},
    "cropped": {"padding": [-1, -1, 0]},
}


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        (kind, variant)
        for kind in ("submanifold", "regular", "transposed")
        for variant in VARIANTS
        # Even submanifold windows raise in both libraries.
        if (kind, variant) != ("submanifold", "even window")
    ],
)
def test_pairs(kind, variant):
    torch.manual_seed(0)
    coords = random_sites(50, 3, extent=tuple(SHAPE)).coords
    arguments = {
        "indices": coords, "batch_size": 2, "spatial_shape": SHAPE, "ksize": [3] * 3,
        "stride": [1] * 3 if kind == "submanifold" else [2, 1, 2], "padding": [1] * 3,
        "dilation": [1] * 3, "out_padding": [0] * 3, "subm": kind == "submanifold",
        "transpose": kind == "transposed",
    } | VARIANTS[variant]  # fmt: skip
    if kind == "transposed" and variant == "no output padding":
        arguments["out_padding"] = [0] * 3
    found = {}
    for name, sp in LIBRARIES.items():
        out, pairs, counts = sp.ops.get_indice_pairs(algo=sp.ConvAlgo.Native, **arguments)
        taps = len(counts) // 2 if kind == "submanifold" else len(counts)
        listed = {
            (tap, *coords[i].tolist(), *out[o].tolist())
            for tap in range(taps)
            for i, o in pairs[:, tap, : counts[tap]].T.tolist()
        }
        found[name] = sorted(out.tolist()), counts[:taps].tolist(), listed
    assert found["compat.spconv"] == found["spconv"]


@pytest.mark.parametrize("transpose", [False, True])
def test_pairs_of_an_extent_below_one(transpose):
    coords = torch.zeros(1, 3, dtype=torch.int32)
    args = [2, 3], [2, 2], [2, 2], [0, 3] if transpose else [0, -2], [1, 1], [0, 0]
    for sp in LIBRARIES.values():
        with pytest.raises((ValueError, RuntimeError), match=r"\[\d, -?\d\]"):
            sp.ops.get_indice_pairs(
                coords, 1, args[0], sp.ConvAlgo.Native, *args[1:], transpose=transpose
            )
    with pytest.raises(ValueError, match="every extent must be at least 1"):
        ours.ops.get_indice_pairs_implicit_gemm(
            coords, 1, args[0], ours.ConvAlgo.Native, *args[1:], transpose=transpose
        )


@pytest.mark.parametrize("rows", [int, np.int64, torch.tensor])
@pytest.mark.parametrize("name", ["indice_conv", "indice_subm_conv", "indice_inverse_conv"])
def test_convolutions_of_pairs(name, rows):
    torch.manual_seed(0)
    subm = name == "indice_subm_conv"
    coords = random_sites(50, 3, extent=tuple(SHAPE)).coords
    out, pairs, counts = theirs.ops.get_indice_pairs(
        coords, 2, SHAPE, theirs.ConvAlgo.Native, [3] * 3, [1 if subm else 2] * 3, [1] * 3, [1] * 3,
        [0] * 3, subm=subm,
    )  # fmt: skip
    n_in, n_out = len(coords), len(out)
    if name == "indice_inverse_conv":
        n_in, n_out = n_out, n_in
    # Every other column of a wider tensor: `feats` is not contiguous.
    feats = torch.randn(n_in, 9, dtype=torch.float64)[:, ::2].requires_grad_()
    weight = torch.randn(4, 3, 3, 3, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for sp in LIBRARIES.values():
        extra = (None,) if sp is ours else (spconv.pytorch.functional.CUDAKernelTimer(False),)
        y = getattr(sp.functional, name)(
            feats, weight, pairs, counts, rows(n_out), sp.ConvAlgo.Native, *extra
        )
        results.append([y, *torch.autograd.grad(y.square().sum(), (feats, weight))])
    for expected, got in zip(*results, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.Size])
def test_numbers_of_cells(kind, dtype):
    indices = random_sites(50, 3, extent=tuple(SHAPE)).coords.to(dtype)
    args = indices, kind([2, *SHAPE])
    expected = theirs.functional._indice_to_scalar(*args)
    got = ours.functional._indice_to_scalar(*args)
    assert torch.equal(got, expected)
    assert got.dtype == expected.dtype


VALUES = [3, (1, 2, 3), [4, 5, 6], np.array([7, 8, 9]), True]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_expand_nd(value):
    assert ours.core.expand_nd(3, value) == theirs.core.expand_nd(3, value)


@pytest.mark.parametrize("value", [[1, 2], 1.5, [1, 2, 2.5], "abc"], ids=repr)
def test_expand_nd_refuses(value):
    """Fractions are refused too; the original rounds them down in a list."""
    with pytest.raises(ValueError, match=r"per axis|whole numbers"):
        ours.core.expand_nd(3, value)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_scatter_nd(depth):
    torch.manual_seed(0)
    shape = [4, 3, 5]
    cells = torch.stack(torch.unravel_index(torch.randperm(12 if depth < 3 else 60)[:3], shape), 1)
    indices = torch.unique(cells[:, :depth], dim=0)
    updates = torch.randn(len(indices), *shape[depth:])
    args = indices, updates, shape
    assert torch.equal(ours.core.scatter_nd(*args), theirs.core.scatter_nd(*args))


@pytest.mark.parametrize("invalid", [0, -1, 2.5])
def test_features_of_points(invalid):
    torch.manual_seed(0)
    features, ids = torch.randn(6, 3), torch.tensor([0, 5, -1, 2, 2, -1])
    args = features, ids, invalid
    expected = theirs.utils.gather_features_by_pc_voxel_id(*args)
    assert torch.equal(ours.utils.gather_features_by_pc_voxel_id(*args), expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sparse_add(count):
    torch.manual_seed(0)
    sites = [random_sites(30, 3, extent=(4, 4, 4)).coords for _ in range(count)]
    feats = [torch.randn(len(coords), 2, dtype=torch.float64) for coords in sites]
    results = []
    for sp in LIBRARIES.values():
        tensors = [sp.SparseConvTensor(f, c, [4] * 3, 2) for f, c in zip(feats, sites, strict=True)]
        results.append(sp.functional.sparse_add(*tensors).dense())
    assert_close(*results)
