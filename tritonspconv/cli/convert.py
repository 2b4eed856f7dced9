"""Convert a checkpoint to spconv 2.2 and later, whose weights are KRSC = [out, *kernel, in].

  tritonspconv convert old.pth new.pth --model mynet:build
  tritonspconv convert old.pth new.pth --layout RSCK     # spconv 1.x, mmcv
  tritonspconv convert old.pth --dry-run
  tritonspconv convert me.pth new.pth --from-minkowski --model mynet:build
  tritonspconv convert sp.pth new.pth --to-minkowski --model mynet:build

SRC is a state dict, or a dict that holds one under state_dict, model, model_state or
model_state_dict. All other entries are kept as they are. The state of an optimizer is kept too, and
its momenta still have the old layout, so do not resume training from a converted file.

--model names a function without arguments that returns the network. With --model, the shapes of the
layers decide the layout. Without --model, the layout is inferred from the weights. A weight counts
as a sparse convolution if it has as many axes as --ndim says, and if in some layout no axis of its
kernel is longer than 9. The layout KRSC is recognised if the channels are larger than 9. RSKC and
RSCK have the same axes, but for the channels' order: only a bias, which has as many entries as
outputs, tells them apart. A file whose layout stays ambiguous is refused: pass --layout or --model.
Dense convolutions of as many axes with at most 9 channels, and 1x1 convolutions with a stride, need
--model.

--from-minkowski and --to-minkowski convert between MinkowskiEngine and spconv networks whose layers
have the same names and compute the same; --model returns the MinkowskiEngine one. Layers
that can be converted are listed in compat/minkowski/checkpoint.py; others are refused.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compat.minkowski import checkpoint as minkowski
from compat.spconv.checkpoint import (
    LAYOUTS,
    Layout,
    OneByOne,
    convert_state_dict,
    convert_weight,
    decide,
    possible_layouts,
    read_checkpoint,
    state_dict_key,
)
from tritonspconv.cli.errors import CommandError
from tritonspconv.guide import longer, more

LONGEST_KERNEL_AXIS = 9


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Convert one file, or print the planned changes; return the exit status and a report."""
    if (args.from_minkowski or args.to_minkowski) and not args.model:
        raise CommandError("--model is needed: the function that builds MinkowskiEngine's network")
    if args.dst is None and not args.dry_run:
        raise CommandError("DST is needed: name the file to write, or give --dry-run")
    try:
        checkpoint = read_checkpoint(args.src, weights_only=not args.trust_pickle)
        key = state_dict_key(checkpoint)
        state_dict = checkpoint if key is None else checkpoint[key]
        model = build_model(args.model) if args.model else None
        if model is not None and args.from_minkowski:
            converted = minkowski.to_spconv(state_dict, model)
        elif model is not None and args.to_minkowski:
            converted = minkowski.from_spconv(state_dict, model)
        else:
            converted = to_krsc(state_dict, model, args)
    except TypeError as error:
        raise CommandError(str(error)) from error
    changed = [name for name, value in state_dict.items() if converted.get(name) is not value]
    print(f"{len(changed)} of {len(state_dict)} entries change")
    if args.dst is not None and not args.dry_run:
        torch.save(converted if key is None else {**checkpoint, key: converted}, args.dst)
        print(f"wrote {args.dst}")
    return 0, {"entries": len(state_dict), "changed": changed, "written": args.dst}


def to_krsc(
    state_dict: Mapping[str, Any], model: nn.Module | None, args: argparse.Namespace
) -> OrderedDict[str, Any]:
    """Print the layouts found, and return the state dict in spconv's latest."""
    layout = None if args.layout == "auto" else args.layout
    if model is None:
        candidates = layouts_by_shape(state_dict, args.ndim)
    else:
        candidates = possible_layouts(state_dict, model)
    print_table(state_dict, candidates)
    if model is None:
        return convert_by_shape(state_dict, candidates, layout, args.one_by_one)
    return convert_state_dict(state_dict, model, layout, one_by_one=args.one_by_one)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("src", type=Path, metavar="SRC", help="the checkpoint")
    parser.add_argument("dst", type=Path, metavar="DST", nargs="?", help="the file to write")
    parser.add_argument(
        "--layout",
        choices=("auto", *LAYOUTS),
        default="auto",
        help="layout of SRC: KRSC [out, *k, in], RSKC [*k, out, in] (spconv 2.0, 2.1 Native), "
        "RSCK [*k, in, out] (spconv 1.x, mmcv); default: found by the shapes",
    )
    parser.add_argument("--model", metavar="MODULE:BUILDER", help="function that returns the model")
    parser.add_argument(
        "--ndim",
        type=int,
        nargs="+",
        default=[3],
        help="without --model: spatial axes of the sparse convolutions (default: 3)",
    )
    parser.add_argument(
        "--one-by-one",
        choices=("meaning", "layout"),
        default="meaning",
        help="1x1 layers: keep what they compute, or move their axes like those of the others, for "
        "models that read 1x1 weights by their axes (default: meaning)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the table; write nothing")
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="load objects other than tensors too, which may run any code that SRC holds",
    )
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--from-minkowski", action="store_true", help="SRC is MinkowskiEngine's")
    other.add_argument("--to-minkowski", action="store_true", help="DST is for MinkowskiEngine")


