"""Checkpoints of every spconv generation, converted to the layout of this one.

The weight of a sparse convolution is saved in one of three layouts:

======  ==================  ==========================================================
layout  axes                written by
======  ==================  ==========================================================
KRSC    ``[out, *k, in]``   spconv 2.2 and later; implicit-GEMM layers of 2.0 and 2.1
RSKC    ``[*k, out, in]``   ``Native`` layers of spconv 2.0 and 2.1
RSCK    ``[*k, in, out]``   spconv 1.x, mmcv, the copy of 1.x in mmdet3d and its heirs
======  ==================  ==========================================================

1x1 layers are an exception in all layouts: every generation reads their memory as ``[in, out]``,
for any order of axes. To keep the results of such a weight, the conversion keeps its memory and
changes only its shape.
"""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from compat.spconv import constants
from compat.spconv.pytorch._convolution import SparseConvolution
from tritonspconv.guide import more

__all__ = [
    "LAYOUTS",
    "Layout",
    "OneByOne",
    "convert_state_dict",
    "convert_weight",
    "decide",
    "detect_layout",
    "load_state_dict",
    "possible_layouts",
    "read_checkpoint",
    "saved_shape",
    "state_dict_key",
]

Layout = Literal["KRSC", "RSKC", "RSCK"]
OneByOne = Literal["meaning", "layout"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_STATE_DICT_KEYS = ("state_dict", "model", "model_state", "model_state_dict")
_WRAPPER = "module."


def detect_layout(state_dict: Mapping[str, Any], model: nn.Module) -> Layout:
    """Return the one layout in which all sparse convolutions of ``model`` were saved.

    Only shapes are compared. Weights that the checkpoint lacks do not count, and a prefix
    ``module.`` on either side is ignored.

    Args:
        state_dict: The checkpoint's state dict.
        model: The network that it belongs to.

    Raises:
        ValueError: Several layouts explain every shape, or none does, or the checkpoint holds no
            weight of a sparse convolution of ``model``.
    """
    candidates = possible_layouts(state_dict, model)
    if not candidates:
        raise ValueError(
            "detect_layout: state_dict must hold the weight of a sparse convolution of the model; "
            f"got the names {_listed(state_dict)}. Pass the state dict of this model."
        )
    return decide(candidates)


def possible_layouts(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, list[Layout]]:
    """Return, for each weight of a sparse convolution of ``model``, the layouts of its shape.

    Raises:
        ValueError: A weight has a shape that no layout explains.
    """
    layers = _saved_layers(state_dict, model)
    return {name: _fitting(name, state_dict[name], layer) for name, layer in layers.items()}


def convert_state_dict(
    state_dict: Mapping[str, Any],
    model: nn.Module,
    layout: Layout | Mapping[str, Layout] | None = None,
    *,
    one_by_one: OneByOne = "meaning",
) -> OrderedDict[str, Any]:
    """Return ``state_dict`` with the weight of every sparse convolution of ``model`` in KRSC.

    Other entries, all names and their order stay. Missing and unexpected entries are left for
    ``load_state_dict`` to report. Converted layers are recorded in the result's ``_metadata`` as
    saved by the model's own version, so that patched loaders do not convert them again.

    Args:
        state_dict: The checkpoint's state dict; it is not written to.
        model: The network that it belongs to.
        layout: The layout of all weights, or of each by its name in ``state_dict``: a checkpoint of
            spconv 2.0 or 2.1 may hold both KRSC and RSKC. Default: :func:`detect_layout`.
        one_by_one: ``"meaning"``: 1x1 layers compute the same as in the program that made the
            checkpoint. ``"layout"``: their axes are moved like those of any other layer, for models
            that read 1x1 weights by their axes, ``x @ weight.view(out, in).T``.

    Raises:
        ValueError: A weight has another shape than ``layout`` asks for, or :func:`detect_layout`
            finds no answer.
    """
    if one_by_one not in get_args(OneByOne):
        raise ValueError(
            f"convert_state_dict: one_by_one must be 'meaning' or 'layout'; got {one_by_one!r}."
        )
    converted = OrderedDict(state_dict)
    metadata = OrderedDict(getattr(state_dict, "_metadata", {}))
    layers = _saved_layers(state_dict, model)
    if layers and layout is None:
        layout = detect_layout(state_dict, model)
    for name, layer in layers.items():
        from_layout = _layout_of(name, layout)
        weight = state_dict[name]
        if from_layout not in _fitting(name, weight, layer):
            raise ValueError(
                f"convert_state_dict: {name} must be {saved_shape(layer.weight_shape, from_layout)}"
                f" in layout {from_layout}; got {list(weight.shape)}. "
                "Pass the layout that the checkpoint has, or drop this weight from it."
            )
        pointwise = layer.conv1x1 and one_by_one == "meaning"
        converted[name] = convert_weight(weight, from_layout, pointwise=pointwise)
        path = name.rpartition(".")[0]
        metadata[path] = {**metadata.get(path, {}), "version": layer._version}
    converted._metadata = metadata  # pyright: ignore[reportAttributeAccessIssue]
    return converted


def load_state_dict(
    model: nn.Module,
    state_dict_or_path: Mapping[str, Any] | str | os.PathLike[str],
    layout: Layout | Mapping[str, Layout] | None = None,
    strict: bool = True,
    *,
    one_by_one: OneByOne = "meaning",
) -> Any:
    """Load a checkpoint of any layout into ``model``.

    A prefix ``module.``, which DistributedDataParallel leaves, is dropped or added as ``model``
    needs it.

    Args:
        model: The network.
        state_dict_or_path: A state dict, a checkpoint that holds one (:func:`state_dict_key`), or
            the file of either.
        layout: As for :func:`convert_state_dict`.
        strict: The argument of ``nn.Module.load_state_dict``.
        one_by_one: As for :func:`convert_state_dict`.

    Returns:
        The missing and unexpected keys, as ``nn.Module.load_state_dict`` does.

    Raises:
        ValueError: See :func:`convert_state_dict`. The error also occurs if
            ``constants.SAVED_WEIGHT_LAYOUT`` is set, because the weights would then be converted
            twice.
    """
    if constants.SAVED_WEIGHT_LAYOUT not in ("", "KRSC"):
        raise ValueError(
            "load_state_dict: SPCONV_SAVED_WEIGHT_LAYOUT must be unset, because it converts every "
            f"load; got {constants.SAVED_WEIGHT_LAYOUT!r}. Unset it and pass "
            f"layout={constants.SAVED_WEIGHT_LAYOUT!r}."
        )
    checkpoint: Any = state_dict_or_path
    if isinstance(checkpoint, str | os.PathLike):
        checkpoint = read_checkpoint(checkpoint)
    key = state_dict_key(checkpoint)
    state_dict = checkpoint if key is None else checkpoint[key]
    converted = convert_state_dict(state_dict, model, layout, one_by_one=one_by_one)
    return model.load_state_dict(_renamed_for(model, converted), strict=strict)


def read_checkpoint(path: str | os.PathLike[str], *, weights_only: bool = True) -> Any:
    """Return the content of a file of ``torch.save``, on the CPU.

    Args:
        path: The file.
        weights_only: Refuse files with objects other than tensors and plain containers. False runs
            the code that the file holds.

    Raises:
        ValueError: ``weights_only``, and the file holds other objects; or the file is broken.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if not _may_be_saved(path):
            raise ValueError(
                f"read_checkpoint: {os.fspath(path)} must be a file that torch.save wrote; it is "
                "something else."
            ) from error
        if not weights_only:
            raise
        raise ValueError(
            f"read_checkpoint: {os.fspath(path)} must hold tensors and plain containers only; got "
            "other objects, whose loading may run any code. If you trust the file, pass "
            "weights_only=False (tritonspconv convert: --trust-pickle)." + more("trust-pickle")
        ) from error
    except OSError:
        raise
    except Exception as error:  # torch may raise anything for a broken file
        reason = (type(error).__name__, str(error)[:100])
        raise ValueError(
            f"read_checkpoint: {os.fspath(path)} must be a whole file that torch.save wrote; it "
            f"cannot be read ({': '.join(filter(None, reason))}). Copy it again."
        ) from error


def _may_be_saved(path: str | os.PathLike[str]) -> bool:
    """Return whether a file starts as a zip archive or a pickle, the two formats of torch.save."""
    with Path(path).open("rb") as file:
        return file.read(2).startswith((b"PK", b"\x80"))


def state_dict_key(checkpoint: Any) -> str | None:
    """Return under which key a checkpoint holds its state dict; None if it is one itself.

    Raises:
        TypeError: ``checkpoint`` is no mapping.
        ValueError: It holds neither tensors nor a state dict under a known key.
    """
    if not isinstance(checkpoint, Mapping):
        raise TypeError(
            f"a checkpoint must be a dict; got {type(checkpoint).__name__}. "
            "Save model.state_dict(), not the model."
        )
    for key in _STATE_DICT_KEYS:
        if isinstance(checkpoint.get(key), Mapping):
            return key
    if checkpoint and not any(isinstance(value, Tensor) for value in checkpoint.values()):
        raise ValueError(
            "a checkpoint must be a state dict or hold one under one of "
            f"{', '.join(_STATE_DICT_KEYS)}; got the keys {_listed(checkpoint)}. "
            "Pass the state dict itself."
        )
    return None


def saved_shape(shape: Sequence[int], layout: Layout) -> list[int]:
    """Return the shape in ``layout`` of a weight that is ``shape``, ``[out, *k, in]``, in KRSC."""
    c_out, *kernel_size, c_in = shape
    if layout == "KRSC":
        return [c_out, *kernel_size, c_in]
    return [*kernel_size, c_out, c_in] if layout == "RSKC" else [*kernel_size, c_in, c_out]


def convert_weight(weight: Tensor, layout: Layout, *, pointwise: bool = False) -> Tensor:
    """Return a weight in KRSC, contiguous.

    Args:
        weight: The weight as ``layout`` has it.
        layout: Its layout.
        pointwise: It belongs to a 1x1 layer: keep its memory, which is ``[in, out]``.
    """
    if layout == "KRSC":
        return weight
    by_axes = weight.movedim(-2 if layout == "RSKC" else -1, 0)
    return weight.reshape(by_axes.shape) if pointwise else by_axes.contiguous()


def decide(candidates: Mapping[str, Collection[Layout]]) -> Layout:
    """Return the one layout that is a candidate of every weight.

    Args:
        candidates: The layouts that explain each weight's shape.

    Raises:
        ValueError: No layout explains all of them, or several do.
    """
    joint: list[Layout] = [
        layout for layout in LAYOUTS if all(layout in found for found in candidates.values())
    ]
    if len(joint) == 1:
        return joint[0]
    if joint:
        raise ValueError(
            f"the shapes of all {len(candidates)} sparse convolution weights must allow one layout "
            f"only; got {' and '.join(joint)}, for example {next(iter(candidates))}. "
            f"Say which it is: {_ways_to_say(joint)}." + more("checkpoint-layout")
        )
    by_layout = {name: [w for w, found in candidates.items() if name in found] for name in LAYOUTS}
    fits = "; ".join(f"{name} fits {_listed(names)}" for name, names in by_layout.items())
    raise ValueError(
        f"one layout must explain all {len(candidates)} sparse convolution weights; got {fits}. "
        "If the checkpoint mixes layouts, as spconv 2.0 and 2.1 do, pass layout={name: layout, ...}"
        " for every weight." + more("checkpoint-layout")
    )


def _saved_layers(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, SparseConvolution]:
    """Return the layer of every sparse convolution weight that the state dict holds."""
    layers = {
        f"{path}.weight" if path else "weight": module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SparseConvolution)
    }
    unwrapped = {name.removeprefix(_WRAPPER): layer for name, layer in layers.items()}
    found = {}
    for name, value in state_dict.items():
        layer = layers.get(name) or unwrapped.get(name.removeprefix(_WRAPPER))
        if layer is not None and isinstance(value, Tensor):
            found[name] = layer
    return found


def _fitting(name: str, weight: Tensor, layer: SparseConvolution) -> list[Layout]:
    """Return the layouts in which the layer's weight has this shape.

    Raises:
        ValueError: There is none.
    """
    expected = layer.weight_shape
    fitting: list[Layout] = [
        layout for layout in LAYOUTS if saved_shape(expected, layout) == list(weight.shape)
    ]
    if not fitting:
        shapes = ", ".join(f"{saved_shape(expected, layout)} ({layout})" for layout in LAYOUTS)
        raise ValueError(
            f"{name} must be one of {shapes}; got {list(weight.shape)}. Build the layer as the "
            "checkpoint's was, or drop this weight from the checkpoint."
        )
    return fitting


def _layout_of(name: str, layout: Layout | Mapping[str, Layout] | None) -> Layout:
    found = layout.get(name) if isinstance(layout, Mapping) else layout
    if found not in LAYOUTS:
        raise ValueError(
            f"convert_state_dict: layout must be one of {', '.join(LAYOUTS)}, or a dict that says "
            f"so for every weight; got {found!r} for {name}."
        )
    return found


def _renamed_for(model: nn.Module, state_dict: OrderedDict[str, Any]) -> OrderedDict[str, Any]:
    """Return the state dict with ``module.`` in front of all names, or none, as the model has."""
    wanted, given = _is_wrapped(model.state_dict()), _is_wrapped(state_dict)
    if wanted == given:
        return state_dict
    metadata = getattr(state_dict, "_metadata", {})
    if wanted:
        renamed = OrderedDict((_WRAPPER + name, value) for name, value in state_dict.items())
        paths = {(_WRAPPER + path).rstrip("."): value for path, value in metadata.items()}
    else:
        renamed = OrderedDict((name[len(_WRAPPER) :], v) for name, v in state_dict.items())
        outer = _WRAPPER.rstrip(".")
        paths = {
            "" if path == outer else path.removeprefix(_WRAPPER): value
            for path, value in metadata.items()
            if path
        }
    renamed._metadata = OrderedDict(paths)  # pyright: ignore[reportAttributeAccessIssue]
    return renamed


def _is_wrapped(state_dict: Mapping[str, Any]) -> bool:
    return bool(state_dict) and all(name.startswith(_WRAPPER) for name in state_dict)


def _ways_to_say(layouts: Iterable[Layout]) -> str:
    return " or ".join(f'layout="{layout}"' for layout in layouts)


def _listed(names: Iterable[str], most: int = 4) -> str:
    names = list(map(str, names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
