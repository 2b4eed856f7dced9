"""Kernel maps of a layer and its input, by the rules of ``indice_key`` and ``indice_dict``."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from compat.spconv.pytorch._errors import SpconvError, grid_vanished, points_vanished
from compat.spconv.pytorch._paths import map_of_window, out_shape_of
from compat.spconv.pytorch._records import Record, record_type
from compat.spconv.pytorch._repeats import RepeatedSites
from compat.spconv.pytorch._reuse import KeyedLayer, algo_of, refuse_algo
from compat.spconv.pytorch._sites import IndiceDict, LocatedSites
from compat.spconv.pytorch._windows import window
from compat.spconv.pytorch.core import SparseConvTensor
from tritonspconv.geometry import ConvGeometry
from tritonspconv.guide import more
from tritonspconv.kernel_map import KernelMap, kernel_map


class WindowLayer(KeyedLayer, Protocol):
    """The attributes and methods of a convolution or pooling layer that this file uses."""

    ndim: int
    stride: list[int]
    padding: list[int]
    output_padding: list[int]
    subm: bool
    transposed: bool
    inverse: bool

    def _check_subm_reuse_valid(
        self, inp: SparseConvTensor, spatial_shape: list[int], datas: Any
    ) -> None: ...

    def _check_inverse_reuse_valid(
        self, inp: SparseConvTensor, spatial_shape: list[int], datas: Any
    ) -> None: ...


class LayerMap(NamedTuple):
    """A kernel map for one call of a layer, and the data for the layer's output.

    Attributes:
        kernel_map: The map from the rows of the input to the rows of the output.
        indice_dict: The ``indice_dict`` of the output.
        located: The sites of the output; None: the sites of the input.
        repeats: The rows of the finer side that share sites; None if no two do.
    """

    kernel_map: KernelMap
    indice_dict: IndiceDict
    located: LocatedSites | None
    repeats: RepeatedSites | None


def map_for(layer: WindowLayer, input: SparseConvTensor) -> LayerMap:
    """Return the kernel map of a layer: recorded under its ``indice_key``, or new.

    Raises:
        SpconvError: The layer and the input, or the layer and the layer that recorded the key, do
            not fit.
    """
    if layer.inverse:
        return _inverse_map(layer, input)
    ndim = len(input.spatial_shape)
    if ndim != layer.ndim:
        raise SpconvError(
            f"{type(layer).__name__} has {layer.ndim} spatial axes; got a tensor of spatial shape "
            f"{list(input.spatial_shape)}. Use the {ndim}d layer."
        )
    return _submanifold_map(layer, input) if layer.subm else _strided_map(layer, input)


def _submanifold_map(layer: WindowLayer, input: SparseConvTensor) -> LayerMap:
    key = layer.indice_key
    record = input.find_indice_pair(key)
    if record is not None:
        if record.algo is not algo_of(layer, input):
            refuse_algo(layer, input, record)
        layer._check_subm_reuse_valid(input, input.spatial_shape, record)
        repeats = None if record.located is None else record.located.repeats
        return LayerMap(record.kernel_map, IndiceDict(input.indice_dict), None, repeats)
    located = input._locate()
    found = kernel_map(located.sites, _geometry(layer))
    indice_dict = IndiceDict(input.indice_dict)
    if key is not None:
        indice_dict[key] = _record(layer, input, found, located, located)
    return LayerMap(found, indice_dict, None, located.repeats)


def _strided_map(layer: WindowLayer, input: SparseConvTensor) -> LayerMap:
    key = layer.indice_key
    if input.find_indice_pair(key) is not None:
        raise SpconvError(
            f"indice_key {key!r} is in use: only submanifold layers may share a key. Give this "
            f"{type(layer).__name__} a key of its own." + more("indice-key")
        )
    located, geometry = input._locate(), _geometry(layer)
    out_shape = out_shape_of(located.spatial_shape, geometry)
    if min(out_shape) < 1:
        raise grid_vanished(layer, input.spatial_shape, out_shape)
    found = map_of_window(located.sites, geometry)
    if found.n_out == 0 and found.n_in > 0:
        where = f"spatial shape {input.spatial_shape}, batch size {input.batch_size}, {layer}"
        raise points_vanished(found.n_in, where)
    out_located = LocatedSites.generated(found.out_sites)
    indice_dict = IndiceDict(input.indice_dict)
    if key is not None:
        indice_dict[key] = _record(layer, input, found, located, out_located)
    return LayerMap(found, indice_dict, out_located, located.repeats_in(found))


def _inverse_map(layer: WindowLayer, input: SparseConvTensor) -> LayerMap:
    """Return the recorded map of the paired layer read backwards."""
    key = layer.indice_key
    record = input.find_indice_pair(key)
    if record is None:
        raise SpconvError(
            f"no layer recorded indice_key {key!r}: an inverse convolution needs the key of a "
            f"SparseConv, SparseConvTranspose or pool above it. Recorded: {list(input.indice_dict)}"
            + more("indice-key")
        )
    if record.is_subm:
        raise SpconvError(
            f"indice_key {key!r} belongs to a submanifold layer: an inverse convolution undoes a "
            "SparseConv, SparseConvTranspose or pool only." + more("indice-key")
        )
    if record.algo is not algo_of(layer, input):
        refuse_algo(layer, input, record)
    layer._check_inverse_reuse_valid(input, input.spatial_shape, record)
    located = record.locate_inputs(int(input.batch_size))
    repeats = located.repeats_in(record.inverse_map)
    return LayerMap(record.inverse_map, IndiceDict(input.indice_dict), located, repeats)


def _geometry(layer: WindowLayer) -> ConvGeometry:
    return window(
        layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.output_padding,
        subm=layer.subm, transposed=layer.transposed,
    )  # fmt: skip


def _record(
    layer: WindowLayer,
    input: SparseConvTensor,
    found: KernelMap,
    located: LocatedSites,
    out_located: LocatedSites,
) -> Record:
    algo = algo_of(layer, input)
    return record_type(algo).of_map(
        found,
        located,
        out_located,
        is_subm=layer.subm,
        algo=algo,
        ksize=layer.kernel_size,
        stride=layer.stride,
        dilation=layer.dilation,
        padding=layer.padding,
    )