def build_model(name: str, argument: str = "--model") -> nn.Module:
    """Return the result of the function ``name``, given as ``module:builder``.

    Args:
        name: The function.
        argument: Where the caller named it, for messages.

    Raises:
        ValueError: ``name`` has no colon, or there is no such function.
        TypeError: It does not return a module.
    """
    module_name, colon, builder = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        build = getattr(importlib.import_module(module_name), builder) if colon else None
    except (AttributeError, ModuleNotFoundError) as error:
        raise ValueError(
            f"{argument} must name a function that can be imported; got {name!r}: {error}. "
            "Run from the folder of the module."
        ) from error
    if build is None:
        raise ValueError(
            f"{argument} must be module:builder; got {name!r}. Add the function's name."
        )
    model = build()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{argument} must return a torch.nn.Module; {name} returned {type(model).__name__}. "
            "Name a function that builds the network."
        )
    return model


def convert_by_shape(
    state_dict: Mapping[str, Any],
    candidates: Mapping[str, list[Layout]],
    layout: Layout | None,
    one_by_one: OneByOne,
) -> OrderedDict[str, Any]:
    """Return the state dict with all that looks like a sparse convolution's weight in KRSC.

    Raises:
        ValueError: No layout, or more than one, explains the shapes; or ``layout`` does not.
    """
    converted = OrderedDict(state_dict)
    if hasattr(state_dict, "_metadata"):
        converted._metadata = state_dict._metadata  # pyright: ignore
    if not candidates:
        return converted
    if layout is None:
        try:
            layout = decide(candidates)
        except ValueError as error:
            raise ValueError(longer(str(error), "Or pass --layout, or --model.")) from error
    for name, found in candidates.items():
        if layout not in found:
            raise ValueError(
                f"--layout must explain every weight; got {layout}, and {name} of shape "
                f"{list(state_dict[name].shape)} can be {' or '.join(found) or 'none'}. "
                "Pass --model, which tells sparse convolutions from others."
                + more("checkpoint-layout")
            )
        weight = state_dict[name]
        kernel_size = weight.shape[1:-1] if layout == "KRSC" else weight.shape[:-2]
        pointwise = math.prod(kernel_size) == 1 and one_by_one == "meaning"
        converted[name] = convert_weight(weight, layout, pointwise=pointwise)
    return converted


def layouts_by_shape(state_dict: Mapping[str, Any], ndims: list[int]) -> dict[str, list[Layout]]:
    """Return the layouts that could explain each weight that may be a sparse convolution's."""
    candidates = {}
    for name, weight in state_dict.items():
        is_weight = name.rpartition(".")[2] == "weight" and isinstance(weight, Tensor)
        if not is_weight or weight.ndim - 2 not in ndims:
            continue
        last = max(weight.shape[1:-1]) <= LONGEST_KERNEL_AXIS
        first = max(weight.shape[:-2]) <= LONGEST_KERNEL_AXIS
        if not (last or first):
            continue
        outputs = {"KRSC": weight.shape[0], "RSKC": weight.shape[-2], "RSCK": weight.shape[-1]}
        bias = state_dict.get(name.removesuffix("weight") + "bias")
        candidates[name] = [
            layout
            for layout in LAYOUTS
            if (last if layout == "KRSC" else first)
            and (bias is None or list(bias.shape) == [outputs[layout]])
        ]
    return candidates


def print_table(state_dict: Mapping[str, Any], candidates: Mapping[str, list[Layout]]) -> None:
    """Print the name, the shape and the possible layouts of every sparse convolution's weight."""
    rows = [
        (name, str(list(state_dict[name].shape)), " or ".join(found) or "none")
        for name, found in candidates.items()
    ]
    rows.insert(0, ("name", "shape", "layout"))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, shape, layout in rows:
        print(f"{name:{widths[0]}}  {shape:{widths[1]}}  {layout}")
