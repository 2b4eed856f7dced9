"""Layers and tensors as ``torch.compile`` traces them.

A graph holds no coordinate map. It holds the coordinate manager, as an object that it does not look
into, and the keys of the maps as text. A registered operator makes the maps when it runs. The
number of sites that a strided layer makes is a size that torch does not know beforehand. A tensor
carries, for each map that led to it, an empty tensor with as many rows as the map, so that all
layers of one tensor stride have one size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from compat.minkowski._keys import CoordinateMapKey, KeyValue
from compat.minkowski.enums import RegionType, SparseTensorQuantizationMode
from compat.minkowski.MinkowskiCoordinateManager import CoordinateManager
from compat.minkowski.MinkowskiKernelGenerator import KernelGenerator
from tritonspconv.kernel_map import KernelMap
from tritonspconv.opaque_types import schema_name
from tritonspconv.ops.conv import compute_dtype
from tritonspconv.ops.registered import refuse_few_sites, register_conv, register_sizes

_SAMPLED = SparseTensorQuantizationMode.RANDOM_SUBSAMPLE


def is_plain(tensor: Any, kind: type) -> bool:
    """Return whether a graph can hold a tensor: of the class ``kind`` itself, with rows."""
    return (
        type(tensor) is kind
        and type(tensor._F) is Tensor
        and tensor._F.ndim == 2
        and tensor._F.shape[0] > 0
    )


def have_one_map(one: Any, other: Any, kind: type) -> bool:
    """Return whether a graph can tell that two tensors have the same rows."""
    return (
        is_plain(one, kind)
        and is_plain(other, kind)
        and one._manager is other._manager
        and one.coordinate_map_key._text == other.coordinate_map_key._text
    )


def derive(tensor: Any, features: Tensor, key: str | None = None) -> Any:
    """Return features on the map of a tensor, or on another map of its manager.

    Args:
        tensor: A tensor of which :func:`is_plain` is true.
        features: [N, C].
        key: The text of the map's key; None: the map of ``tensor``.
    """
    made = object.__new__(type(tensor))
    made.quantization_mode = _SAMPLED
    made._F, made._C, made._batch_rows = features, None, None
    made._D, made._manager, made._rows_of_maps = tensor._D, tensor._manager, tensor._rows_of_maps
    if key is None:
        made.coordinate_map_key = tensor.coordinate_map_key
    else:
        of_map = made.coordinate_map_key = object.__new__(CoordinateMapKey)
        of_map._text, of_map._coordinate_size = key, tensor.coordinate_map_key._coordinate_size
        of_map._value = _value(key)
    return made


def trace_convolution(layer: Any, input: Any, kind: type) -> Any | None:
    """Return the output of a convolution; None where Python has to run the layer."""
    if not _is_traceable(layer, input, kind):
        return None
    feats, kernel, bias = input._F, layer.kernel, layer.bias
    in_key = out_key = input.coordinate_map_key._text
    # A layer that works row by row keeps the map of its input, transposed or not.
    letter = "T" if layer.is_transpose and not layer.use_mm else "C"
    step = f"{letter} {layer.kernel_generator._text}"
    if layer.use_mm:
        if compute_dtype(feats, kernel) == kernel.dtype:
            feats = feats.to(kernel.dtype)
            out = feats.mm(kernel) if bias is None else torch.addmm(bias, feats, kernel)
            return derive(input, out)
        kernel = kernel.unsqueeze(0)
    else:
        out_key = _out_key(in_key, step)
    rows = _rows(layer, input, in_key, step, out_key)
    if rows is None:
        return None
    out = torch.ops.tritonspconv.minkowski_convolution(
        feats, kernel, None if bias is None else bias.view(-1), input._manager, in_key, step,
        rows.shape[0], "VIO", compute_dtype(feats, kernel), "ieee",
    )  # fmt: skip
    return derive(input, out, out_key)


def _is_traceable(layer: Any, input: Any, kind: type) -> bool:
    """Return whether nothing about the call needs Python: errors, users' functions, expansion."""
    return (
        is_plain(input, kind)
        and layer.conv is layer._own_function
        and not layer._relu
        and not layer.kernel_generator.expand_coordinates
        and layer.kernel_generator.region_type is not RegionType.CUSTOM
        and layer.dimension + 1 == input.coordinate_map_key._coordinate_size
        and input._F.shape[1] == layer.in_channels
    )


