"""Convolutions as ``torch.compile`` traces them.

A graph holds no kernel map and no sites. It holds the sites that its input had, the *root*, and for
each level the *path* of the strided layers that lead there. A registered operator walks along the
path when it runs, through the maps that the root keeps. The number of sites that a strided layer
makes is a size that torch does not know beforehand, so a whole network is one graph for every
number of voxels.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from compat.spconv import constants
from compat.spconv.core import Activation
from compat.spconv.pytorch._errors import points_vanished
from compat.spconv.pytorch._maps import WindowLayer
from compat.spconv.pytorch._paths import map_along, map_at, sites_along, split, step_of
from compat.spconv.pytorch._records import record_type
from compat.spconv.pytorch._reuse import algo_of, inverse_difference, submanifold_difference
from compat.spconv.pytorch._sites import IndiceDict, LocatedSites
from compat.spconv.pytorch._windows import output_size
from compat.spconv.pytorch.core import SparseConvTensor
from tritonspconv.coords import ActiveSites
from tritonspconv.debug import checks_coords
from tritonspconv.graph_capture import GraphCaptureError
from tritonspconv.guide import more
from tritonspconv.kernel_map import KernelMap
from tritonspconv.nn.chain import normalise
from tritonspconv.nn.fusable import Norm
from tritonspconv.nn.traced import run_operator
from tritonspconv.opaque_types import is_lowered, schema_name
from tritonspconv.ops.conv import compute_dtype
from tritonspconv.ops.registered import refuse_few_sites, register_conv, register_sizes


class TracedLayer(WindowLayer, Protocol):
    """The attributes and methods of a convolution that this file uses."""

    weight: Any
    bias: Any
    in_channels: int
    training: bool
    conv1x1: bool
    act_type: Activation
    record_voxel_count: bool

    def has_own_methods(self) -> bool:
        """Return whether no user replaced a method that tracing leaves out."""
        ...

    def has_own_checks(self) -> bool:
        """Return whether no user replaced the checks of a shared ``indice_key``."""
        ...


class _Followers(NamedTuple):
    """A convolution is followed by these operations, of its container or of its own.

    Attributes:
        norm: The batch norm; None: there is none.
        relu: True: a ReLU comes last.
        addend: Features that are added before the ReLU; None: nothing is added.
    """

    norm: Norm | None
    relu: bool
    addend: Tensor | None


def trace_convolution(
    layer: TracedLayer,
    input: SparseConvTensor,
    add_input: SparseConvTensor | None,
    norm: Norm | None = None,
    relu: bool = False,
) -> SparseConvTensor | None:
    """Return the output of a layer; None where Python has to run the layer.

    Args:
        layer: The convolution.
        input: Its input.
        add_input: Added to the output row by row; only of a layer without ``norm``.
        norm: The batch norm behind the layer, or None.
        relu: True: a ReLU comes last.
    """
    if not _is_plain(layer, input, add_input):
        return None
    addend = None if add_input is None else add_input._features
    behind = _Followers(norm, relu or layer.act_type is Activation.ReLU, addend)
    weight, feats = layer.weight, input._features
    if feats.dtype != weight.dtype and not torch.is_autocast_enabled(feats.device.type):
        feats = feats.to(weight.dtype)
    # Under autocast the operator sums the gradient of a float32 weight in float32; torch would not.
    if layer.conv1x1 and compute_dtype(feats, weight) == weight.dtype:
        matrix, bias = weight.reshape(layer.in_channels, -1), layer.bias
        out = feats.mm(matrix) if bias is None else torch.addmm(bias, feats, matrix)
        out = normalise(out, norm, behind.relu, addend)
        return input._derive(out, input.indice_dict)
    if layer.subm:
        return _trace_submanifold(layer, input, feats, behind)
    if layer.inverse:
        return _trace_inverse(layer, input, feats, behind)
    return _trace_strided(layer, input, feats, behind)


def _trace_submanifold(
    layer: TracedLayer, input: SparseConvTensor, feats: Tensor, behind: _Followers
) -> SparseConvTensor | None:
    record = input.find_indice_pair(layer.indice_key)
    if record is None:
        located, indices = _own_sites(input), input.indices
    elif (
        record.located is not None
        and record.is_subm
        and record.algo is algo_of(layer, input)
        and submanifold_difference(layer, input, record) is None
        and layer.has_own_checks()
    ):
        # It is not known if the indices were edited before a traced layer made the entry.
        located, indices = record.located, record.indices if record.route is not None else None
    else:
        return None
    if located is None or not located.are_distinct:
        return None
    indice_dict = IndiceDict(input.indice_dict)
    route = located.path + step_of(layer)
    if record is None and layer.indice_key is not None:
        indice_dict[layer.indice_key] = _entry(layer, input, located, located, route)
    place = indices, located.root, located.version, route
    out = _call_operator("spconv_submanifold", layer, feats, place, feats.shape[0], behind)
    return input._derive(out, indice_dict)


def _trace_strided(
    layer: TracedLayer, input: SparseConvTensor, feats: Tensor, behind: _Followers
) -> SparseConvTensor | None:
    located = _own_sites(input)
    if (
        located is None
        or not located.are_distinct
        or layer.record_voxel_count
        or input.find_indice_pair(layer.indice_key) is not None
    ):
        return None
    shape = output_size(
        located.spatial_shape, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        layer.output_padding, transposed=layer.transposed,
    )  # fmt: skip
    if min(shape) < 1:
        return None
    route = located.path + step_of(layer)
    # Torch compiles a batch norm of an unknown number of rows if there is at least one row; in
    # training it asks in Python if there are two.
    indices = torch.ops.tritonspconv.spconv_sites(
        input.indices, located.root, located.version, route, 2 if layer.training else 1
    )
    made = LocatedSites.traced(located.root, route, indices, shape, located.batch_size)
    indice_dict = IndiceDict(input.indice_dict)
    if layer.indice_key is not None:
        indice_dict[layer.indice_key] = _entry(layer, input, located, made, route)
    place = located.root, route
    out = _call_operator("spconv_strided", layer, feats, place, indices.shape[0], behind)
    return input._derive(out, indice_dict, made)


def _trace_inverse(
    layer: TracedLayer, input: SparseConvTensor, feats: Tensor, behind: _Followers
) -> SparseConvTensor | None:
    record = input.find_indice_pair(layer.indice_key)
    if (
        record is None
        or record.route is None
        or record.located is None
        or record.is_subm
        or record.algo is not algo_of(layer, input)
        or inverse_difference(layer, input, record) is not None
        or not record.located.are_distinct
        or not layer.has_own_checks()
    ):
        return None
    located = record.located
    place = located.root, record.route
    out = _call_operator("spconv_inverse", layer, feats, place, record.indices.shape[0], behind)
    return input._derive(out, IndiceDict(input.indice_dict), located)


def _call_operator(
    name: str,
    layer: TracedLayer,
    feats: Tensor,
    place: tuple[Any, ...],
    n_out: Any,
    behind: _Followers,
) -> Tensor:
    """Call a registered convolution, and what follows it.

    Args:
        name: Name of the operator.
        layer: The convolution.
        feats: Input rows [n_in, c_in].
        place: The arguments of the operator that describe the kernel map.
        n_out: Number of output rows.
        behind: What follows the convolution.
    """
    weight, layout = layer.weight, "OVI"
    if layer.conv1x1:
        weight, layout = weight.reshape(1, layer.in_channels, -1), "VIO"
    precision = "tf32" if constants.SPCONV_ALLOW_TF32 else "ieee"
    dtype = compute_dtype(feats, layer.weight)
    operands = feats, weight, layer.bias, *place, n_out, layout, dtype, precision
    return run_operator(name, operands, behind.norm, behind.relu, behind.addend)


def _is_plain(layer: TracedLayer, input: Any, add_input: Any) -> bool:
    """Return whether nothing about the call needs Python: errors, users' methods, padded rows."""
    return (
        type(input) is SparseConvTensor
        and (add_input is None or type(add_input) is SparseConvTensor)
        and "shadow_copy" not in input.__dict__
        and layer.has_own_methods()
        and layer.act_type in (Activation.None_, Activation.ReLU)
        and type(input._features) is Tensor
        and input._features.ndim == 2
        and input._features.shape[1] == layer.in_channels
        and len(input.spatial_shape) == layer.ndim
        and not (layer.subm and any(size % 2 == 0 for size in layer.kernel_size))
        and not (layer.inverse and layer.conv1x1)
        and input._features.shape[0] > 0
    )


