"""From a layer and its input to a kernel map: the rules of ``indice_key`` and ``indice_dict``."""

from __future__ import annotations

from typing import Any, NoReturn, Protocol

from compat.spconv.core import ConvAlgo
from compat.spconv.pytorch._errors import SpconvError
from compat.spconv.pytorch._records import ImplicitGemmIndiceData, IndiceData, record_type
from compat.spconv.pytorch._repeats import RepeatedSites
from compat.spconv.pytorch._sites import IndiceDict, LocatedSites
from compat.spconv.pytorch.core import SparseConvTensor
from compat.spconv.pytorch.ops import (
    even_submanifold,
    get_conv_output_size,
    get_deconv_output_size,
    window,
)
from tritonspconv.coords import Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import KernelMap, kernel_map

Record = IndiceData | ImplicitGemmIndiceData


class WindowLayer(Protocol):
    """What the functions below read of a convolution or pooling layer."""

    ndim: int
    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    output_padding: list[int]
    subm: bool
    transposed: bool
    indice_key: Any
    algo: ConvAlgo


def submanifold_map(
    layer: WindowLayer, input: SparseConvTensor
) -> tuple[KernelMap, dict[Any, Any], RepeatedSites | None]:
    """Return the map of a submanifold layer, recorded or new, and the output's ``indice_dict``.

    Last, how rows share sites, if any do.
    """
    _check_ndim(layer, input)
    key = layer.indice_key
    record = None if key is None else input.indice_dict.get(key)
    if record is not None:
        _check_submanifold_reuse(layer, input, record)
        repeats = None if record.located is None else record.located.repeats
        return record.kernel_map, IndiceDict(input.indice_dict), repeats
    geometry = _geometry(layer)
    if geometry is None:
        raise even_submanifold(layer.kernel_size)
    located = input._locate()
    found = kernel_map(located.sites, geometry)
    indice_dict = IndiceDict(input.indice_dict)
    if key is not None:
        indice_dict[key] = _record(layer, input, found, located, located, is_subm=True)
    return found, indice_dict, located.repeats


def strided_map(
    layer: WindowLayer, input: SparseConvTensor
) -> tuple[KernelMap, dict[Any, Any], LocatedSites, RepeatedSites | None]:
    """Return a new map to other sites, the output's ``indice_dict`` and the output's sites.

    Last, how input rows share sites, if any do.
    """
    _check_ndim(layer, input)
    key = layer.indice_key
    if key is not None and key in input.indice_dict:
        raise SpconvError(
            f"indice_key {key!r} is in use: only submanifold layers may share a key. Give this "
            f"{type(layer).__name__} a key of its own."
        )
    located = input._locate()
    found, out_located = _strided_sites(layer, input, located)
    if found.n_out == 0 and found.n_in > 0:
        raise SpconvError(
            f'no output site is left of {found.n_in} input sites ("points vanished"): spatial '
            f"shape {input.spatial_shape}, batch size {input.batch_size}, {layer}. Check that "
            "indices lie in spatial_shape and batch_size, or add padding."
        )
    indice_dict = IndiceDict(input.indice_dict)
    if key is not None:
        indice_dict[key] = _record(layer, input, found, located, out_located, is_subm=False)
    return found, indice_dict, out_located, located.repeats_in(found)


def inverse_map(layer: WindowLayer, input: SparseConvTensor) -> tuple[KernelMap, LocatedSites]:
    """Return the recorded map of the paired layer read backwards, and that layer's input sites."""
    key = layer.indice_key
    record = None if key is None else input.indice_dict.get(key)
    if record is None:
        raise SpconvError(
            f"no layer recorded indice_key {key!r}: an inverse convolution needs the key of a "
            f"SparseConv, SparseConvTranspose or pool above it. Recorded: {list(input.indice_dict)}"
        )
    if record.is_subm:
        raise SpconvError(
            f"indice_key {key!r} belongs to a submanifold layer: an inverse convolution undoes a "
            "SparseConv, SparseConvTranspose or pool only."
        )
    _check_algo(layer, input, record)
    if record.ksize != list(layer.kernel_size):
        _disagree("inverse convolution", key, "kernel_size", record.ksize, layer.kernel_size)
    if record.out_spatial_shape != list(input.spatial_shape):
        _disagree(
            "inverse convolution", key, "spatial_shape", record.out_spatial_shape,
            input.spatial_shape,
        )  # fmt: skip
    if record.kernel_map.n_out != input.indices.shape[0]:
        _disagree(
            "inverse convolution", key, "number of rows", record.kernel_map.n_out,
            input.indices.shape[0],
        )  # fmt: skip
    return record.inverse_map, record.locate_inputs(int(input.batch_size))


