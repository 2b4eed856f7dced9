"""Names, signatures and pair functions of ``compat.spconv``, compared with spconv itself."""

import importlib
import inspect
import itertools

import pytest
import torch

from tritonspconv.testing import assert_close, random_sites

pytest.importorskip("spconv", reason="the original, spconv 2.3.8, is not installed")

import spconv.pytorch as theirs
import spconv.pytorch.functional
import spconv.pytorch.hash
import spconv.pytorch.ops
import spconv.pytorch.spatial
import spconv.pytorch.utils
import spconv.utils

import compat.spconv.pytorch as ours
from compat.spconv import utils
from tests.compat.spconv.test_surface import NAMES

pytestmark = [
    pytest.mark.parity,
    # The original may rely on the contents of `torch.empty`.
    pytest.mark.real_empty,
]

LAYERS = [
    *(f"{kind}{n}d" for kind in ("SubMConv", "SparseConv") for n in (1, 2, 3, 4)),
    *(f"Sparse{kind}{n}d" for kind in ("ConvTranspose", "InverseConv") for n in (1, 2, 3, 4)),
    *(f"SparseMaxPool{n}d" for n in (1, 2, 3, 4)),
    *(f"SparseAvgPool{n}d" for n in (1, 2, 3)),
    "SparseGlobalMaxPool SparseGlobalAvgPool SparseConvTensor SparseModule",
]
CALLABLES = {
    "": " ".join(LAYERS),
    "conv": "SparseConvolution",
    "core": "IndiceData ImplicitGemmIndiceData",
    "pool": "SparseMaxPool SparseAvgPool",
    "utils": "PointToVoxel gather_features_by_pc_voxel_id",
    "hash": "HashTable",
    "ops": (
        "get_conv_output_size get_deconv_output_size get_indice_pairs indice_conv implicit_gemm "
        "get_indice_pairs_implicit_gemm indice_conv_backward implicit_gemm_backward indice_maxpool "
        "indice_maxpool_backward indice_maxpool_implicit_gemm indice_avgpool_implicit_gemm "
        "indice_maxpool_implicit_gemm_backward indice_avgpool_implicit_gemm_backward"
    ),
    "functional": "sparse_add sparse_add_hash_based _indice_to_scalar",
}
METHODS = {
    "SparseConvTensor": (
        "replace_feature select_by_index minus shadow_copy dequantize from_dense dense "
        "find_indice_pair q_scale"
    ),
    "SparseSequential": "add",
    "ConcatTable": "add input_spatial_size",
    "AddTable": "input_spatial_size",
    "ToDense": "forward",
    "RemoveGrid": "forward",
    "Identity": "forward input_spatial_size",
    "conv.SparseConvolution": "forward is_inverseable get_max_num_voxels reset_parameters",
    "utils.PointToVoxel": "__call__ generate_voxel_with_id",
    "hash.HashTable": "insert query insert_exist_keys assign_arange_ items",
    "spatial.RemoveDuplicate": "forward",
}
FUNCTIONS = {
    "indice_conv": "SparseConvFunction",
    "indice_inverse_conv": "SparseInverseConvFunction",
    "indice_subm_conv": "SubMConvFunction",
    "implicit_gemm": "SparseImplicitGemmFunction",
    "indice_maxpool": "SparseMaxPoolFunction",
    "indice_maxpool_implicit_gemm": "SparseMaxPoolImplicitGemmFunction",
    "indice_avgpool_implicit_gemm": "SparseAvgPoolImplicitGemmFunction",
}
# spconv has the first names with CUDA only, and the others in other modules.
NOT_IN_THE_ORIGINAL = {
    "compat.spconv.utils": {f"Point2VoxelGPU{ndim}d" for ndim in (1, 2, 3, 4)},
    "compat.spconv.pytorch": {"SparseSyncBatchNorm", "is_spconv_module"},
}
VOXEL_METHODS = (
    "point_to_voxel point_to_voxel_empty_mean calc_meta_data point_to_voxel_static "
    "point_to_voxel_empty_mean_static"
)


def attribute(root, path):
    for part in path.split("."):
        root = getattr(root, part) if part else root
    return root


def parameters(function):
    """Return names and defaults; objects of the two libraries are compared by their kind."""
    shown = []
    for parameter in inspect.signature(function).parameters.values():
        default = parameter.default
        if parameter.name == "timer" and default is not parameter.empty:
            default = None
        if hasattr(default, "name"):
            default = default.name
        shown.append((parameter.name, default))
    return shown


