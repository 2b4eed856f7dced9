"""The tests that would notice a change of a module: what ``mutate.py`` runs for each mutant."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]

# Folder or file -> tests that would notice a change, quick ones first. Tests after "interpreter"
# run with TRITON_INTERPRET=1, tests after "plain" without it. A module uses the longest name that
# fits its path; "{stem}" stands for the name of the module, and is left out where there is no such
# test.
_MAPS = "tests/kernel_map/test_kernel_map.py"
_BACK_ENDS = "interpreter tests/test_back_ends.py"
_LAUNCH = "tests/kernels/test_launch_arguments.py"
_NUMBA = "tests/kernels/test_numba"
_ONNX = "tests/export/test_onnx_relation.py tests/export/test_onnx_dialects.py "
_ONNX += "tests/export/test_onnx_refusals.py tests/export/test_onnx_networks.py"
_TRAINING = "tests/test_training.py tests/test_boxes.py"
TESTS = {
    "tritonspconv/_compat_name.py": "tests/test_cli.py tests/test_imports.py",
    "tritonspconv/_self_check.py": "tests/test_doctor.py",
    "tritonspconv/arguments.py": f"tests/test_arguments.py tests/nn/test_conv.py {_MAPS}",
    "tritonspconv/compat": "tests/test_imports.py tests/test_cli.py",
    "tritonspconv/debug.py": "tests/test_debug.py",
    "tritonspconv/geometry.py": f"tests/test_geometry.py {_MAPS}",
    "tritonspconv/graph_capture.py": "tests/test_graph_capture.py "
    "tests/test_registered_operators.py",
    "tritonspconv/guide.py": "tests/test_troubleshooting.py",
    "tritonspconv/opaque_types.py": "tests/test_registered_operators.py tests/test_pickle.py",
    "tritonspconv/reference.py": "tests/test_reference.py tests/test_geometry.py",
    "tritonspconv/sparse_tensor.py": "tests/test_sparse_tensor.py tests/nn",
    "tritonspconv/waits.py": _MAPS,
    "tritonspconv/coords": f"tests/coords interpreter tests/coords plain {_MAPS}",
    "tritonspconv/coords/grid.py": "tests/coords tests/export/test_export_program.py "
    f"interpreter tests/coords plain {_MAPS}",
    "tritonspconv/kernel_map": f"tests/kernel_map/test_from_pairs.py {_MAPS} {_BACK_ENDS} "
    f"{_MAPS} tests/kernel_map/test_ordered_tables.py",
    "tritonspconv/kernels": "interpreter tests/kernels/test_launchers.py plain "
    f"{_MAPS} tests/ops/test_conv.py tests/ops/test_{{stem}}.py "
    f"{_BACK_ENDS} tests/kernels/test_{{stem}}.py tests/kernels/test_faces.py",
    "tritonspconv/kernels/__init__.py": "interpreter tests/kernels/test_back_end.py",
    "tritonspconv/kernels/gather_gemm.py": "interpreter tests/kernels/test_launchers.py plain "
    "tests/nn/test_chain.py tests/ops/test_conv.py",
    "tritonspconv/kernels/keys.py": f"tests/coords {_MAPS}",
    "tritonspconv/kernels/order_columns.py": "interpreter tests/kernels/test_order_columns.py "
    "tests/kernel_map/test_ordered_tables.py tests/test_back_ends.py",
    "tritonspconv/kernels/compile_ahead.py": "tests/kernels/test_compile_pool.py",
    "tritonspconv/kernels/tuning.py": "tests/test_cli.py interpreter "
    "tests/kernels/test_tuned_tiles.py",
    "tritonspconv/kernels/window.py": f"{_MAPS} interpreter tests/kernels/test_window_taps.py "
    f"{_NUMBA}_maps.py tests/kernels/test_sites.py",
    "tritonspconv/kernels/eager": "interpreter tests/kernels/test_{stem}.py "
    f"tests/kernels/test_pair_panels.py plain {_MAPS} tests/ops/test_{{stem}}.py "
    "tests/ops/test_conv.py",
    "tritonspconv/kernels/eager/conv_grads.py": "interpreter tests/kernels/test_both_grads.py "
    "tests/kernels/test_conv_grads.py tests/kernels/test_pair_panels.py plain "
    "tests/ops/test_conv.py",
    "tritonspconv/kernels/eager/first_rows.py": f"tests/coords {_MAPS}",
    "tritonspconv/kernels/eager/segment_reduce.py": "tests/ops/test_global_pool.py "
    "tests/ops/test_voxelize.py interpreter tests/kernels/test_segment_reduce.py",
    "tritonspconv/kernels/eager/sites.py": f"interpreter tests/kernels/test_sites.py "
    f"plain tests/coords {_MAPS}",
    "tritonspconv/kernels/eager/_row_search.py": f"tests/coords {_MAPS} interpreter "
    "tests/kernels/test_neighbor_table.py",
    "tritonspconv/kernels/numba": f"interpreter {_NUMBA}_products.py {_NUMBA}_maps.py "
    f"{_NUMBA}_room.py",
    "tritonspconv/kernels/numba/_reach.py": f"interpreter {_NUMBA}_maps.py",
    "tritonspconv/kernels/numba/_row_search.py": f"interpreter {_NUMBA}_maps.py",
    "tritonspconv/kernels/numba/_sorted_keys.py": f"interpreter {_NUMBA}_maps.py",
    "tritonspconv/kernels/numba/_threads.py": f"interpreter {_NUMBA}_room.py {_NUMBA}_maps.py",
    "tritonspconv/kernels/numba/first_rows.py": f"interpreter {_NUMBA}_maps.py",
    "tritonspconv/kernels/numba/invert_table.py": f"interpreter {_NUMBA}_maps.py",
    "tritonspconv/kernels/numba/neighbor_table.py": f"interpreter {_NUMBA}_maps.py",
    "tritonspconv/kernels/numba/pool.py": f"interpreter {_NUMBA}_pool.py",
    "tritonspconv/kernels/numba/scatter_table.py": f"interpreter {_NUMBA}_maps.py",
    "tritonspconv/kernels/numba/sites.py": f"interpreter {_NUMBA}_maps.py",
    "tritonspconv/kernels/triton": "interpreter tests/kernels/test_{stem}.py "
    "tests/test_back_ends.py",
    "tritonspconv/kernels/triton/_arguments.py": _LAUNCH,
    "tritonspconv/kernels/triton/_bits.py": "interpreter tests/kernels/test_sites.py "
    "tests/kernels/test_neighbor_table.py tests/kernels/test_pairs.py",
    "tritonspconv/kernels/triton/_blocks.py": "interpreter tests/kernels/test_gather_gemm.py "
    "tests/test_back_ends.py",
    "tritonspconv/kernels/triton/_column_order.py": "interpreter "
    "tests/kernels/test_column_order.py tests/kernel_map/test_ordered_tables.py",
    "tritonspconv/kernels/triton/_dot_precision.py": "tests/kernels/test_compile_targets.py "
    "interpreter tests/kernels/test_gather_gemm.py",
    "tritonspconv/kernels/triton/_grid.py": "interpreter tests/kernels/test_sites.py "
    "tests/kernels/test_neighbor_table.py tests/kernels/test_window_taps.py",
    "tritonspconv/kernels/triton/_index.py": "interpreter tests/kernels/test_sites.py "
    "tests/kernels/test_neighbor_table.py",
    "tritonspconv/kernels/triton/_launch.py": f"{_LAUNCH} interpreter tests/kernels/test_launch.py",
    "tritonspconv/kernels/triton/_lookup.py": "interpreter tests/kernels/test_neighbor_table.py "
    "tests/kernels/test_window_taps.py tests/kernel_map/test_ordered_tables.py",
    "tritonspconv/kernels/triton/_scratch_table.py": "interpreter "
    "tests/kernels/test_scatter_table.py tests/test_back_ends.py",
    "tritonspconv/kernels/triton/_torch_launcher.py": _LAUNCH,
    "tritonspconv/kernels/triton/_versions.py": _LAUNCH,
    "tritonspconv/kernels/triton/compile_ahead.py": "tests/kernels/test_compile_pool.py",
    "tritonspconv/kernels/triton/_compile_pool.py": "tests/kernels/test_compile_pool.py",
    "tritonspconv/kernels/triton/conv_grads.py": "interpreter tests/kernels/test_half_parts.py "
    "tests/kernels/test_conv_grads.py tests/test_back_ends.py",
    "tritonspconv/kernels/triton/configs.py": "tests/kernels/test_compile_targets.py interpreter "
    "tests/kernels/test_tuned_tiles.py tests/kernels/test_gather_gemm.py",
    "tritonspconv/ops": f"tests/ops/test_{{stem}}.py tests/nn/test_conv.py "
    f"tests/nn/test_modules.py {_BACK_ENDS}",
    "tritonspconv/ops/_conv_checks.py": "tests/ops/test_conv.py tests/ops/test_second_order.py",
    "tritonspconv/ops/_conv_parts.py": f"tests/ops/test_conv.py {_BACK_ENDS}",
    "tritonspconv/ops/bounded_norm.py": "tests/ops/test_batch_norm.py "
    "tests/kernel_map/test_bounded.py tests/capture",
    "tritonspconv/ops/conv.py": "tests/ops/test_conv.py tests/test_registered_operators.py "
    f"{_BACK_ENDS}",
    "tritonspconv/ops/registered.py": "tests/test_registered_operators.py",
    "tritonspconv/ops/rowwise.py": "tests/coords/test_row_tensor.py tests/capture",
    "tritonspconv/ops/registered_norm.py": "tests/test_registered_operators.py",
    "tritonspconv/nn": "tests/nn tests/compat/spconv/test_fused_layers.py",
    "tritonspconv/nn/chain.py": "tests/nn/test_chain.py tests/compat/spconv/test_fused_layers.py "
    "tests/test_registered_operators.py",
    "tritonspconv/nn/norm.py": "tests/nn tests/test_registered_operators.py",
    "tritonspconv/nn/traced.py": "tests/test_registered_operators.py",
    "tritonspconv/nn/blocks": "tests/nn/blocks",
    "tritonspconv/nn/memory": "tests/nn/test_save_memory.py",
    "tritonspconv/capture": "tests/capture",
    "tritonspconv/export": "tests/export/test_recorded_maps.py tests/export/test_export_program.py",
    "tritonspconv/export/onnx": _ONNX,
    "tritonspconv/export/onnx/fold.py": f"tests/export/test_onnx_fold.py {_ONNX}",
    "tritonspconv/export/onnx/functions.py": f"tests/export/test_onnx_functions.py {_ONNX}",
    "tritonspconv/models": "tests/test_models.py tests/export/test_onnx_networks.py "
    "tests/capture/test_minkowski.py "
    "tests/nn/test_save_memory.py tests/test_boxes.py tests/parity/test_cases.py",
    "tritonspconv/points": "tests/points tests/test_bad_files.py",
    "tritonspconv/profile": "tests/test_profile.py",
    "tritonspconv/testing": "tests/test_testing.py tests/test_rooms.py",
    "tritonspconv/training": _TRAINING,
    "tritonspconv/cli": "tests/test_cli.py tests/test_bad_files.py",
    "tritonspconv/cli/convert.py": "tests/compat/spconv/test_checkpoint_layouts.py "
    "tests/compat/minkowski/test_checkpoint.py tests/test_cli.py",
    "tritonspconv/cli/doctor.py": "tests/test_doctor.py",
    "tritonspconv/cli/explain.py": "tests/test_troubleshooting.py",
    "tritonspconv/cli/profile.py": "tests/test_profile.py",
    "tritonspconv/cli/train.py": f"{_TRAINING} tests/test_cli.py",
    "tritonspconv/cli/train_tasks.py": f"{_TRAINING} tests/test_cli.py",
    "tritonspconv/cli/tune.py": "tests/test_cli.py interpreter tests/kernels/test_tuned_tiles.py",
    "compat/__main__.py": "tests/compat/test_install.py",
    "compat/_install.py": "tests/compat/test_install.py tests/compat/test_install_minkowski.py",
    "compat/_site": "tests/compat/test_install.py",
    "compat/cumm": "tests/compat/spconv/test_functional.py tests/parity/test_spconv_own_code.py "
    "tests/compat/test_install.py "
    "tests/parity/test_spconv_names.py",
    "compat/spconv": "tests/compat/spconv tests/parity/test_spconv_surface.py",
    "compat/spconv/pytorch/_paths.py": "tests/test_registered_operators.py tests/compat/spconv",
    "compat/spconv/pytorch/_traced.py": "tests/test_registered_operators.py",
    "compat/minkowski": "tests/compat/minkowski tests/nn/test_fuse.py",
}

# The tests of adapters that run before those of their whole package.
_FIRST = {
    "compat/spconv/pytorch": {
        "_convolution": "conv", "_convolution_base": "conv", "_pair_ops": "functional",
        "_pairs": "functional", "_records": "functional", "_repeats": "repeats",
        "conv": "conv", "core": "tensor", "functional": "functional", "hash": "hash",
        "modules": "modules", "ops": "functional", "pool": "pool",
    },
    "compat/spconv/utils": {"__init__": "voxels"},
    "compat/minkowski": {
        "MinkowskiBroadcast": "broadcast", "MinkowskiConvolution": "conv",
        "MinkowskiCoordinateManager": "manager", "MinkowskiInterpolation": "interpolation",
        "MinkowskiKernelGenerator": "kernel_generator", "MinkowskiNonlinearity": "nonlinearity",
        "MinkowskiNormalization": "normalization", "MinkowskiOps": "ops",
        "MinkowskiPooling": "pool", "MinkowskiPruning": "pruning",
        "MinkowskiSparseTensor": "tensor", "MinkowskiTensor": "tensor",
        "MinkowskiTensorField": "field", "MinkowskiUnion": "union", "_coordinate_map": "manager",
        "_coordinate_maps": "manager", "_dense": "functions", "_field_maps": "field",
        "_fields": "field", "_samples": "samples", "checkpoint": "checkpoint", "enums": "enums",
    },
    "compat/minkowski/utils": {
        "collation": "utils", "coords": "utils", "quantization": "utils", "summary": "utils",
    },
}  # fmt: skip
for _folder, _firsts in _FIRST.items():
    _package = "/".join(_folder.split("/")[:2])
    for _module, _first in _firsts.items():
        _tests = f"tests/{_package}/test_{_first}.py plain {TESTS[_package]}"
        TESTS[f"{_folder}/{_module}.py"] = _tests

# Folder or file -> why the draw leaves it out.
LEFT_OUT = {
    "tritonspconv/__main__.py": "it only calls the command",
    "tritonspconv/bench": "it measures",
    "tritonspconv/demo": "it draws pictures and prints tables for people",
    "tritonspconv/verify": "it checks an installation on a GPU",
}


def tests_of(path: str) -> list[tuple[bool, list[str]]]:
    """Return the runs of pytest for a module: whether kernels are interpreted, and what to run."""
    fitting = [name for name in TESTS if path == name or path.startswith(f"{name}/")]
    if not fitting:
        return []
    stem = Path(path).stem.lstrip("_")
    runs: list[tuple[bool, list[str]]] = [(False, [])]
    for word in TESTS[max(fitting, key=len)].split():
        name = word.format(stem=stem)
        if word in ("plain", "interpreter"):
            runs.append((word == "interpreter", []))
        elif (ROOT / name).exists() and name not in runs[-1][1]:
            runs[-1][1].append(name)
    return [run for run in runs if run[1]]