def _geometry(layer: WindowLayer) -> ConvGeometry | None:
    return window(
        layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.output_padding,
        subm=layer.subm, transposed=layer.transposed,
    )  # fmt: skip


def _strided_sites(
    layer: WindowLayer, input: SparseConvTensor, located: LocatedSites
) -> tuple[KernelMap, LocatedSites]:
    """Return the map of a strided layer and its output sites, as users have not written to them."""
    geometry = _geometry(layer)
    assert geometry is not None
    entry = located.strided.get(geometry)
    if entry is not None:
        if entry[1].unchanged:
            return entry
        # The engine keeps the map with the very output coordinates that were edited.
        located = LocatedSites.of(located.indices, located.spatial_shape, located.batch_size)
        input._located = located
    shape = input.spatial_shape
    window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    out_grid = None
    if layer.transposed:
        out_shape = get_deconv_output_size(shape, *window, layer.output_padding)
    else:
        out_shape = get_conv_output_size(shape, *window)
    if min(out_shape) < 1:
        raise SpconvError(
            f"{layer} would turn spatial shape {shape} into {out_shape}: every extent must be at "
            "least 1. Use a larger spatial_shape, more padding or a smaller kernel."
        )
    if layer.transposed:
        # The original leaves dilation out of the size; the engine, like torch, does not.
        out_grid = Grid((0,) * len(out_shape), tuple(out_shape), located.batch_size)
    found = kernel_map(located.sites, geometry, out_grid=out_grid)
    out_sites = found.out_sites
    entry = (
        found,
        LocatedSites(out_sites, out_sites.coords, tuple(out_shape), located.batch_size),
    )
    entry[1].repeats = None  # Generated sites do not repeat.
    located.strided[geometry] = entry
    return entry


def _record(
    layer: WindowLayer,
    input: SparseConvTensor,
    found: KernelMap,
    located: LocatedSites,
    out_located: LocatedSites,
    *,
    is_subm: bool,
) -> Record:
    algo = layer.algo if input.force_algo is None else input.force_algo
    return record_type(algo).of_map(
        found,
        located,
        out_located,
        is_subm=is_subm,
        algo=algo,
        ksize=layer.kernel_size,
        stride=layer.stride,
        dilation=layer.dilation,
        padding=layer.padding,
    )


def _check_ndim(layer: WindowLayer, input: SparseConvTensor) -> None:
    ndim = len(input.spatial_shape)
    if ndim != layer.ndim:
        raise SpconvError(
            f"{type(layer).__name__} has {layer.ndim} spatial axes; got a tensor of spatial shape "
            f"{list(input.spatial_shape)}. Use the {ndim}d layer."
        )


def _check_submanifold_reuse(layer: WindowLayer, input: SparseConvTensor, record: Record) -> None:
    """Check what spconv checks before a submanifold layer reuses a map; coordinates are trusted."""
    key = layer.indice_key
    if not record.is_subm:
        raise SpconvError(
            f"indice_key {key!r} belongs to a layer that is not submanifold: only submanifold "
            "layers may share a key. Give this layer a key of its own."
        )
    _check_algo(layer, input, record)
    if record.ksize != list(layer.kernel_size):
        _disagree("submanifold layer", key, "kernel_size", record.ksize, layer.kernel_size)
    if record.dilation != list(layer.dilation):
        _disagree("submanifold layer", key, "dilation", record.dilation, layer.dilation)
    if record.spatial_shape != list(input.spatial_shape):
        _disagree(
            "submanifold layer", key, "spatial_shape", record.spatial_shape, input.spatial_shape
        )
    if record.kernel_map.n_in != input.indices.shape[0]:
        _disagree(
            "submanifold layer", key, "number of rows", record.kernel_map.n_in,
            input.indices.shape[0],
        )  # fmt: skip


def _check_algo(layer: WindowLayer, input: SparseConvTensor, record: Record) -> None:
    algo = layer.algo if input.force_algo is None else input.force_algo
    if record.algo is not algo:
        _disagree("layer", layer.indice_key, "algo", record.algo, algo)


def _disagree(what: str, key: Any, name: str, expected: Any, got: Any) -> NoReturn:
    raise SpconvError(
        f"this {what} shares indice_key {key!r} with a layer of another {name}: expected "
        f"{expected}, got {got}. Make them equal, or use another key."
    )