def _rows(layer: Any, input: Any, in_key: str, step: str, out_key: str) -> Tensor | None:
    """Return a tensor with as many rows as the output's map; None: no graph can make that map."""
    if out_key == in_key:
        return input._F
    known = input._rows_of_maps
    if known is None:
        known = {in_key: input._F.new_zeros(input._F.shape[0], 0)}
        input._rows_of_maps = known
    if out_key in known:
        return known[out_key]
    if layer.is_transpose:
        return None
    # Torch compiles a batch norm of an unknown number of rows if there is at least one row; in
    # training it asks in Python if there are two.
    known[out_key] = torch.ops.tritonspconv.minkowski_rows(
        known[in_key], input._manager, in_key, step, 2 if layer.training else 1
    )
    return known[out_key]


def _out_key(in_key: str, step: str) -> str:
    """Return the key of a layer's output; that of no map where the layer raises."""
    (tensor_stride, string_id), (generator, is_transpose) = _value(in_key), _layer(step)
    axes = list(zip(tensor_stride, generator.kernel_stride, strict=True))
    if not is_transpose:
        return _text(tuple(ts * factor for ts, factor in axes), string_id)
    if any(ts % factor or not ts for ts, factor in axes):
        return "none"
    return _text(tuple(ts // factor for ts, factor in axes), "")


def _text(tensor_stride: tuple[int, ...], string_id: str) -> str:
    return CoordinateMapKey.of((tensor_stride, string_id))._text


def _value(key: str) -> KeyValue:
    """Return the value of a key of this text."""
    steps, _, string_id = key.partition(":")
    return tuple(map(int, steps.split())), string_id


@lru_cache(maxsize=1024)
def _key(text: str) -> CoordinateMapKey:
    return CoordinateMapKey.of(_value(text))


@lru_cache(maxsize=1024)
def _layer(step: str) -> tuple[KernelGenerator, bool]:
    """Return window and stride of a layer, and whether it is transposed."""
    letter, region, *texts = step.split()
    numbers = [*map(int, texts)]
    ndim = len(numbers) // 3
    parts = [numbers[start : start + ndim] for start in range(0, len(numbers), ndim)]
    kernel_size, stride, dilation = parts
    generator = KernelGenerator(
        kernel_size, stride, dilation, region_type=RegionType[region], dimension=ndim
    )
    return generator, letter == "T"


def _map_of(manager: CoordinateManager, in_key: str, step: str) -> KernelMap:
    """Return the kernel map of a layer; the manager makes the output's map if there is none."""
    key, (generator, is_transpose) = _key(in_key), _layer(step)
    out_key = manager._convolution_key(key, generator, is_transpose)
    return manager._kernel_map(key, out_key, generator._window, is_transpose)


def _rows_made(
    known: Tensor, manager: CoordinateManager, in_key: str, step: str, least: int
) -> Tensor:
    """Return an empty tensor with a row for each site of a strided layer's output, [n_out, 0]."""
    generator, is_transpose = _layer(step)
    count = manager.size(manager._convolution_key(_key(in_key), generator, is_transpose))
    refuse_few_sites(count, least)
    return known.new_empty(count, 0)


_PLACE = f"{schema_name(CoordinateManager)} manager, str in_key, str step"
register_conv("minkowski_convolution", _PLACE, _map_of)
register_sizes("minkowski_rows", f"Tensor known, {_PLACE}, int least", _rows_made, lambda *_: None)
