"""The public surface: import paths, names, signatures, and the errors of absent names."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compat.spconv as top
import compat.spconv.pytorch as spconv
from compat.spconv import utils

CONV = ["SubMConv", "SparseConv", "SparseConvTranspose", "SparseInverseConv"]
NAMES = {
    "compat.spconv": "ConvAlgo AlgoHint constants core __version__ SPCONV_VERSION_NUMBERS",
    "compat.spconv.core": "ConvAlgo AlgoHint",
    "compat.spconv.constants": "FILTER_HWIO SAVED_WEIGHT_LAYOUT SPCONV_DEBUG_WEIGHT",
    "compat.spconv.cppconstants": "CPU_ONLY_BUILD",
    "compat.spconv.debug_utils": "spconv_save_debug_data",
    "compat.spconv.tools": "CUDAKernelTimer",
    "compat.spconv.pytorch": (
        "ConvAlgo SparseConvTensor functional ops conv modules core pool tables utils identity "
        "hash spatial constants SparseModule SparseSequential is_spconv_module "
        "assign_name_for_sparse_modules "
        "SparseBatchNorm SparseSyncBatchNorm SparseReLU SparseIdentity Identity ToDense RemoveGrid "
        "AddTable JoinTable ConcatTable SparseGlobalMaxPool SparseGlobalAvgPool "
        + " ".join(f"{kind}{ndim}d" for kind in CONV for ndim in (1, 2, 3, 4))
        + " SparseMaxPool1d SparseMaxPool2d SparseMaxPool3d SparseMaxPool4d"
        + " SparseAvgPool1d SparseAvgPool2d SparseAvgPool3d"
    ),
    "compat.spconv.pytorch.modules": (
        "SparseModule SparseSequential is_spconv_module is_sparse_conv SparseBatchNorm "
        "assign_name_for_sparse_modules SparseSyncBatchNorm SparseReLU SparseIdentity"
    ),
    "compat.spconv.pytorch.core": (
        "ConvAlgo SparseConvTensor IndiceData ImplicitGemmIndiceData expand_nd scatter_nd"
    ),
    "compat.spconv.pytorch.conv": (
        "ConvAlgo SparseConvolution SparseConv3d DEFAULT_SPARSE_CONV_TYPES"
    ),
    "compat.spconv.pytorch.utils": "PointToVoxel gather_features_by_pc_voxel_id",
    "compat.spconv.pytorch.functional": (
        "sparse_add sparse_add_hash_based indice_conv indice_subm_conv indice_inverse_conv "
        "implicit_gemm indice_maxpool indice_maxpool_implicit_gemm indice_avgpool_implicit_gemm"
    ),
    "compat.spconv.pytorch.hash": "HashTable",
    "compat.spconv.pytorch.spatial": "RemoveDuplicate",
    "compat.spconv.pytorch.identity": "Identity",
    "compat.spconv.pytorch.ops": (
        "ConvAlgo get_conv_output_size get_deconv_output_size get_indice_pairs indice_conv "
        "get_indice_pairs_implicit_gemm implicit_gemm indice_maxpool indice_maxpool_implicit_gemm"
    ),
    "compat.spconv.pytorch.tables": "AddTable JoinTable ConcatTable AddTableMisaligned",
    "compat.spconv.pytorch.pool": "SparseMaxPool SparseAvgPool",
    "compat.spconv.utils": (
        "Point2VoxelCPU1d Point2VoxelCPU2d Point2VoxelCPU3d Point2VoxelCPU4d nullcontext rbbox_iou "
        "Point2VoxelGPU1d Point2VoxelGPU2d Point2VoxelGPU3d Point2VoxelGPU4d "
        "rbbox_intersection rbbox_iou_loss non_max_suppression_cpu rotate_non_max_suppression_cpu"
    ),
}
SIGNATURES = {
    "SubMConv3d": (
        "in_channels out_channels kernel_size stride=1 padding=0 dilation=1 groups=1 bias=True "
        "indice_key=None algo=None fp32_accum=None large_kernel_fast_algo=False name=None"
    ),
    "SparseConv3d": (
        "in_channels out_channels kernel_size stride=1 padding=0 dilation=1 groups=1 bias=True "
        "indice_key=None algo=None fp32_accum=None record_voxel_count=False "
        "large_kernel_fast_algo=False name=None"
    ),
    "SparseConvTranspose2d": (
        "in_channels out_channels kernel_size stride=1 padding=0 dilation=1 groups=1 bias=True "
        "indice_key=None algo=None fp32_accum=None record_voxel_count=False "
        "large_kernel_fast_algo=False name=None"
    ),
    "SparseInverseConv3d": (
        "in_channels out_channels kernel_size indice_key bias=True algo=None fp32_accum=None "
        "large_kernel_fast_algo=False name=None"
    ),
    "SparseMaxPool3d": (
        "kernel_size stride=None padding=0 dilation=1 indice_key=None algo=None "
        "record_voxel_count=False name=None"
    ),
    "SparseAvgPool2d": (
        "kernel_size stride=None padding=0 dilation=1 indice_key=None algo=None "
        "record_voxel_count=False name=None"
    ),
    "pool.SparseMaxPool": (
        "ndim kernel_size=3 stride=1 padding=0 dilation=1 indice_key=None subm=False algo=None "
        "record_voxel_count=False name=None"
    ),
    "SparseConvTensor": (
        "features indices spatial_shape batch_size grid=None voxel_num=None indice_dict=None "
        "benchmark=False permanent_thrust_allocator=False enable_timer=False force_algo=None"
    ),
    "core.IndiceData": (
        "out_indices indices indice_pairs indice_pair_num spatial_shape out_spatial_shape is_subm "
        "algo ksize stride dilation padding voxel_num=None"
    ),
    "core.ImplicitGemmIndiceData": (
        "out_indices indices pair_fwd pair_bwd pair_mask_fwd_splits pair_mask_bwd_splits "
        "mask_argsort_fwd_splits mask_argsort_bwd_splits masks spatial_shape out_spatial_shape "
        "is_subm algo ksize stride dilation padding in_voxel_num=None out_voxel_num=None"
    ),
    "conv.SparseConvolution": (
        "ndim in_channels out_channels kernel_size=3 stride=1 padding=0 dilation=1 groups=1 "
        "bias=True subm=False output_padding=0 transposed=False inverse=False indice_key=None "
        "algo=None fp32_accum=None record_voxel_count=False act_type=Activation.None_ act_alpha=0 "
        "act_beta=0 large_kernel_fast_algo=False name=None device=None dtype=None"
    ),
    "utils.PointToVoxel": (
        "vsize_xyz coors_range_xyz num_point_features max_num_voxels max_num_points_per_voxel "
        "device=cpu:0"
    ),
}


@pytest.mark.parametrize("module", NAMES)
def test_names_resolve(module):
    loaded = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(loaded, name)] == []


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_originals(name):
    owner = spconv
    for part in name.split("."):
        owner = getattr(owner, part)
    parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert shown == SIGNATURES[name].split()


def test_version_reads_as_downstream_code_reads_it():
    assert float(top.__version__[2:]) >= 2.2
    assert top.__version__ >= "2.0.0"
    assert top.SPCONV_VERSION_NUMBERS == [2, 3, 8]


def test_constants_are_a_writable_module_of_the_package(monkeypatch):
    monkeypatch.setattr(top.constants, "SPCONV_USE_DIRECT_TABLE", False)
    assert not spconv.constants.SPCONV_USE_DIRECT_TABLE


def test_enum_members():
    assert [(m.name, m.value) for m in top.ConvAlgo] == [
        ("Native", 0), ("MaskImplicitGemm", 1), ("MaskSplitImplicitGemm", 2),
    ]  # fmt: skip
    assert [(m.name, m.value) for m in top.AlgoHint] == [
        ("NoHint", 0), ("Fowrard", 1), ("BackwardInput", 2), ("BackwardWeight", 4),
    ]  # fmt: skip
    assert spconv.ConvAlgo is top.core.ConvAlgo


def test_default_sparse_conv_types_hold_every_named_layer():
    expected = {getattr(spconv, f"{kind}{ndim}d") for kind in CONV for ndim in (1, 2, 3, 4)}
    assert expected == spconv.conv.DEFAULT_SPARSE_CONV_TYPES


def test_layers_can_be_built_from_the_arguments_of_a_registry():
    for kind in (spconv.SubMConv3d, spconv.SparseConv3d, spconv.SparseConvTranspose3d):
        layer = kind(4, 8, 3, stride=1, padding=1, bias=False, indice_key="k")
        assert layer.indice_key == "k"
    layer = spconv.SparseInverseConv3d(4, 8, 3, bias=False, indice_key="k")
    assert layer.is_inverseable()
    assert not spconv.SubMConv3d(4, 8, 3, indice_key="k").is_inverseable()


def test_layer_attributes_and_repr():
    layer = spconv.SparseConv3d(4, 8, 3, (2, 1, 1), 1)
    assert (layer.ndim, layer.in_channels, layer.out_channels, layer.groups) == (3, 4, 8, 1)
    assert (layer.kernel_size, layer.stride) == ([3, 3, 3], [2, 1, 1])
    assert (layer.padding, layer.dilation, layer.output_padding) == ([1] * 3, [1] * 3, [0] * 3)
    assert not any((layer.conv1x1, layer.transposed, layer.inverse, layer.subm))
    assert repr(layer) == (
        "SparseConv3d(4, 8, kernel_size=[3, 3, 3], stride=[2, 1, 1], padding=[1, 1, 1], "
        "dilation=[1, 1, 1], output_padding=[0, 0, 0], algo=ConvAlgo.MaskImplicitGemm)"
    )
    assert "bias=False" in repr(spconv.SubMConv3d(4, 8, 3, bias=False))
    assert repr(spconv.SparseMaxPool2d(2)) == (
        "SparseMaxPool2d(kernel_size=[2, 2], stride=[2, 2], padding=[0, 0], dilation=[1, 1], "
        "algo=ConvAlgo.MaskImplicitGemm)"
    )


def test_the_1x_voxel_generators_are_absent():
    assert not hasattr(utils, "VoxelGenerator")
    assert not hasattr(utils, "VoxelGeneratorV2")


@pytest.mark.parametrize(
    ("module", "name", "hint"),
    [
        (spconv, "FocalsConv3d", "spconv-plus"),
        (spconv, "quantization", "float16 or bfloat16"),
        (spconv.ops, "SpconvOps", "use the functions"),
        (utils, "BoxOps", "torchvision"),
    ],
)
def test_absent_names_say_what_to_use(module, name, hint):
    with pytest.raises(AttributeError, match=hint):
        getattr(module, name)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = module.nonsense


def test_box_operations_are_importable_and_say_what_to_use():
    with pytest.raises(NotImplementedError, match=r"rbbox_iou is not provided.*mmcv"):
        utils.rbbox_iou(1, 2)


@pytest.mark.parametrize(
    ("name", "value", "outcome"),
    [
        ("SPCONV_SAVED_WEIGHT_LAYOUT", "RSCK", "RSCK False"),
        ("SPCONV_SAVED_WEIGHT_LAYOUT", "NHWC", "ValueError: SPCONV_SAVED_WEIGHT_LAYOUT must be"),
        ("SPCONV_FILTER_HWIO", "1", "NotImplementedError: SPCONV_FILTER_HWIO=1"),
        ("SPCONV_FX_TRACE_MODE", "1", " True"),
    ],
)
def test_settings_in_the_environment_are_read_when_needed(name, value, outcome):
    code = (
        "import compat.spconv.constants as c; print(c.SAVED_WEIGHT_LAYOUT, c.SPCONV_FX_TRACE_MODE)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {name: value, "PYTHONPATH": str(Path(top.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in done.stdout + done.stderr


def test_layers_can_be_deep_copied():
    import copy

    layer = spconv.SubMConv3d(1, 1, 3)
    twin = copy.deepcopy(layer)
    assert torch.equal(layer.weight, twin.weight)


def test_quirks_name_tests_that_exist():
    folder = Path(__file__).parent
    text = (Path(top.__file__).parent / "QUIRKS.md").read_text()
    functions = {
        name: path.name
        for path in folder.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    named = set(re.findall(r"(test_\w+)(?!\.py|\w)", text))
    assert named - set(functions) == set()
    for file, name in re.findall(r"(test_\w+\.py)::(test_\w+)", text):
        assert functions[name] == file
