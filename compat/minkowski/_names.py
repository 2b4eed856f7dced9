"""Names that modules of MinkowskiEngine show although other modules define them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

# The modules of this package, each with names of its own that modules of the original show too.
_HOMES = {
    name: home
    for home, names in {
        "_keys": "CoordinateMapKey",
        "_shared_manager": (
            "global_coordinate_manager set_global_coordinate_manager sparse_tensor_operation_mode"
        ),
        "enums": "BroadcastMode CoordinateMapType RegionType SparseTensorOperationMode",
        "MinkowskiCommon": "convert_to_int_list convert_to_int_tensor",
        "MinkowskiCoordinateManager": "CoordinateManager",
        "MinkowskiPooling": "MinkowskiDirectMaxPoolingFunction",
        "MinkowskiSparseTensor": "SparseTensor _get_coordinate_map_key",
        "MinkowskiTensorField": "TensorField",
    }.items()
    for name in names.split()
}
_COMPILED = "It names or calls a compiled operator; use the *Function classes."
_REFUSED = {
    "get_minkowski_function": _COMPILED,
    "get_postfix": _COMPILED,
    "prep_args": _COMPILED,
    "save_ctx": _COMPILED,
    "MEB": _COMPILED,
    "quantize_label": "Use sparse_quantize(labels=...).",
    "parse_nvidia_smi": "Use print_diagnostics.",
    "pruned_weight_sparsity_string": "It is a part of the table; use summary.",
    "size2list": "It is a part of the table; use summary.",
    "get_hash_occupancy_ratio": "No hash table is kept here.",
}


def module_getattr(module: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module whose original shows names of other modules.

    A name is looked up on first access, so that modules need not import one another.

    Args:
        module: The module's name, which starts with ``compat.minkowski``.
    """

    def getattr_(name: str) -> Any:
        if name == "ME":
            return importlib.import_module("compat.minkowski")
        if name in _HOMES:
            return getattr(importlib.import_module(f"compat.minkowski.{_HOMES[name]}"), name)
        shown = module.replace("compat.minkowski", "MinkowskiEngine", 1)
        text = f"module {shown!r} has no attribute {name!r}"
        if name in _REFUSED:
            text += f": not provided. {_REFUSED[name]}"
        raise AttributeError(text)

    return getattr_