@pytest.mark.parametrize("module", NAMES)
def test_every_listed_name_is_the_originals(module):
    original = importlib.import_module(module.removeprefix("compat."))
    absent = {name for name in NAMES[module].split() if not hasattr(original, name)}
    assert absent == NOT_IN_THE_ORIGINAL.get(module, set())


@pytest.mark.parametrize(
    "path", [f"{module}.{name}" for module in CALLABLES for name in CALLABLES[module].split()]
)
def test_parameters_are_the_originals(path):
    assert parameters(attribute(ours, path)) == parameters(attribute(theirs, path))


@pytest.mark.parametrize(
    "path", [f"{owner}.{name}" for owner in METHODS for name in METHODS[owner].split()]
)
def test_parameters_of_methods_are_the_originals(path):
    assert parameters(attribute(ours, path)) == parameters(attribute(theirs, path))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_of_functions_are_those_of_the_originals_autograd(name):
    original = getattr(theirs.functional, FUNCTIONS[name]).forward
    assert parameters(getattr(ours.functional, name)) == parameters(original)[1:]


@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
def test_voxel_generators_have_the_originals_methods(ndim):
    original = getattr(spconv.utils, f"Point2VoxelCPU{ndim}d")
    made = getattr(utils, f"Point2VoxelCPU{ndim}d")
    for name in VOXEL_METHODS.split():
        # The signature of a compiled method is the first line of its docstring.
        head = getattr(original, name).__doc__.split("->")[0]
        expected = [part.split(":")[0].split("(")[-1] for part in head.split(", ") if ":" in part]
        got = list(inspect.signature(getattr(made, name)).parameters)
        assert got == expected


LAYER_ARGUMENTS = [
    ("SubMConv3d", (3, 5, 3), {}),
    ("SubMConv2d", (3, 5, (1, 3)), {"bias": False}),
    ("SubMConv3d", (3, 5, 1), {}),
    ("SparseConv3d", (3, 5, 2, 2), {"record_voxel_count": True}),
    ("SparseConvTranspose4d", (3, 5, 2, 2), {}),
    ("SparseInverseConv1d", (3, 5, 3, "key"), {}),
]


@pytest.mark.parametrize(("kind", "args", "options"), LAYER_ARGUMENTS)
def test_state_dicts_go_both_ways(kind, args, options, tmp_path):
    """Each library loads the state that the other has saved to a file."""
    layers = [getattr(library, kind)(*args, **options) for library in (ours, theirs)]
    for source, target in itertools.permutations(layers):
        state = {k: torch.rand_like(v.float()).to(v.dtype) for k, v in source.state_dict().items()}
        source.load_state_dict(state)
        torch.save(source.state_dict(), tmp_path / "state.pt")
        target.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
        assert target.state_dict().keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(target.state_dict()[key], value)


@pytest.mark.parametrize("subm", [False, True], ids=["strided", "submanifold"])
def test_functions_on_the_originals_pairs_give_its_results(subm, monkeypatch):
    """Both libraries get spconv's pair lists, which hold half of a submanifold window."""
    monkeypatch.setattr(spconv.pytorch.ops, "get_current_stream", lambda: 0)
    native = theirs.ConvAlgo.Native
    coords = random_sites(60, 3, extent=(9, 8, 10)).coords
    stride = [1, 1, 1] if subm else [2, 2, 2]
    out_coords, pairs, counts = theirs.ops.get_indice_pairs(
        coords, 2, [9, 8, 10], native, [3] * 3, stride, [1] * 3, [1] * 3, [0] * 3, subm=subm
    )
    feats = torch.randn(len(coords), 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    name = "indice_subm_conv" if subm else "indice_conv"
    results = []
    for library in (ours, theirs):
        out = getattr(library.functional, name)(
            feats, weight, pairs, counts, len(out_coords), library.ConvAlgo.Native
        )
        results.append([out, *torch.autograd.grad(out.square().sum(), (feats, weight))])
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected)
    if not subm:
        args = (feats.detach().float(), pairs, counts, len(out_coords))
        assert_close(ours.ops.indice_maxpool(*args), theirs.ops.indice_maxpool(*args))
        back = torch.randn(len(out_coords), 5, dtype=torch.float64)
        inverse = [
            library.functional.indice_inverse_conv(
                back, weight.transpose(0, 4).contiguous(), pairs, counts, len(coords),
                library.ConvAlgo.Native,
            )
            for library in (ours, theirs)
        ]  # fmt: skip
        assert_close(*inverse)