def is_new(input: SparseConvTensor) -> bool:
    """Return whether Python has to run the next layer, because nobody looked at the sites yet."""
    located = _own_sites(input)
    return located is None or not located.are_distinct


def _own_sites(input: SparseConvTensor) -> LocatedSites | None:
    """Return the sites of ``input.indices`` if they were located before."""
    located = getattr(input.indice_dict, "located", None)
    if (
        located is not None
        and located.indices is input.indices
        and located.spatial_shape == tuple(input.spatial_shape)
        and located.batch_size == input.batch_size
    ):
        return located
    return None


def _entry(
    layer: TracedLayer,
    input: SparseConvTensor,
    located: LocatedSites,
    out_located: LocatedSites,
    route: str,
) -> Any:
    """Return the entry of the layer for ``indice_dict``."""
    algo = algo_of(layer, input)
    return record_type(algo).of_map(
        None, located, out_located, is_subm=layer.subm, algo=algo, ksize=layer.kernel_size,
        stride=layer.stride, dilation=layer.dilation, padding=layer.padding, route=route,
    )  # fmt: skip


def _submanifold_map(
    indices: Tensor | None, root: ActiveSites, version: int | None, route: str
) -> KernelMap:
    """Return the map of a submanifold window; at ``indices`` if these were edited.

    Args:
        indices: The user's ``indices`` tensor; None: the recorded map is used unchecked.
        root: The sites from which the route starts.
        version: Number of writes to ``indices`` when they were located.
        route: The path to the sites and the layer's own step.
    """
    path, own = split(route)
    sites = sites_along(root, path)
    if indices is not None and not _describes(indices, sites, version):
        sites = ActiveSites(indices.clone(memory_format=torch.contiguous_format), sites.grid)
        if sites.has_repeats():
            raise RuntimeError(
                "SubMConv: indices that were edited in place now repeat a site, which a compiled "
                "network cannot handle. Edit indices before the compiled function."
                + more("edited-indices")
            )
    return map_at(sites, own)


def _refuse_edits(indices: Tensor | None, *_: Any) -> None:
    """Raise if the function that is traced wrote to ``indices`` (a fake tensor) before."""
    if indices is None or indices.is_inference() or is_lowered():
        return
    if indices._version:
        raise GraphCaptureError(
            "torch.compile cannot trace a sparse layer behind code that edits indices in place. "
            "Edit indices before the compiled function." + more("edited-indices")
        )


def _describes(indices: Tensor, sites: ActiveSites, version: int | None) -> bool:
    """Return whether ``indices`` is unchanged, as far as that can be known."""
    if indices is sites.coords or indices.device.type == "cpu" or checks_coords():
        return torch.equal(indices, sites.coords)
    return version is None or indices.is_inference() or indices._version == version


def _made_sites(
    indices: Tensor, root: ActiveSites, version: int | None, route: str, least: int
) -> Tensor:
    """Return a copy of the coordinates that a strided layer makes, int32 [n_out, 1 + ndim]."""
    path, own = split(route)
    sites = sites_along(root, path)
    if not _describes(indices, sites, version):
        raise RuntimeError(
            "a compiled strided layer met indices that were edited in place after another layer "
            "had used them. Edit indices before the first layer, or assign a new tensor."
            + more("edited-indices")
        )
    found = map_at(sites, own)
    if found.n_out == 0 and found.n_in > 0:
        raise points_vanished(found.n_in, str(found.geometry))
    refuse_few_sites(found.n_out, least)
    return found.out_sites.coords.clone()


def _map_back(root: ActiveSites, route: str) -> KernelMap:
    """Return the map of a strided layer read backwards."""
    return map_along(root, route).inverse()


_PLACE = f"{schema_name(ActiveSites)} root, str route"
_CHECKED = f"{schema_name(ActiveSites)} root, int? version, str route"
register_conv("spconv_submanifold", f"Tensor? indices, {_CHECKED}", _submanifold_map, _refuse_edits)
register_conv("spconv_strided", _PLACE, map_along)
register_conv("spconv_inverse", _PLACE, _map_back)
register_sizes("spconv_sites", f"Tensor indices, {_CHECKED}, int least", _made_sites, _refuse_edits)
